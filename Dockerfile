# Which image runs the project? A Debian or Ubuntu base, requirements.txt in /opt/venv, the code.
#
#   docker build -t m3i .                                                  for NVIDIA GPUs
#   docker build -t m3i --build-arg BASE_IMAGE=debian:12 .                 without CUDA's own compiler
#   docker run --rm --gpus all --ipc=host -v "$PWD/out:/workspace/runs" m3i make demo
#
# The base must be Debian 12, Ubuntu 24.04 or newer: python3 has to be 3.11 or 3.12. The CUDA version of the
# default fits the torch of requirements.txt (same major version); nvcc and g++ are there for
# what is compiled at run time on GPUs: Triton's launchers, DeepSpeed's operators. The CPU path compiles nothing.
ARG BASE_IMAGE=nvidia/cuda:13.2.1-devel-ubuntu24.04
FROM ${BASE_IMAGE}

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ make python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

# Above the code: a changed line of code keeps this layer of some 6 GB.
ENV VENV=/opt/venv
COPY requirements.txt Makefile /opt/install/
RUN PIP_NO_CACHE_DIR=1 make -C /opt/install venv VENV="$VENV" \
    && "$VENV/bin/python" -m pip check \
    && rm -r /opt/install

RUN useradd --create-home --uid 10001 pretrain \
    && mkdir /workspace && chown pretrain:pretrain /workspace
USER pretrain
WORKDIR /workspace
COPY --chown=pretrain:pretrain . .

ENV PATH=/opt/venv/bin:$PATH \
    HF_HUB_OFFLINE=1 \
    TOKENIZERS_PARALLELISM=false \
    PYTHONUNBUFFERED=1

ARG REVISION=unknown
LABEL org.opencontainers.image.title="M3I pre-training" \
      org.opencontainers.image.description="Pre-training by maximising multi-modal mutual information, with DeepSpeed" \
      org.opencontainers.image.revision="${REVISION}"

# Healthy: the code imports and the device that torch sees answers.
HEALTHCHECK --interval=10m --timeout=2m --start-period=1m \
    CMD python -c "import pretrain.config, torch; torch.ones(1, device='cuda' if torch.cuda.is_available() else 'cpu').item()"

# tini forwards signals and reaps what ends: a job that is asked to stop leaves no process behind, and the next start
# goes on from its newest checkpoint. Any command may follow.
ENTRYPOINT ["tini", "-s", "--"]
CMD ["make", "help"]
