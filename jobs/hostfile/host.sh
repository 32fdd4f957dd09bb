#!/usr/bin/env bash
# What does jobs/hostfile/pretrain.sh do on each host? It calls this there by ssh; nobody else needs to.
#
#   host.sh check ID ENV        is the environment here? Keeps the ranks' variables (its input) in a file of this user
#                               alone and tells an address of this host and a free port
#   host.sh rank ID WHAT...     becomes a rank of Open MPI: `python WHAT...` with the variables that torch reads
#   host.sh ask ID [SIGNAL]     SIGUSR1 to the ranks here: save and end
#   host.sh end ID              removes the file and whatever process of this launch is left; says which ranks were
#
# ID names one launch. Every process of it has the ID in its environment, by which it is found, also as an orphan.
set -euo pipefail
verb=$1 id=$2
settings=/tmp/m3i-$id.sh

processes() {
  local file
  while IFS= read -r file; do
    file=${file#/proc/}
    printf '%s\n' "${file%/environ}"
  done < <(grep --files-with-matches --null-data --line-regexp --no-messages -- "M3I_LAUNCH=$id" /proc/[0-9]*/environ || true)
}

is_in_rank() { grep --quiet --null-data --no-messages '^RANK=' "/proc/$1/environ"; }

# A rank has a number, and was started by something that has none; what a rank starts has it too.
ranks() {
  local pid parent
  for pid in $(processes); do
    parent=$(sed --quiet 's/^PPid:\t//p' "/proc/$pid/status" 2>/dev/null) || continue
    if is_in_rank "$pid" && ! is_in_rank "$parent"; then echo "$pid"; fi
  done
}

case $verb in
  check)
    env_folder=$3
    if [[ ! -x $env_folder/bin/deepspeed ]]; then
      echo "ENV=$env_folder holds no bin/deepspeed here: \`make venv VENV=$env_folder\`, or share the folder" >&2
      exit 1
    fi
    if [[ ${SHELL:-} != */@(bash|zsh) ]]; then
      echo "the login shell is ${SHELL:-not known}, DeepSpeed's commands want bash: chsh --shell /bin/bash" >&2
      exit 1
    fi
    umask 077
    kept=$(mktemp "$settings.XXXXXX")
    cat >"$kept"
    mv --force -- "$kept" "$settings"
    "$env_folder/bin/python" - <<'PYTHON'
import socket
with socket.socket() as probe:
    probe.bind(("", 0))
    print("free_port", probe.getsockname()[1])
PYTHON
    echo "address $(hostname -I | cut --delimiter=' ' --fields=1)"
    ;;
  rank)
    # shellcheck source=/dev/null
    source "$settings"
    export RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK
    exec python -u "${@:3}"
    ;;
  ask)
    for pid in $(ranks); do kill -s "${3:-USR1}" "$pid" 2>/dev/null || true; done
    ;;
  end)
    rm -f -- "$settings"
    left=$(ranks | tr '\n' ' ')
    [[ -z $left ]] || echo "ended ranks that were left: process $left"
    for pid in $(processes); do kill -s KILL "$pid" 2>/dev/null || true; done
    ;;
  *)
    echo "$verb is none of check, rank, ask, end" >&2
    exit 2
    ;;
esac
