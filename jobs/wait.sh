#!/usr/bin/env bash
# How does a script wait for a process while it hears signals? Sourced. `wait` alone ends at each of them, and may give
# the signal's code for that of a process which ends at the same time.

# The code of a child of this shell in `code`, once it is gone.
wait_for_end() { # PROCESS
  code=0
  while kill -0 "$1" 2>/dev/null; do wait "$1" 2>/dev/null || true; done
  # shellcheck disable=SC2034 # of those who source this
  wait "$1" || code=$?
}
