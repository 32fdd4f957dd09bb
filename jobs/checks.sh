#!/usr/bin/env bash
# Is what a user set a number, a port, a switch? Sourced. What is not ends the script with 2: value, rule, remedy. What is
# missing on this machine ends it with 1.

fail() {
  echo "$*" >&2
  exit 1
}

mistake() {
  echo "$*" >&2
  exit 2
}

# Each is of a variable by its name. Leading zeros would make bash read the number as octal.
require_number() { # NAME LEAST RULE
  if ! [[ ${!1} =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((${!1} < $2)); then mistake "$1=${!1} is no number from $2: $3"; fi
}

require_port() { # NAME
  if ! [[ ${!1} =~ ^[1-9][0-9]{0,4}$ ]] || ((${!1} > 65535)); then
    mistake "$1=${!1} is no port: give a number from 1 to 65535"
  fi
}

require_switch() { # NAME
  [[ ${!1:-0} == [01] ]] || mistake "$1=${!1} is neither 0 nor 1: set 1 for yes, or leave it out"
}

# Arguments that a script gives itself, from its variables, are not taken twice.
refuse_arguments() { # "--name VARIABLE" ... -- ARGUMENTS...
  local own=() pair argument
  while [[ $1 != -- ]]; do own+=("$1"); shift; done
  shift
  for argument in "$@"; do
    for pair in "${own[@]}"; do
      [[ ${argument%%=*} != "${pair% *}" ]] ||
        mistake "$argument is given, and ${pair#* } says the same: leave out ${pair% *} and set ${pair#* }"
    done
  done
}
