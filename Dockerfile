# A policy server in a container: docs/guides/servers.md#in-a-container-and-as-a-service.
#
#   docker build -t lightvla-serve .
#   docker build -t lightvla-serve --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 \
#       --build-arg PACKAGES="python3-venv python3-dev gcc" .
#
# The wheels of requirements.lock bring CUDA's libraries in either case. NVIDIA's base says to the container runtime that
# the driver is wanted, and gcc compiles the launchers of Triton's kernels.

ARG BASE=python:3.12-slim

FROM ${BASE} AS base
ARG PACKAGES=""
RUN if [ -n "$PACKAGES" ]; then \
        apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $PACKAGES \
        && rm -rf /var/lib/apt/lists/*; \
    fi

FROM base AS build
# Another index that wheels may come from, the smaller ones of torch for CPUs for example.
ARG EXTRA_INDEX=""
RUN python3 -m venv /opt/lightvla
WORKDIR /source
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY prismatic prismatic
COPY experiments experiments
COPY lightvla lightvla
RUN /opt/lightvla/bin/pip install --no-cache-dir ${EXTRA_INDEX:+--extra-index-url "$EXTRA_INDEX"} \
        -c requirements.lock '.[serve]'

FROM base
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin lightvla
COPY --from=build /opt/lightvla /opt/lightvla
ENV PATH=/opt/lightvla/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE
USER 10001
WORKDIR /home/lightvla
EXPOSE 8000
STOPSIGNAL SIGTERM
# Loading a 7B policy may take minutes; behind that, a server that cannot say OK three times is unhealthy.
HEALTHCHECK --start-period=600s --interval=30s --timeout=10s --retries=3 \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
# Reached from other machines, it needs a key: mount a file that user 10001 may read, and never pass it as a variable.
ENTRYPOINT ["lightvla", "serve", "--host", "0.0.0.0", "--port", "8000", "--api_key_file", "/run/secrets/lightvla_key"]
CMD ["--pretrained_checkpoint", "/checkpoint"]
