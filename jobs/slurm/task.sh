#!/usr/bin/env bash
# How does a command hear that it shall stop, and its workers not? Slurm signals every process of a step; this starts
# the command deaf to SIGUSR1, and tells it alone, by SIGTERM. Started by srun: `task.sh COMMAND ...`
set -euo pipefail

is_interrupted=0 command=""
tell() {
  is_interrupted=1
  [[ -z $command ]] || kill -s TERM "$command" 2>/dev/null || true
}
trap tell USR1
(trap '' USR1; exec "$@") &
command=$!
while true; do
  is_interrupted=0 code=0
  wait "$command" || code=$?
  ((is_interrupted)) || break
done
exit "$code"
