# Which image runs the project? A small base, the packages of requirements.txt and the code: for GPUs, or a CPU alone.
#
#   docker build -t m3i --build-arg REVISION="$(git rev-parse HEAD)" .    for NVIDIA GPUs
#   docker build -t m3i:cpu --build-arg DEVICE=cpu --build-arg TORCH_INDEX=URL .       without anything of CUDA
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/workspace/runs" m3i pretrain --recipe ... --out runs/...
#   docker run --rm m3i                                                   lists the commands
#
# Arguments, beside those above:
#   BASE_IMAGE   what runs: Debian 12, Ubuntu 24.04 or newer, for python3 has to be 3.11 or 3.12
#   CUDA_IMAGE   what compiles for GPUs, of the same distribution as BASE_IMAGE; its CUDA is the one of torch. With
#                CUDA_IMAGE=$BASE_IMAGE, where no CUDA image can be had, what needs nvcc is left out
#   DS_OPS       operators of DeepSpeed that are compiled ahead: see jobs/image/compile_ops.sh
#   CUDA_ARCHS   compute capabilities that they are compiled for
#   TORCH_INDEX  index with CPU wheels of torch, for DEVICE=cpu, as PyTorch's page on installing names it
#   VERSION, CREATED, SOURCE   say what the labels of the image say: a tag, a date as in RFC 3339, a URL
ARG DEVICE=cuda
ARG BASE_IMAGE=ubuntu:24.04
ARG CUDA_IMAGE=nvidia/cuda:13.2.1-devel-ubuntu24.04

FROM ${CUDA_IMAGE} AS compilers-cuda
FROM ${BASE_IMAGE} AS compilers-cpu

# -- Builder: has compilers, leaves /opt/venv --
FROM compilers-${DEVICE} AS builder
ARG DEVICE
ARG TORCH_INDEX=
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ libaio-dev make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY requirements.txt Makefile /opt/install/
RUN PIP_NO_CACHE_DIR=1 make -C /opt/install venv VENV=/opt/venv DEVICE="$DEVICE" ${TORCH_INDEX:+TORCH_INDEX="$TORCH_INDEX"} \
    && /opt/venv/bin/python -m pip check
ARG DS_OPS="async_io pin_memory quantizer"
ARG CUDA_ARCHS="8.0;9.0;10.0+PTX"
COPY jobs/image/compile_ops.sh /opt/install/
RUN if [ "$DEVICE" = cuda ]; then CUDA_ARCHS="$CUDA_ARCHS" /opt/install/compile_ops.sh /opt/venv $DS_OPS; fi

# -- What runs: CUDA's libraries are in the packages of torch, the driver comes from the host --
FROM ${BASE_IMAGE}
ARG DEVICE
# Triton compiles its launchers for the GPU that it finds: gcc, libc's and Python's headers. NCCL looks for libibverbs
# and would go over TCP without a word. Nothing is compiled for a CPU. procps: the probes of Kubernetes. libaio: DeepSpeed's offloading to NVMe.
RUN apt-get update \
    && if [ "$DEVICE" = cuda ]; then for_gpu="gcc ibverbs-providers libaio-dev libc6-dev libibverbs1 libpython3-dev"; fi \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates make procps python3 tini ${for_gpu:-} \
    && apt-get clean && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 --user-group pretrain \
    && install --directory --owner=pretrain --group=pretrain /workspace /workspace/data /workspace/runs \
    && ln -s /workspace/jobs/image/m3i.sh /usr/local/bin/m3i

# Above the code: a changed line of code keeps this layer of some GB.
COPY --from=builder /opt/venv /opt/venv
RUN /opt/venv/bin/python -c "import deepspeed, torchvision" \
    || { echo "python3 of BASE_IMAGE does not fit that of CUDA_IMAGE: name images of one distribution" >&2; exit 1; }

USER 10001:10001
WORKDIR /workspace
COPY --chown=10001:10001 . .

ARG REVISION=unknown
ARG VERSION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
ENV PATH=/opt/venv/bin:$PATH \
    VENV=/opt/venv \
    DEVICE=${DEVICE} \
    M3I_COMMIT=${REVISION} \
    HF_HUB_OFFLINE=1 \
    TOKENIZERS_PARALLELISM=false \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
LABEL org.opencontainers.image.title="M3I pre-training" \
      org.opencontainers.image.description="Pre-training by maximising multi-modal mutual information, with DeepSpeed" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}"

# Healthy: the kernels of this device give what their reference gives. A first time on a GPU compiles them.
HEALTHCHECK --interval=30m --timeout=5m --start-period=5m CMD ["m3i", "kernels", "--quick"]

# tini reaps what ends and hands a signal to the command alone, which asks its ranks to save: give `docker stop` the
# time for that (--time 300).
ENTRYPOINT ["tini", "-s", "--", "m3i"]
