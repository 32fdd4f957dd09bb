#!/usr/bin/env bash
# How good is a run, and where are its weights? Evaluates the last checkpoint, then exports it.
#
# evaluate.yaml and run.yaml set the environment:
#   OUT            folder of the run
#   EVALUATE_DATA  folder with train/ and heldout/
#   EXPORT_TO      formats of python -m pretrain.export, a space between two; default safetensors
set -euo pipefail
: "${OUT:?is not set: name the folder of the run in run.yaml}"
: "${EVALUATE_DATA:?is not set: name the folder with train/ and heldout/ in run.yaml}"

python -m pretrain.evaluate "$OUT" --data "$EVALUATE_DATA" --out "$OUT/evaluation.json"
read -ra formats <<<"${EXPORT_TO:-safetensors}"
python -m pretrain.export "$OUT" --to "${formats[@]}"
