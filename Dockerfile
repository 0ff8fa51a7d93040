# Runs on CPUs and, with the NVIDIA container toolkit (docker run --gpus all), on GPUs: torch brings CUDA's libraries.
# The base: any Debian or Ubuntu with Python 3.10 or newer.
#   docker build -t palimpsest --build-arg BASE=debian:bookworm-slim .
#   docker run --rm --gpus all --shm-size 2g -v "$PWD/runs:/palimpsest/runs" -v "$PWD/data:/palimpsest/data" palimpsest
ARG BASE=debian:bookworm-slim
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# gcc and Python's headers: Triton compiles the launchers of its kernels when they are first used.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 palimpsest && install -d -o palimpsest -g palimpsest /palimpsest
USER 1000
WORKDIR /palimpsest
ENV PATH=/palimpsest/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# The dependencies first: they change seldom and take minutes.
COPY --chown=palimpsest:palimpsest pyproject.toml constraints.txt README.md ./
RUN python3 -m venv .venv && .venv/bin/pip install --no-cache-dir -c constraints.txt -e .
COPY --chown=palimpsest:palimpsest . .
RUN .venv/bin/pip install --no-cache-dir --no-deps -e . && mkdir -p runs data

# Reaps what a killed launcher leaves behind.
ENTRYPOINT ["tini", "--"]
CMD ["deepspeed", "launch/train.py", "--config", "digits.yaml"]
