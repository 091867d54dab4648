#!/bin/sh
# Train, export, verify, describe and sign one model, for any CI. What varies comes from variables:
#   DATA              a folder of train/<class>/ and test/<class>/, or a data set's name [digits]
#   RECIPE            a recipe's name or file [digits]
#   MIN_ACCURACY, AT_EPS, THREAT   the robustness that is demanded [0.6, 0.1, transfer]
#   LICENCE, DATA_LICENCE          for provenance and card [none]
#   SIGNING_KEY       a PEM file; without it the signature is Sigstore's, by the identity of the job
#   PUBLIC_KEY        of the signing key, to check the result
#   OUT               the folder to publish [release]
set -eu
out=${OUT:-release}
mkdir -p "$out"

dverge train --recipe "${RECIPE:-digits}" --data "${DATA:-digits}" --out run --resume
dverge export "$out/model.onnx" --run run --licence "${LICENCE:-}" --data-licence "${DATA_LICENCE:-}"
# Ends here with 1 if the accuracy is not met, with 3 if the figures are not valid.
dverge verify-robustness "$out/model.onnx" --run run \
    --min-accuracy "${MIN_ACCURACY:-0.6}" --at-eps "${AT_EPS:-0.1}" --threat "${THREAT:-transfer}" \
    --junit robustness.xml --bom "$out/model.cdx.json"
dverge card "$out/model.onnx" --out "$out/model.md"
# Last: it covers everything above.
if [ -n "${SIGNING_KEY:-}" ]; then
    dverge sign "$out/model.onnx" --key "$SIGNING_KEY"
    dverge verify-signature "$out/model.onnx" --public-key "$PUBLIC_KEY"
else
    dverge sign "$out/model.onnx" --sigstore
fi
