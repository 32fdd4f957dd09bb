#!/usr/bin/env bash
# How do I pre-train on the machines of a hostfile? By `deepspeed --hostfile`, started here once, over ssh.
#
#   HOSTFILE=hosts jobs/hostfile/pretrain.sh --recipe m3i.internimage_h --data NAME=DIR ... --out DIR [--optim.lr ...]
#
# The arguments are those of pretrain/main.py. The environment says what belongs to the machines:
#   HOSTFILE     one line a host, as DeepSpeed reads them: `node1 slots=8`, a slot a rank; the first host leads
#   ENV          virtual environment, at the same path on every host, as the repository; default: its .venv
#   LAUNCHER     pdsh (default), or openmpi: mpirun starts the ranks, with MPI_ARGS if set
#   SSH_PORT     default: ssh's own configuration, which also names keys and users
#   MASTER_ADDR  address of the first host that the others reach; default: the first that `hostname -I` tells there
#   MASTER_PORT  a port that is free there; default: one that is found
#   LOGS         folder that gets one file a rank for what it prints; default: all on this script's output
#   PREFLIGHT    1 checks all machines together before training; see pretrain/preflight
#   FORWARD      names of more variables that the ranks get; they get NCCL_*, GLOO_*, UCX_*, AWS_*, WANDB_*, M3I_*,
#                PREFLIGHT_*, SHM_GIB, DS_ACCELERATOR and OMP_NUM_THREADS (default: cores / slots), by a file that only
#                its user can read
#
# Every host is asked first, all at once and for 30 s at most. SIGTERM, SIGUSR1 or SIGHUP to this script saves on all
# hosts and ends with 75; the other codes are those of jobs/local/pretrain.sh. When it ends, however it does, no rank is
# left on a host that answers.
set -euo pipefail
root=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/../..")
answer_seconds=30
# shellcheck source=jobs/checks.sh
. "$root/jobs/checks.sh"
# shellcheck source=jobs/wait.sh
. "$root/jobs/wait.sh"

