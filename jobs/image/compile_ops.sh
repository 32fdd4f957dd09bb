#!/usr/bin/env bash
# Which operators of DeepSpeed need no compiler where the image runs? Those named here, compiled into an environment.
#
#   jobs/image/compile_ops.sh VENV [OPERATOR ...]
#
#   CUDA_ARCHS  compute capabilities, as "8.0;9.0+PTX"; wanted where nvcc is
#   MARCH       processor that they run on; default x86-64-v3 on x86-64, as DeepSpeed's own, that of the builder, would
#               end with an illegal instruction on an older one
#
# They are of machines with GPUs; a run on a CPU uses none. The configurations in ds_configs/ load none either: the
# optimizer is torch's own AdamW, also when it is offloaded. A ds config that pretrain/ds_config.py accepts can ask
# for async_io with pin_memory (offloading to NVMe), for quantizer (zero_quantized_weights, zero_quantized_gradients;
# needs nvcc), and the environment for pin_memory (DS_PIN_MEMORY_BACKEND=native).
set -euo pipefail
declare -A variable=([async_io]=DS_BUILD_AIO [pin_memory]=DS_BUILD_PIN_MEMORY [quantizer]=DS_BUILD_QUANTIZER)
needs_nvcc=" quantizer "

python=${1:?is missing: say which virtual environment to compile into}/bin/python
shift
[[ -x $python ]] || { echo "$python is not there: make it with \`make venv VENV=...\`" >&2; exit 1; }
export DS_ACCELERATOR=cuda # a builder has no GPU
nvcc=$(command -v nvcc || ls "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" 2>/dev/null || true)
if [[ -n $nvcc ]]; then
  export TORCH_CUDA_ARCH_LIST=${CUDA_ARCHS:?is not set: say for which compute capabilities, as 8.0;9.0+PTX}
fi

operators=()
for operator in "$@"; do
  if [[ -z ${variable[$operator]:-} ]]; then
    echo "$operator is no operator that a run could use: choose from ${!variable[*]}" >&2
    exit 2
  fi
  if [[ $needs_nvcc == *" $operator "* && -z $nvcc ]]; then
    echo "[ops] leaves $operator out: nvcc is not here"
    continue
  fi
  operators+=("$operator")
  export "${variable[$operator]}=1"
done
((${#operators[@]})) || { echo "[ops] nothing to compile"; exit 0; }

# DeepSpeed says -march=native and the widest vectors of this machine: compilers in front of the real ones say less.
work=$(mktemp --directory)
trap 'rm -rf -- "$work"' EXIT
if [[ $(uname -m) == x86_64 ]]; then
  for compiler in g++ c++ gcc cc; do
    real=$(command -v "$compiler") || continue
    cat >"$work/$compiler" <<WRAPPER
#!/usr/bin/env bash
arguments=("\${@/#-march=native/-march=${MARCH:-x86-64-v3}}")
exec $real "\${arguments[@]/#-D__AVX512__/-D__AVX256__}"
WRAPPER
    chmod +x "$work/$compiler"
  done
  export PATH=$work:$PATH
fi

version=$("$python" -c 'from importlib.metadata import version; print(version("deepspeed"))')
echo "[ops] compiles ${operators[*]} of DeepSpeed $version${nvcc:+ with $nvcc}: minutes"
# A driver is needed to run, not to compile: CUDA brings a stand-in for its library.
stubs=${nvcc:+$(dirname -- "$(dirname -- "$(realpath -- "$nvcc")")")/lib64/stubs}
if [[ -e $stubs/libcuda.so ]]; then ln -s "$stubs/libcuda.so" "$work/libcuda.so.1"; fi
# -laio: DeepSpeed forgets it where there is no CUDA. No debugging symbols: they are most of the files.
export LDFLAGS="-Wl,--no-as-needed -laio -Wl,--strip-debug ${nvcc:+-L$stubs}"
DS_ENABLE_NINJA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} PIP_NO_CACHE_DIR=1 "$python" -m pip install --quiet --no-input \
  --disable-pip-version-check --force-reinstall --no-deps --no-build-isolation --no-binary deepspeed "deepspeed==$version"

cd /
LD_LIBRARY_PATH=$work${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} "$python" - "${operators[@]}" <<'PYTHON'
import sys

from deepspeed.git_version_info import installed_ops
from deepspeed.ops.op_builder.all_ops import ALL_OPS

missing = [name for name in sys.argv[1:] if not installed_ops[name]]
if missing:
    sys.exit(f"[ops] {missing} were not compiled: run this with pip's --verbose in place of --quiet")
for name in sys.argv[1:]:
    print("[ops] loads", name, ALL_OPS[name].load().__file__)
PYTHON
