#!/usr/bin/env bash
# How does a command hear that it shall stop, and its workers not? Slurm signals every process of a step; this starts
# the command deaf to SIGUSR1, and tells it alone, by SIGTERM. Started by srun: `task.sh COMMAND ...`
set -euo pipefail

# shellcheck source=jobs/wait.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../wait.sh"

command="" is_asked=0
tell() {
  is_asked=1
  [[ -z $command ]] || kill -s TERM "$command" 2>/dev/null || true
}
trap tell USR1
(trap '' USR1; exec "$@") &
command=$!
((is_asked == 0)) || tell # it came before there was anybody to tell
wait_for_end "$command"
exit "$code"
