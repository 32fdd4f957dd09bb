#!/usr/bin/env bash
# How do I pre-train InternImage-H on one node with eight GPUs? Fill in the environment and start this there.
#
#   DATA_LAION400M=/data/laion400m DATA_YFCC15M=/data/yfcc15m DATA_CC12M=/data/cc12m \
#   DATA_IMAGENET22K=/data/imagenet22k/train OUT=/runs/h ENV=/envs/m3i \
#     jobs/single_node/pretrain.sh [typed overrides of the recipe, such as --steps 1000]
#
#   DATA_<NAME>  one variable a source of the recipe, each a folder with manifest.json; NAME in capitals
#   OUT          folder of the run; started again with the same one, the run continues from its newest checkpoint
#   ENV          virtual environment with requirements.txt
#   RECIPE       default m3i.internimage_h         DS_CONFIG  default ds_configs/zero3.json
#   RANKS        default 8, one a GPU              SHM_GIB    shared memory that is asked for, default 8 GiB
set -euo pipefail
root=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/../..")

fail() {
  echo "$*" >&2
  exit 1
}

: "${OUT:?is not set: name the folder of the run, on a disk with room for checkpoints}"
: "${ENV:?is not set: name the virtual environment that holds requirements.txt (make venv VENV=...)}"

sources=()
for variable in $(compgen -A variable DATA_); do
  folder=${!variable}
  name=${variable#DATA_}
  [[ -f $folder/manifest.json ]] ||
    fail "$variable=$folder holds no manifest.json: name a data set that python -m data_prep build has finished"
  sources+=("${name,,}=$folder")
done
((${#sources[@]} > 0)) || fail "no DATA_<NAME> is set: name the recipe's sources, such as DATA_LAION400M=/data/laion400m"

shm_kib=$(df --output=avail -k /dev/shm | tail -n 1)
((shm_kib >= ${SHM_GIB:-8} * 1024 * 1024)) ||
  fail "/dev/shm has $((shm_kib / 1024)) MiB free and NCCL and the loader want ${SHM_GIB:-8} GiB:" \
    "start the container with --shm-size or --ipc=host, or lower SHM_GIB"

export RANKS=${RANKS:-8}
mkdir -p -- "$OUT"
exec "$root/jobs/local/pretrain.sh" --recipe "${RECIPE:-m3i.internimage_h}" --out "$OUT" \
  --ds-config "${DS_CONFIG:-$root/ds_configs/zero3.json}" --data "${sources[@]}" "$@"
