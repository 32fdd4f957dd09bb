#!/usr/bin/env bash
# How do I pre-train on this machine? On all its GPUs; without any, on the CPU with two ranks. Alone, or as one of many.
#
#   jobs/local/pretrain.sh --recipe m3i.demo --data labelled=DIR captioned=DIR --out DIR [--optim.lr 1e-3 ...]
#
# The arguments are those of pretrain/main.py. The environment says what belongs to the machine:
#   ENV              virtual environment; default: the repository's .venv, else the active one
#   RANKS            processes; default: one a GPU, or 2 on the CPU
#   OMP_NUM_THREADS  threads of a process; default: cores / ranks
#   MASTER_PORT      rendezvous; default: a free port on loopback, so that two runs do not meet
#   LOGS             folder that gets one file a rank for what it prints; default: all on this script's output
#   PREFLIGHT        1 checks the machine, or all machines together, before training; see pretrain/preflight
#
# One of many machines, each of which starts this script with the same arguments; cluster scripts beside this set:
#   NODES            machines; default 1             NODE_RANK    which one this is, from 0
#   MASTER_ADDR      address of machine 0, which the others reach; with a MASTER_PORT that is free there
#
# SIGTERM or SIGUSR1 to this script saves and ends with 75: start the same command again. 76: a rank was lost, also
# start it again. 65: the guard gave up, look at its evidence. pretrain/exits.py has all codes.
set -euo pipefail
trap 'exit 75' TERM USR1 # until there are ranks to ask

root=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/../..")
# shellcheck source=jobs/checks.sh
. "$root/jobs/checks.sh"
# shellcheck source=jobs/wait.sh
. "$root/jobs/wait.sh"