if (($# == 0)); then
  echo "no arguments: say at least --recipe, --data NAME=DIR and --out DIR; see the head of $0" >&2
  exit 2
fi
: "${HOSTFILE:?is not set: name a file with a line for each host, such as \`node1 slots=8\`}"
[[ -f $HOSTFILE ]] || fail "HOSTFILE=$HOSTFILE is no file: write one with a line for each host, such as \`node1 slots=8\`"

hosts=() slots=()
while IFS= read -r line || [[ -n $line ]]; do
  [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
  [[ $line =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*(#.*)?$ ]] ||
    fail "HOSTFILE=$HOSTFILE has the line \"$line\": write NAME slots=RANKS, such as \`node1 slots=8\`"
  [[ " ${hosts[*]} " != *" ${BASH_REMATCH[1]} "* ]] ||
    fail "HOSTFILE=$HOSTFILE names ${BASH_REMATCH[1]} twice: give it one line with all its slots"
  hosts+=("${BASH_REMATCH[1]}") slots+=("${BASH_REMATCH[2]}")
done <"$HOSTFILE"
((${#hosts[@]})) || fail "HOSTFILE=$HOSTFILE names no host: write a line for each, such as \`node1 slots=8\`"

launcher=${LAUNCHER:-pdsh}
declare -A programs=([pdsh]=pdsh [openmpi]=mpirun)
[[ -v programs[$launcher] ]] || fail "LAUNCHER=$launcher is unknown: choose pdsh or openmpi"
command -v "${programs[$launcher]}" >/dev/null ||
  fail "LAUNCHER=$launcher needs ${programs[$launcher]}, which is not on PATH: install it here${LAUNCHER:+, or set LAUNCHER}"
for name in SSH_PORT MASTER_PORT; do
  [[ -z ${!name:-} ]] || require_port "$name"
done
require_switch PREFLIGHT

env_folder=${ENV:-$root/.venv}
[[ -x $env_folder/bin/deepspeed ]] ||
  fail "ENV=$env_folder holds no bin/deepspeed: run \`make venv VENV=$env_folder\` or name another folder"
env_folder=$(realpath --no-symlinks -- "$env_folder")
PATH=$env_folder/bin:$PATH

work=$(mktemp --directory)
id=$(od --address-radix=n --format=x8 --read-bytes=8 /dev/urandom | tr --delete ' ')
ssh_options=(-o BatchMode=yes -o ConnectTimeout=10 ${SSH_PORT:+-p "$SSH_PORT"})
host_script=$(printf %q "$root/jobs/hostfile/host.sh")
for index in "${!hosts[@]}"; do : >"$work/input.$index"; done

# on_hosts COMMAND: runs it on all of them at once; what they said is in $work/said.INDEX, who failed in `failed`.
on_hosts() {
  local index running=()
  failed=()
  for index in "${!hosts[@]}"; do
    timeout "$answer_seconds" ssh "${ssh_options[@]}" -- "${hosts[index]}" "$1" \
      <"$work/input.$index" >"$work/said.$index" 2>&1 &
    running+=($!)
  done
  for index in "${!hosts[@]}"; do
    wait "${running[index]}" || failed+=([index]="${hosts[index]} (code $?)")
  done
}
said() {
  local index
  for index in "${!hosts[@]}"; do sed "s|^|${hosts[index]}: |" "$work/said.$index" 2>/dev/null || true; done
}

# What the ranks are given, with the password of a store among it, must not be seen in a list of processes.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
forwarded=(HF_HUB_OFFLINE TOKENIZERS_PARALLELISM)
for name in ${FORWARD:-} SHM_GIB DS_ACCELERATOR OMP_NUM_THREADS $(compgen -e | grep -E '^(NCCL|GLOO|UCX|AWS|WANDB|M3I|PREFLIGHT)_'); do
  [[ -z ${!name+set} ]] || forwarded+=("$name")
done
for index in "${!hosts[@]}"; do
  {
    echo "cores=\$(nproc) && export OMP_NUM_THREADS=\$((cores > ${slots[index]} ? cores / ${slots[index]} : 1))"
    for name in "${forwarded[@]}"; do printf 'export %s=%q\n' "$name" "${!name}"; done
    echo "export M3I_LAUNCH=$id PATH=$(printf %q "$env_folder/bin"):\$PATH"
  } >"$work/input.$index"
done

asking=0 is_asked=0 deepspeed=""
clean_up() {
  local code=$? left
  trap '' INT TERM USR1 HUP
  ((asking == 0)) || kill -s KILL "$asking" 2>/dev/null || true
  on_hosts "$host_script end $id"
  ((${#failed[@]} == 0)) || echo "no answer from ${failed[*]} at the end: look there for processes of this run" >&2
  left=$(said | grep 'ranks that were left') && echo "$left" >&2
  [[ -z $deepspeed ]] || kill -s KILL -- "-$deepspeed" 2>/dev/null || true
  rm -rf -- "$work"
  ((code != 0)) || [[ -z $left ]] || exit 76 # a launcher that a signal ended says 0
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 75' TERM USR1 HUP

on_hosts "cd $(printf %q "$PWD") && exec $host_script check $id $(printf %q "$env_folder")"
if ((${#failed[@]})); then
  said | grep --invert-match --extended-regexp ': (free_port|address) ' >&2 || true
  unusable=${failed[*]}
  for index in "${!failed[@]}"; do unset "hosts[index]"; done # the others have something to remove
  fail "$HOSTFILE: $unusable cannot be used. A host must answer \`ssh HOST true\` within $answer_seconds s and without" \
    "a password (code 255, or 124 for no answer), and have $root, $env_folder and $PWD at the same paths (1, 126, 127)"
fi
for index in "${!hosts[@]}"; do : >"$work/input.$index"; done
told() { sed --quiet "s/^$1 //p" "$work/said.0"; }
master_addr=${MASTER_ADDR:-$(told address)} master_port=${MASTER_PORT:-$(told free_port)}
[[ -n $master_addr ]] || fail "${hosts[0]} tells no address by \`hostname -I\`: set MASTER_ADDR to one that the others reach"

settings=/tmp/m3i-$id.sh
options=(--quiet --hostfile "$HOSTFILE" --launcher "$launcher" --master_addr "$master_addr" --master_port "$master_port"
  --force_multi --no_ssh_check ${SSH_PORT:+--ssh_port "$SSH_PORT"})
mpi_options="--bind-to none --tag-output --mca odls_base_sigkill_timeout 30 -x MASTER_ADDR=$master_addr \
-x MASTER_PORT=$master_port --mca plm_rsh_args '${ssh_options[*]}' ${MPI_ARGS:-}"
if [[ $launcher == pdsh ]]; then
  options+=(--venv_script "$settings" ${LOGS:+--enable_each_rank_log "$LOGS"})
else
  options+=(--no_python --launcher_args "$mpi_options ${LOGS:+--output-filename "$LOGS"}")
fi
# Without a sign from a host for a minute ssh gives it up; else a host without power would be waited for for ever.
export PDSH_SSH_ARGS_APPEND="${ssh_options[*]:0:4} -o ServerAliveInterval=15 -o ServerAliveCountMax=4"

# The arguments pass two shells and pdsh, which replaces %h and the like; DeepSpeed quotes those with a space itself.
quoted=()
quote() {
  local argument
  quoted=()
  for argument in "$@"; do
    if [[ $launcher == pdsh ]]; then
      argument=${argument//%/%%}
      if [[ $argument == *" "* ]]; then
        argument=${argument//\\/\\\\} argument=${argument//\$/\\\$} argument=${argument//\`/\\\`}
      else
        argument=$(printf %q "$argument")
      fi
    fi
    quoted+=("$argument")
  done
}

ask() {
  if ((is_asked++ == 0)); then
    trap '' TERM USR1 HUP # of the process that asks
    while true; do
      on_hosts "$host_script ask $id"
      sleep 5 # a rank that still starts does not hear
    done &
    asking=$!
    trap ask TERM USR1 HUP
  fi
}
interrupt() {
  trap 'exit 130' INT # and again: no more waiting
  {
    on_hosts "$host_script ask $id INT"
    sleep "$answer_seconds"
    kill -s INT "$$"
  } &
  asking=$!
}

# What each host ended with is in pdsh's messages; its own code is the largest, under which an error would hide.
read_codes() {
  while IFS= read -r line; do
    printf '%s\n' "$line" >&2
    [[ ! $line =~ :\ ssh\ exited\ with\ exit\ code\ ([0-9]+)$ ]] || echo "${BASH_REMATCH[1]}" >>"$work/codes"
  done
}
judge() {
  local codes judged
  codes=" $code $(tr '\n' ' ' <"$work/codes")"
  for judged in 65 1 2 130; do
    [[ $codes != *" $judged "* ]] || { code=$judged && return; }
  done
  ((code < 77)) || code=76 # a rank that a signal ended, or a host that was lost
  ((code != 76 || is_asked == 0)) || code=75
}
start_and_wait() {
  : >"$work/codes"
  rm -f -- "$work/errors"
  mkfifo "$work/errors"
  (trap '' INT TERM USR1 HUP && read_codes) <"$work/errors" &
  local reader=$!
  set -m
  (trap '' USR1 HUP; exec deepspeed "${options[@]}" "$@") 2>"$work/errors" &
  deepspeed=$!
  set +m
  trap ask TERM USR1 HUP
  trap interrupt INT
  wait_for_end "$deepspeed"
  kill -s KILL -- "-$deepspeed" 2>/dev/null || true # a pdsh whose launcher was killed
  for _ in {1..50}; do
    kill -0 "$reader" 2>/dev/null || break # it has read to the end
    sleep 0.1
  done
  judge
}

start() {
  quote "$@"
  if [[ $launcher == openmpi ]]; then
    start_and_wait "$root/jobs/hostfile/host.sh" rank "$id" "${quoted[@]}"
  elif [[ $1 == -m ]]; then
    start_and_wait --module "${quoted[@]:1}"
  else
    start_and_wait "${quoted[@]}"
  fi
}
if [[ ${PREFLIGHT:-0} == 1 ]]; then
  start -m pretrain.preflight "$@"
  ((code == 0)) || exit "$code"
  ((is_asked == 0)) || exit 75
fi
start "$root/pretrain/main.py" "$@"
exit "$code"
