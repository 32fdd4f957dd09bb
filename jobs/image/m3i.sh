#!/usr/bin/env bash
# What does the image make of a word? A command of the project runs it; any other program runs as it is.
#
#   m3i                        lists the commands
#   m3i prepare ARGUMENTS      python -m data_prep
#   m3i pretrain ARGUMENTS     jobs/local/pretrain.sh: all GPUs of the machine, through the deepspeed launcher
#   m3i COMMAND ARGUMENTS      python -m pretrain.COMMAND: evaluate, export, plan, ...
#   m3i PROGRAM ARGUMENTS      PROGRAM, as `make demo` or `bash`
#
# It works from any folder: Apptainer and Pyxis keep the caller's, and paths in ARGUMENTS count from there.
set -euo pipefail
root=$(realpath -- "$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")/../..")

# Modules of the project that do something when they are run; main.py is what `pretrain` starts.
commands() {
  local file
  for file in "$root"/pretrain/*/__main__.py; do file=${file%/__main__.py} && echo "${file##*/}"; done
  grep -l '^if __name__ == "__main__":' "$root"/pretrain/*.py | while read -r file; do
    [[ $file == */main.py ]] || basename -- "$file" .py
  done
}

# Whoever runs it may be nobody of this image, with a home that is not there: caches of compiled kernels need one.
if [[ ! -w ${HOME:-/} ]]; then HOME=$(mktemp --directory) && export HOME; fi
export USER=${USER:-$(id -u)} PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

if (($# == 0)); then
  echo "commands: prepare pretrain $(commands | sort | tr '\n' ' ')"
  echo "each with --help; any other word is a program: make demo, bash, python"
  exit
fi
word=$1
shift
case $word in
  prepare) exec python -m data_prep "$@" ;;
  pretrain) exec "$root/jobs/local/pretrain.sh" "$@" ;;
esac
# Not `grep -q`, which would leave before `commands` has said all, and that fails then.
if commands | grep -xF -- "$word" >/dev/null; then exec python -m "pretrain.$word" "$@"; fi
if ! command -v -- "$word" >/dev/null; then
  echo "$word is no program and no command: choose from prepare pretrain $(commands | sort | tr '\n' ' ')" >&2
  exit 127
fi
exec "$word" "$@"
