#!/usr/bin/env bash
# How does an Indexed Job build a data set? Each pod makes its share of the shards; the last one writes the manifest.
#
#   jobs/kubernetes/prepare.sh build|check
#
# prepare.yaml and run.yaml set the environment:
#   PREPARE_OUT           folder or s3://bucket/folder of the data set
#   and to build
#   PREPARE_SOURCE        one that `python -m data_prep build` knows, such as cc12m
#   PREPARE_ARGUMENTS     its options; may be empty
#   JOB_COMPLETION_INDEX  which share, by the Job        PARTS  how many, the number of completions
#   WORKERS               processes; default 2
set -euo pipefail
root=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/../..")
# shellcheck source=jobs/checks.sh
. "$root/jobs/checks.sh"
verb=${1:-}

: "${PREPARE_OUT:?is not set: name the folder of the data set in run.yaml}"
case $verb in
  check) exec python -m data_prep check "$PREPARE_OUT" ;;
  build) ;;
  *) mistake "\"$verb\" is neither build nor check: give one of them" ;;
esac

: "${PREPARE_SOURCE:?is not set: name a source in run.yaml, such as cc12m; python -m data_prep build --help lists them}"
: "${JOB_COMPLETION_INDEX:?is not set: start this in a Job with completionMode: Indexed, which gives each pod its number}"
: "${PARTS:?is not set: say how many pods share the work, the number of completions}"
require_number PARTS 1 "set that of completions"
require_number JOB_COMPLETION_INDEX 0 "the Job sets it"
((JOB_COMPLETION_INDEX < PARTS)) ||
  mistake "JOB_COMPLETION_INDEX=$JOB_COMPLETION_INDEX and PARTS=$PARTS: set completions and PARTS to one number"
: "${WORKERS:=2}"
require_number WORKERS 1 "say how many processes a pod builds with"
read -ra more <<<"${PREPARE_ARGUMENTS:-}"
exec python -m data_prep build "$PREPARE_SOURCE" --out "$PREPARE_OUT" ${more[@]+"${more[@]}"} \
  --part "$((JOB_COMPLETION_INDEX + 1))/$PARTS" --workers "$WORKERS"
