# syntax=docker/dockerfile:1
# What trains and what samples, in one image: docs/containers.md says how to build and run it.
# The base is any Debian or Ubuntu with Python 3.10 or newer. torch brings CUDA's libraries itself, so it needs none; the
# default's share is its word to the container toolkit about the driver that CUDA 13 needs.
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

# --- what both stages have of the system's ---
FROM ${BASE} AS system
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# gcc, libc6-dev and python3-dev: Triton compiles the launchers of its kernels when they are first used.
# Versions are those of the base's release, which is what is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev python3 python3-dev \
    && rm -rf /var/lib/apt/lists/*

# --- what only installing needs ---
FROM system AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ make python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# --- the names of the dependencies: another rule of a linter in pyproject.toml must not install them anew ---
FROM build AS names
COPY pyproject.toml /tmp/
RUN python3 -c 'from pip._vendor import tomli; project = tomli.load(open("/tmp/pyproject.toml", "rb"))["project"]; print(*project["dependencies"], sep="\n")' > /tmp/dependencies.txt

# --- the dependencies: minutes and gigabytes ---
FROM build AS dependencies
COPY --from=names /tmp/dependencies.txt /tmp/
COPY constraints.txt /tmp/
# Secrets, both optional, stay out of the image: pip's settings, as a registry of your own, and its certificates, which
# these settings name as `cert = /run/secrets/ca`.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    pip install --no-cache-dir --disable-pip-version-check -c /tmp/constraints.txt -r /tmp/dependencies.txt \
    && echo /palimpsest > "$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/palimpsest.pth"

# --- what runs ---
FROM system AS runtime
# Ubuntu's images have a user of this id already, hence --non-unique.
RUN useradd --create-home --non-unique --uid 1000 palimpsest \
    && install -d -o 1000 -g 1000 /palimpsest /palimpsest/runs /palimpsest/data
COPY --from=dependencies /opt/venv /opt/venv
WORKDIR /palimpsest
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/palimpsest \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# The source last, and not the user's: what runs cannot change it.
COPY trainer trainer
COPY data_tools data_tools
COPY launch launch
COPY configs configs
USER 1000:1000

# In the first half hour data may be built and kernels compiled before anything is learnt.
HEALTHCHECK --interval=60s --timeout=30s --start-period=30m --retries=3 CMD ["python", "launch/health.py"]
# Passes signals on to the ranks, waits until all have saved, and says by its exit code whether the run is finished.
ENTRYPOINT ["python", "launch/container.py"]
CMD ["deepspeed", "launch/train.py", "--config", "digits.yaml"]
