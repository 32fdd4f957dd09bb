#!/usr/bin/env bash
# Does a run get on from start to start? Sourced. OUT remembers, since the starts may be on other machines.

# The step that the first rank came to, by its sign of life (pretrain/watchdog.py).
step_reached() {
  local step=""
  step=$(sed -nE 's/.*"step": ([0-9]+).*/\1/p' "$OUT/ranks/rank_00000.json" 2>/dev/null) || true
  echo "${step:-0}"
}

# Counts a start of JOB in the file RECORD. False when RESTARTS starts in a row came to no step beyond `most`, which is
# then forgotten: who has looked at it and starts it again begins to count anew. The starts in vain are in `vain`.
gets_on() { # RECORD JOB
  local job="" step
  most=-1 vain=0
  [[ ! -f $1 ]] || read -r job most vain <"$1"
  [[ $job == "$2" ]] || most=-1 vain=0
  step=$(step_reached)
  if ((step > most)); then most=$step vain=0; else vain=$((vain + 1)); fi
  if ((vain >= RESTARTS)); then
    rm -f -- "$1"
    return 1
  fi
  echo "$2 $most $vain" >"$1.tmp"
  mv -- "$1.tmp" "$1"
}
