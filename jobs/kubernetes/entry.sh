#!/usr/bin/env bash
# Which of the machines of an Indexed Job is this pod, and are the others there? Then it trains with them.
#
#   jobs/kubernetes/entry.sh [more arguments of pretrain/main.py]
#
# pretrain.yaml and run.yaml set the environment:
#   JOB_COMPLETION_INDEX  which pod this is, by the Job        JOB_NAME  its Job, by the pod's labels
#   SERVICE               the headless Service that gives the pods names
#   NODES                 pods; the same number as completions and parallelism
#   RECIPE, DATA, OUT     as --recipe, --data ("NAME=DIR NAME=DIR ...") and --out
#   DS_CONFIG, CHECKPOINTS, ARGUMENTS   as --ds-config, --checkpoints and whatever else; may be empty
#   MASTER_PORT           default 29500                        WAIT_SECONDS  for other machines and older pods; 1800
#   RESTARTS              in a row without a new step, then the Job fails; default 10
#
# It ends as jobs/local/pretrain.sh does: 75 and 76 have the Job start the pod again, 1, 2 and 65 end the Job.
set -euo pipefail
root=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/../..")
trap 'exit 75' TERM USR1 # while it waits

# shellcheck source=jobs/checks.sh
. "$root/jobs/checks.sh"
# shellcheck source=jobs/restarts.sh
. "$root/jobs/restarts.sh"

: "${JOB_COMPLETION_INDEX:?is not set: start this in a Job with completionMode: Indexed, which gives each pod its number}"
: "${NODES:?is not set: say how many pods train together, the number of completions}"
: "${RECIPE:?is not set: name a recipe in run.yaml, such as m3i.internimage_h}"
: "${DATA:?is not set: name the sources of the recipe in run.yaml, NAME=DIR for each, a space between two}"
: "${OUT:?is not set: name the folder of the run in run.yaml, on a volume that all pods share}"
require_number NODES 1 "set that of completions"
require_number JOB_COMPLETION_INDEX 0 "the Job sets it"
if ((JOB_COMPLETION_INDEX >= NODES)); then
  mistake "JOB_COMPLETION_INDEX=$JOB_COMPLETION_INDEX and NODES=$NODES: set completions, parallelism and NODES to one number"
fi
: "${WAIT_SECONDS:=1800}" "${RESTARTS:=10}"
require_number RESTARTS 1 "say how many starts may be in vain"
require_number WAIT_SECONDS 0 "set seconds, such as 1800"
[[ -z ${MASTER_PORT:-} ]] || require_port MASTER_PORT

# Which of DATA and ARGUMENTS is one word is for spaces to say, as in a command.
read -ra data <<<"$DATA"
read -ra more <<<"${ARGUMENTS:-}"
given=(--recipe "$RECIPE" --data "${data[@]}" --out "$OUT" ${DS_CONFIG:+--ds-config "$DS_CONFIG"}
  ${CHECKPOINTS:+--checkpoints "$CHECKPOINTS"} ${more[@]+"${more[@]}"} "$@")

# wait_until WORDS COMMAND...: 76 when that takes longer than WAIT_SECONDS, since the pod should simply try again.
wait_until() {
  local words=$1 until=$((SECONDS + WAIT_SECONDS)) is_told=0
  shift
  until "$@"; do
    ((is_told)) || echo "machine $JOB_COMPLETION_INDEX waits until $words" >&2
    is_told=1
    if ((SECONDS >= until)); then
      echo "machine $JOB_COMPLETION_INDEX has waited $WAIT_SECONDS s (WAIT_SECONDS) until $words: see kubectl get pods" >&2
      exit 76
    fi
    sleep 1
  done
}

# A pod that is started again comes before the others have noticed that it was lost. It must not meet those, who wait
# for each other in the middle of a step, but those who will be started as well. Ranks that live give signs of life in
# OUT/ranks (pretrain/watchdog.py), and none before they have met: signs that change now are of ranks that must go.
signs() {
  cat -- "$OUT"/ranks/rank_*.json 2>/dev/null | grep --text '"ended": false' || true
}
older_are_gone() {
  local before
  before=$(signs)
  [[ -n $before ]] || return 0
  sleep "${QUIET_SECONDS:-20}" # of the largest runs a rank gives a sign every 8 s
  [[ $(signs) == "$before" ]]
}
has_address() { getent hosts "$MASTER_ADDR" >/dev/null; }

wait_until "the ranks of the start before have ended, which $OUT/ranks shows alive" older_are_gone
if ((JOB_COMPLETION_INDEX == 0)); then
  mkdir -p -- "$OUT" || mistake "OUT=$OUT cannot be made or written: name a folder on a volume that all pods share"
  gets_on "$OUT/kubernetes_restarts" "${JOB_NAME:-m3i}" || {
    echo "$((vain + 1)) starts came to no step beyond $most: not started again. Look at the logs, then delete the Job and" \
      "apply it again, which goes on from the newest checkpoint" >&2
    exit 1
  }
fi
export M3I_STARTS_COUNTED=1 # a bucket that fails at a start is waited for by the next ones (pretrain/resume.py)
if ((NODES > 1)); then
  : "${JOB_NAME:?is not set: name the Job, whose pod 0 the others look for}"
  : "${SERVICE:?is not set: name the headless Service, which gives the pods their names}"
  export NODES NODE_RANK=$JOB_COMPLETION_INDEX MASTER_ADDR=$JOB_NAME-0.$SERVICE MASTER_PORT=${MASTER_PORT:-29500}
  # Machines that still fetch the image or are still bought come later than those that pretrain/preflight waits for.
  export PREFLIGHT_CONNECT_SECONDS=${PREFLIGHT_CONNECT_SECONDS:-$((WAIT_SECONDS > 0 ? WAIT_SECONDS : 60))}
  wait_until "$MASTER_ADDR has an address: pod 0 is scheduled, and Service $SERVICE is there" has_address
fi
exec "$root/jobs/local/pretrain.sh" "${given[@]}"