(($#)) || mistake "no arguments: say at least --recipe, --data NAME=DIR and --out DIR; see the head of $0"
: "${NODES:=1}"
hostfile=""
require_number NODES 1 "say how many machines start this script"
if ((NODES > 1)); then
  : "${NODE_RANK:?is not set and NODES=$NODES: say which of the machines this is, from 0 to $((NODES - 1))}"
  : "${MASTER_ADDR:?is not set and NODES=$NODES: say at which address the others reach machine 0}"
  : "${MASTER_PORT:?is not set and NODES=$NODES: say a port that is free on machine 0, the same on all}"
  require_number NODE_RANK 0 "say which of the machines this is, from 0 to $((NODES - 1))"
  ((NODE_RANK < NODES)) ||
    mistake "NODE_RANK=$NODE_RANK is not one of the $NODES machines: they count from 0 to $((NODES - 1))"
fi
[[ -z ${RANKS:-} ]] || require_number RANKS 1 "say how many processes this machine starts"
[[ -z ${MASTER_PORT:-} ]] || require_port MASTER_PORT
[[ -z ${OMP_NUM_THREADS:-} ]] || require_number OMP_NUM_THREADS 1 "say how many threads a process has"
require_switch PREFLIGHT
if [[ -n ${LOGS:-} ]]; then
  mkdir -p -- "$LOGS" 2>/dev/null || true
  [[ -d $LOGS && -w $LOGS ]] ||
    mistake "LOGS=$LOGS cannot be made or written: name a folder for what the ranks print, or leave it out"
fi

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

case " $* " in
  *" --help "* | *" -h "*) exec python "$root/pretrain/main.py" "$@" ;;
esac

# One start of Python answers what is wrong with the arguments, before torch is loaded, how many GPUs there are, and which
# port is free. Of several machines the preflight tells mistakes, with their names.
checked=("$@")
if ((NODES > 1)) && [[ ${PREFLIGHT:-0} == 1 ]]; then checked=(); fi
read -r gpus free_port < <(python - "$root" ${checked[@]+"${checked[@]}"} <<'PYTHON'
import os, socket, sys
root, *arguments = sys.argv[1:]
sys.path.insert(0, root)
if arguments:
    from pretrain.arguments import main
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code
    if code:
        sys.exit(print(code, "-"))
gpus = 0
if os.environ.get("DS_ACCELERATOR") != "cpu":
    import torch
    gpus = torch.cuda.device_count()
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    print(gpus, probe.getsockname()[1])
PYTHON
)
[[ $free_port != - ]] || exit "$gpus"

ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
if ((gpus == 0)); then
  export DS_ACCELERATOR=cpu
elif ((ranks > gpus)); then
  echo "RANKS=$ranks is more than the $gpus GPUs that are visible: lower it, or set DS_ACCELERATOR=cpu" >&2
  exit 1
fi

launcher=(--quiet --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-$free_port}")
if ((NODES > 1)); then
  # Every machine starts its own ranks: DeepSpeed needs no way into the others, only how many there are.
  hostfile=$(mktemp) slots=$ranks include=""
  # The launcher chooses GPUs by number and forgets those that are visible: it is told them. Of the other machines only
  # how many there are counts.
  if ((gpus > 0)) && [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    [[ $CUDA_VISIBLE_DEVICES =~ ^[0-9]+(,[0-9]+)*$ ]] ||
      mistake "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names GPUs otherwise than by number: of several machines the" \
        "launcher takes numbers alone, such as 4,5,6,7"
    visible=$(cut --delimiter=, --fields="-$ranks" <<<"$CUDA_VISIBLE_DEVICES")
    slots=$(($(tr , '\n' <<<"$visible" | sort --numeric-sort | tail -n 1) + 1))
    for ((node = 0; node < NODES; node++)); do include+=${include:+@}node$node:$visible; done
  fi
  for ((node = 0; node < NODES; node++)); do echo "node$node slots=$slots"; done >"$hostfile"
  launcher+=(--hostfile "$hostfile" --no_ssh --node_rank "$NODE_RANK" ${include:+--include "$include"})
else
  launcher+=(--hostfile /dev/null) # whatever a cluster left in the default hostfile
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
  if ((gpus == 0)); then
    launcher+=(--num_accelerators "$ranks")
  else
    # DeepSpeed takes what is visible, and would forget a choice of GPUs if it were given a number.
    visible=${CUDA_VISIBLE_DEVICES:-$(seq --separator=, 0 $((gpus - 1)))}
    CUDA_VISIBLE_DEVICES=$(cut --delimiter=, --fields="-$ranks" <<<"$visible")
    export CUDA_VISIBLE_DEVICES
  fi
fi

threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [[ -n ${LOGS:-} ]]; then
  launcher+=(--enable_each_rank_log "$LOGS")
fi

deepspeed=""
clean_up() {
  [[ -z $hostfile ]] || rm -f -- "$hostfile"
  ((asking == 0)) || kill -s KILL "$asking" 2>/dev/null || true
}
trap clean_up EXIT
children() {
  local pid list=
  for pid in "$@"; do
    list=$(cat "/proc/$pid/task/$pid/children" 2>/dev/null) && printf '%s ' "$list"
  done
}

# The ranks alone are asked to stop. The launcher, were it told, would give them 30 s and end the loader's workers first.
# They are asked every 5 s: a rank that still starts does not hear.
ask_ranks() {
  local ranks
  # shellcheck disable=SC2046 # words are wanted: process numbers
  ranks=$(children $(children "$deepspeed")) || true
  # shellcheck disable=SC2086
  kill -s USR1 $ranks 2>/dev/null || true
}
ask_always() {
  while kill -0 "$deepspeed" 2>/dev/null; do
    ask_ranks
    sleep 5
  done
}
# A signal may come while this handles another one, and bash must not expand a command in a trap then: it is done by a
# process that hears none of them.
stop() {
  if ((asked++ == 0)); then
    trap '' TERM USR1
    ask_always &
    asking=$!
    trap stop TERM USR1
  fi
}
interrupt() {
  kill -s INT -- "-$deepspeed" 2>/dev/null || true
}
asked=0 asking=0
trap interrupt INT

# A process group of its own, in which Ctrl-C still counts. A cluster sends SIGUSR1 to every process of a job: the
# launcher lets it pass, the ranks hear it.
start_and_wait() {
  local is_early=0
  trap 'is_early=1' TERM USR1 # until there is somebody to ask
  set -m
  (trap '' USR1; exec deepspeed "${launcher[@]}" "$@") &
  deepspeed=$!
  set +m
  trap stop TERM USR1
  if ((is_early)); then stop; fi
  wait_for_end "$deepspeed"
  # A cluster that ends a job sends SIGTERM to every process of it, `sleep` too: the launcher goes, the ranks still save.
  if ((asked)); then while kill -0 -- "-$deepspeed" 2>/dev/null; do sleep 0.2 || true; done; fi
  trap '' TERM USR1 # a signal at the very end would give its code in place of this one
  # More than 192 is what the launcher makes of a rank that a signal ended, 256 minus its number. Once the ranks are asked,
  # a launcher that was told, too, gives codes that mean nothing.
  case $code in
    0 | 65) ;;
    *) if ((asked)); then code=75; elif ((code > 192)); then code=76; fi ;;
  esac
}

if [[ ${PREFLIGHT:-0} == 1 ]]; then
  # The launcher finds a module on Python's path alone, and this script may be started in any folder.
  PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} start_and_wait --module pretrain.preflight "$@"
  ((code == 0)) || exit "$code"
  ((asked == 0)) || exit 75
  trap 'exit 75' TERM USR1
fi
start_and_wait "$root/pretrain/main.py" "$@"
exit "$code"
