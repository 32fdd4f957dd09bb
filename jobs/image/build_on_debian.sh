#!/usr/bin/env bash
# How is the image built and tried without a registry? On a Debian base made here, with buildah.
#
#   sudo jobs/image/build_on_debian.sh [WORD ...]     builds, then runs WORD ... in it as non-root, as `docker run m3i`
#                                                     would (default: kernels --quick)
#
# Needs root, debootstrap, buildah (apt-get install debootstrap buildah), 25 GB of free disk, and a Debian mirror
# and a Python package index that can be reached. Where those are reached through files of this machine (a pip
# configuration, certificates, an apt proxy), name them: they are mounted read-only while the image is built, and
# are not part of it.
#
#   MOUNTS   PATH or PATH:PATH_INSIDE, several separated by blanks
#   MIRROR   of Debian; default: debootstrap's own
#   SUITE    default bookworm (python3 is 3.11)       IMAGE   name of the result, default m3i:debian
#   STORE    folder for images, emptied at the end    KEEP    1 leaves the image there
#   REUSE    1 builds nothing and takes the image that an earlier call with KEEP=1 left in STORE
#   DEVICE, DS_OPS, TORCH_INDEX, VERSION, SOURCE      arguments of the Dockerfile; there is no nvcc here, so that
#                                                     operators of DeepSpeed that need it are left out
#   FACTS    file that gets sizes, labels, seconds and the user id, as JSON; see benchmarks/image.py
set -euo pipefail
root=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/../..")
suite=${SUITE:-bookworm} image=${IMAGE:-m3i:debian}

((EUID == 0)) || { echo "user id is $EUID and debootstrap needs root: run it with sudo" >&2; exit 1; }
for tool in debootstrap buildah; do
  command -v "$tool" >/dev/null || { echo "$tool is missing: apt-get install debootstrap buildah" >&2; exit 1; }
done
store=${STORE:-$(mktemp --directory --tmpdir="${TMPDIR:-/var/tmp}" image.XXXXXX)}
mkdir -p "$store"
[[ -e $store/.image-store || -z $(ls -A "$store") ]] ||
  { echo "STORE=$store holds other files, and what is made there is removed at the end: name an empty folder" >&2; exit 1; }
free_gb=$(($(df --output=avail -k "$store" | tail -n 1) / 1024 / 1024))
((free_gb >= 25)) || { echo "$store has $free_gb GB free and the build needs 25: set STORE to a larger disk" >&2; exit 1; }

with_store=(buildah --root "$store/images" --runroot "$store/run")
clean_up() {
  [[ ${KEEP:-0} == 1 ]] && { echo "kept: ${with_store[*]} images"; return; }
  "${with_store[@]}" rm --all >/dev/null 2>&1 || true
  "${with_store[@]}" rmi --all --force >/dev/null 2>&1 || true
  umount "$store/images/overlay" 2>/dev/null || true
  rm -rf -- "$store"/{images,run,debian,debootstrap.log,seconds,inspected.json,.image-store} # all that is made there, no more
  rmdir --ignore-fail-on-non-empty "$store"
}

volumes=()
for mount in ${MOUNTS:-}; do
  [[ -e ${mount%%:*} ]] || { echo "MOUNTS names ${mount%%:*}, which is not there: correct or remove it" >&2; exit 1; }
  volumes+=(--volume "${mount%%:*}:${mount#*:}:ro")
done
touch "$store/.image-store"
trap clean_up EXIT

build() {
  echo "[image 1/3] makes a minimal Debian $suite${MIRROR:+ from $MIRROR}"
  debootstrap --variant=minbase "$suite" "$store/debian" ${MIRROR:+"$MIRROR"} >"$store/debootstrap.log" ||
    { tail -n 20 "$store/debootstrap.log" >&2; exit 1; }
  rm -rf -- "$store"/debian/var/cache/apt/*.bin "$store"/debian/var/cache/apt/archives/*.deb "$store"/debian/var/lib/apt/lists/*
  local base base_seconds arguments name
  base=$("${with_store[@]}" from scratch)
  "${with_store[@]}" add --quiet "$base" "$store/debian" / >/dev/null
  "${with_store[@]}" commit --quiet --rm "$base" "debian-base:$suite" >/dev/null
  rm -rf -- "$store/debian"
  base_seconds=$SECONDS

  echo "[image 2/3] builds $image from Dockerfile"
  arguments=(
    BASE_IMAGE="localhost/debian-base:$suite" CUDA_IMAGE="localhost/debian-base:$suite"
    REVISION="$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)" CREATED="$(date --utc +%Y-%m-%dT%H:%M:%SZ)"
  )
  for name in DEVICE DS_OPS TORCH_INDEX VERSION SOURCE; do
    [[ -z ${!name+set} ]] || arguments+=("$name=${!name}")
  done
  # Before 1.29 buildah would skip stages that a FROM names by an argument.
  "${with_store[@]}" bud --skip-unused-stages=false --isolation chroot --format docker --pull-never --layers \
    --tag "$image" "${volumes[@]}" "${arguments[@]/#/--build-arg=}" "$root"
  echo "$base_seconds $((SECONDS - base_seconds))" >"$store/seconds"
}
if [[ ${REUSE:-0} != 1 ]]; then
  build
elif [[ ! -f $store/seconds ]]; then
  echo "REUSE=1 and STORE=$store holds no image: build one with KEEP=1 and the same STORE first" >&2
  exit 1
fi

if (($# == 0)); then set -- kernels --quick; fi
container=$("${with_store[@]}" from --pull-never "localhost/$image")
inside=("${with_store[@]}" run --isolation chroot "$container" --)
if [[ -n ${FACTS:-} ]]; then
  "${with_store[@]}" inspect --type image "localhost/$image" >"$store/inspected.json"
  user_id=$("${inside[@]}" id -u)
  operators=$("${inside[@]}" python -c 'from deepspeed.git_version_info import installed_ops as ops
print(*[name for name in ops if ops[name]])' | tail -n 1) # after what DeepSpeed says of the device
  read -r base_seconds build_seconds <"$store/seconds"
  python3 - "$store/inspected.json" "$FACTS" <<PYTHON
import json, sys
inspected = json.load(open(sys.argv[1]))
layers = json.loads(inspected["Manifest"])["layers"]
# Layers come oldest first, as the instructions that made any do in the history.
history = [step["created_by"] for step in inspected["Docker"]["history"] if not step.get("empty_layer")]
json.dump({
    "layers": [
        {"bytes": layer["size"], "by": " ".join(step.removeprefix("/bin/sh -c #(nop) ").split())[:160]}
        for layer, step in zip(layers, history, strict=True)
    ],
    "image_bytes": sum(layer["size"] for layer in layers),
    "labels": inspected["Docker"]["config"]["Labels"],
    "seconds": {"base": $base_seconds, "build": $build_seconds},
    "operators_compiled_ahead": "$operators".split(),
    "user_id": $user_id,
}, open(sys.argv[2], "w"))
PYTHON
fi

echo "[image 3/3] runs $* in it"
"${inside[@]}" tini -s -- m3i "$@"
