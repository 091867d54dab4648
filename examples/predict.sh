#!/usr/bin/env bash
# Classify image files with a DVERGE service: ./predict.sh IMAGE...
# DVERGE_URL names the service (http://localhost:3000), DVERGE_TOKEN its token.
# Prints one JSON answer a line; `./predict.sh *.png | jq -r '.predictions[0].label'` the labels.
set -uo pipefail
failed=0
answer=$(mktemp)
trap 'rm -f "$answer"' EXIT
for image in "$@"; do
  # Retries wait as long as a full service asks for, and the file keeps the last answer alone. The
  # token goes by a pipe: arguments are there for every user of this machine to read.
  : >"$answer"
  curl --silent --show-error --fail-with-body --retry 4 --max-time 60 --output "$answer" \
    --header @<([ -z "${DVERGE_TOKEN:-}" ] || echo "Authorization: Bearer $DVERGE_TOKEN") \
    --header 'Content-Type: application/octet-stream' --data-binary "@$image" \
    "${DVERGE_URL:-http://localhost:3000}/predict" || failed=1
  [ ! -s "$answer" ] || { cat "$answer" && echo; }
done
exit "$failed"
