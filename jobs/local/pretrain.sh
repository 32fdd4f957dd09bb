#!/usr/bin/env bash
# How do I pre-train on this one machine? On all its GPUs; without any, on the CPU with two ranks.
#
#   jobs/local/pretrain.sh --recipe m3i.demo --data labelled=DIR captioned=DIR --out DIR [--optim.lr 1e-3 ...]
#
# The arguments are those of pretrain/main.py. The environment says what belongs to the machine:
#   ENV              virtual environment; default: the repository's .venv, else the active one
#   RANKS            processes; default: one a GPU, or 2 on the CPU
#   OMP_NUM_THREADS  threads of a process; default: cores / ranks
#   MASTER_PORT      rendezvous on loopback; default: a free port, so that two runs do not meet
#
# SIGTERM or SIGUSR1 to this script saves and ends with 75: start the same command again. 76: a rank was lost, also
# start it again. 65: the guard gave up, look at its evidence. pretrain/exits.py has all codes.
set -euo pipefail

if (($# == 0)); then
  echo "no arguments: say at least --recipe, --data NAME=DIR and --out DIR; see the head of $0" >&2
  exit 2
fi
root=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/../..")

env_folder=${ENV:-}
if [[ -z $env_folder && -x $root/.venv/bin/deepspeed ]]; then env_folder=$root/.venv; fi
if [[ -n $env_folder ]]; then
  if [[ ! -x $env_folder/bin/deepspeed ]]; then
    echo "ENV=$env_folder holds no bin/deepspeed: run \`make venv VENV=$env_folder\` or name another folder" >&2
    exit 1
  fi
  PATH=$(realpath -- "$env_folder")/bin:$PATH
elif ! command -v deepspeed >/dev/null; then
  echo "deepspeed is not on PATH: run \`make venv\`, or set ENV to a virtual environment with requirements.txt" >&2
  exit 1
fi

# One start of Python answers two questions: how many GPUs, and which port is free.
read -r gpus free_port < <(python - <<'PYTHON'
import os, socket, torch
gpus = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    print(gpus, probe.getsockname()[1])
PYTHON
)

# One machine, whatever a cluster left in the default hostfile.
launcher=(--quiet --hostfile /dev/null --master_addr 127.0.0.1 --master_port "${MASTER_PORT:-$free_port}")
if ((gpus == 0)); then
  ranks=${RANKS:-2}
  export DS_ACCELERATOR=cpu
  launcher+=(--num_accelerators "$ranks")
else
  ranks=${RANKS:-$gpus}
  if ((ranks > gpus)); then
    echo "RANKS=$ranks is more than the $gpus GPUs that are visible: lower it, or set DS_ACCELERATOR=cpu" >&2
    exit 1
  fi
  # DeepSpeed takes what is visible, and would forget a choice of GPUs if it were given a number.
  visible=${CUDA_VISIBLE_DEVICES:-$(seq --separator=, 0 $((gpus - 1)))}
  CUDA_VISIBLE_DEVICES=$(cut --delimiter=, --fields="-$ranks" <<<"$visible")
  export CUDA_VISIBLE_DEVICES
fi

threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

set -m # a process group of its own, in which Ctrl-C still counts
deepspeed "${launcher[@]}" "$root/pretrain/main.py" "$@" &
deepspeed=$!

children() {
  local pid list=
  for pid in "$@"; do
    list=$(cat "/proc/$pid/task/$pid/children" 2>/dev/null) && printf '%s ' "$list"
  done
}

# The ranks alone are asked to stop. The launcher, were it told, would give them 30 s and end the loader's workers first.
ask_ranks() {
  has_asked=1 is_interrupted=1
  local ranks
  # shellcheck disable=SC2046 # words are wanted: process numbers
  ranks=$(children $(children "$deepspeed"))
  # shellcheck disable=SC2086
  kill -s USR1 $ranks 2>/dev/null || true
}
interrupt() {
  is_interrupted=1
  kill -s INT -- "-$deepspeed" 2>/dev/null || true
}
has_asked=0
trap ask_ranks TERM USR1
trap interrupt INT

while true; do
  is_interrupted=0 code=0
  wait "$deepspeed" || code=$?
  ((is_interrupted)) || break
done
# What the launcher makes of a rank that a signal ended, 256 minus its number.
if ((code > 192)); then code=$((has_asked ? 75 : 76)); fi
exit "$code"
