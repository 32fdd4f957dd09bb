#!/usr/bin/env bash
# Do the ranks of this pod train? The probes of pretrain.yaml ask; 0 is yes, anything else no, with the reason.
#
#   probe.sh begun   all ranks have met and give signs of life                  startup
#   probe.sh steps   they have made a step since they started                   readiness, for those who look
#   probe.sh lives   a rank has given a sign since this was asked last          liveness
#
# Every rank writes OUT/ranks/rank_N.json every few seconds from a thread (pretrain/watchdog.py), also while it waits
# for another rank. That one hangs, the watchdog finds and ends the run with 76; a probe would only see that all wait.
# Without such signs for minutes the process was stopped, or the volume of OUT does not answer.
set -euo pipefail
: "${OUT:?is not set: name the folder of the run}"
asked=${1:-} kept=${PROBE_FOLDER:-/tmp}/m3i-probe

no() {
  echo "$*"
  exit 1
}

# The first rank of this run here, by its command line and what entry.sh was given.
first_rank() {
  local pid
  for pid in $(pgrep --full -- 'pretrain/main\.py --local_rank=0( |$)'); do
    if grep --quiet --null-data --line-regexp --fixed-strings --no-messages -- "OUT=$OUT" "/proc/$pid/environ"; then echo "$pid" && return; fi
  done
}

pid=$(first_rank)
[[ -n $pid ]] || no "no rank runs here"
rank=$(tr '\0' '\n' <"/proc/$pid/environ" | sed --quiet 's/^RANK=//p')
file=$OUT/ranks/rank_$(printf %05d "$rank").json
sign=$(cat -- "$file" 2>/dev/null) || no "rank $rank has given no sign in $file"
[[ $sign == *"\"process\": $pid,"* ]] || no "rank $rank has not met the others yet: $file is of an earlier start"
[[ $sign =~ \"step\":\ ([0-9]+) ]] || no "$file holds no sign: $sign"
step=${BASH_REMATCH[1]}

case $asked in
  begun) ;;
  steps)
    # The step with which this start began is the first that a probe has seen of it.
    first=$(cat -- "$kept-first" 2>/dev/null) || first=""
    if [[ $first != "$pid "* ]]; then
      echo "$pid $step" >"$kept-first"
      first="$pid $step"
    fi
    ((step > ${first#* })) || no "rank $rank has made no step since step $step"
    ;;
  lives)
    before=$(cat -- "$kept-sign" 2>/dev/null) || before=""
    echo "$sign" >"$kept-sign"
    [[ $sign != "$before" ]] || no "rank $rank has given no sign since the last probe: $sign"
    ;;
  *)
    echo "\"$asked\" is none of begun, steps, lives" >&2
    exit 2
    ;;
esac
