#!/usr/bin/env bash
# Classify image files with a DVERGE service: ./predict.sh IMAGE...
# DVERGE_URL is the service's address (http://localhost:3000), DVERGE_TOKEN its token.
# Prints one JSON answer a line; `./predict.sh *.png | jq -r '.predictions[0].label'` the labels.
set -uo pipefail
failed=0
answer=$(mktemp)
trap 'rm -f "$answer"' EXIT
for image in "$@"; do
  # A retry waits as long as a full service says. The file holds only the last answer. The token goes
  # through a pipe, because every user of this machine can read the arguments.
  : >"$answer"
  curl --silent --show-error --fail-with-body --retry 4 --max-time 60 --output "$answer" \
    --header @<([ -z "${DVERGE_TOKEN:-}" ] || echo "Authorization: Bearer $DVERGE_TOKEN") \
    --header 'Content-Type: application/octet-stream' --data-binary "@$image" \
    "${DVERGE_URL:-http://localhost:3000}/predict" || failed=1
  [ ! -s "$answer" ] || { cat "$answer" && echo; }
done
exit "$failed"
