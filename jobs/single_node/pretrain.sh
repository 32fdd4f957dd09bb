#!/usr/bin/env bash
# How do I pre-train InternImage-H on one node with eight GPUs? Fill in the environment and start this there.
#
#   DATA_LAION400M=/data/laion400m DATA_YFCC15M=/data/yfcc15m DATA_CC12M=/data/cc12m \
#   DATA_IMAGENET22K=/data/imagenet22k/train OUT=/runs/h ENV=/envs/m3i \
#     jobs/single_node/pretrain.sh [typed overrides of the recipe, such as --batch 2048]
#
# jobs/run_variables.sh explains these variables, and RECIPE, DS_CONFIG and SHM_GIB. RANKS: default 8, one a GPU.
# Those of jobs/local/pretrain.sh work too.
set -euo pipefail
root=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/../..")
# shellcheck source=jobs/run_variables.sh
. "$root/jobs/run_variables.sh"

refuse_said "$@"
require_out
require_env
require_data
require_ds_config "$root"
require_shared_memory

export RANKS=${RANKS-8}
mkdir -p -- "$OUT"
exec "$root/jobs/local/pretrain.sh" --recipe "${RECIPE:-m3i.internimage_h}" --out "$OUT" \
  --ds-config "$DS_CONFIG" --data "${sources[@]}" "$@"
