# The service in a container: README, "In a container". `make image` builds it, `make image-test` tries it.
#
#   VARIANT=cpu      (default) torch without CUDA, from PyTorch's own index
#   VARIANT=cuda     torch with the CUDA libraries it needs; the machine brings the driver
#   VARIANT=mounted  no dependencies: whoever runs the image mounts an environment (what `make image-test` does)
#   COMPILER=gcc     a C++ compiler, for models compiled on CUDA; without one they stay on torch
#
# A tag may move. For a build that can be repeated, give the base with its digest:
#   --build-arg BASE_IMAGE=python:3.12.12-slim-bookworm@sha256:...
ARG BASE_IMAGE=python:3.12.12-slim-bookworm
ARG VARIANT=cpu

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN python3 -m venv --without-pip /opt/backbone
COPY pyproject.toml constraints.txt /build/
# Dependencies change less often than the service: they are a layer of their own.
RUN python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    > requirements.txt

FROM builder AS dependencies-cpu
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
# --no-deps: nothing but these two may come from the other index.
RUN python3 -m pip --python /opt/backbone/bin/python install --no-deps --index-url "${TORCH_INDEX_URL}" \
        -c constraints.txt torch torchvision \
    && python3 -m pip --python /opt/backbone/bin/python install -c constraints.txt -r requirements.txt

FROM builder AS dependencies-cuda
RUN python3 -m pip --python /opt/backbone/bin/python install -c constraints.txt -r requirements.txt

FROM builder AS dependencies-mounted

# hadolint ignore=DL3006
FROM dependencies-${VARIANT} AS installed
COPY README.md LICENSE /build/
COPY service /build/service
RUN python3 -m pip --python /opt/backbone/bin/python install --no-deps -c constraints.txt .

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS final
ARG COMPILER=none
# What installs software has no business in a running service.
# hadolint ignore=DL3008
RUN find /usr -depth -path '*python3*' \( -name ensurepip -o -path '*-packages/pip*' -o -path '*-packages/setuptools*' \
        -o -path '*-packages/wheel*' \) -exec rm -rf {} + \
    && rm -f /usr/bin/pip* /usr/local/bin/pip* \
    && if [ "${COMPILER}" = gcc ]; then \
        apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*; \
    fi
ARG VARIANT
ARG BUILD=source
LABEL org.opencontainers.image.title="backbone-service" \
      org.opencontainers.image.description="A REST service that turns images into the features of vision backbones" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${BUILD}" \
      org.opencontainers.image.variant="${VARIANT}"
# A number, so that Kubernetes can see that it is not root. Volumes start out with these folders' owner.
RUN groupadd --gid 10001 backbone \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin backbone \
    && install -d -o 10001 -g 10001 /var/lib/backbone/checkpoints /var/cache/backbone
COPY --from=installed /opt/backbone /opt/backbone
COPY model_configs /etc/backbone/model_configs
# Everything that is written goes to the two volumes or to /tmp; the root file system may be read-only.
ENV PATH=/opt/backbone/bin:${PATH} \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/tmp/huggingface \
    HF_HUB_OFFLINE=1 \
    TORCH_HOME=/tmp/torch \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/backbone/inductor \
    TRITON_CACHE_DIR=/var/cache/backbone/triton \
    BACKBONE_BUILD=${BUILD} \
    BACKBONE_HOST=0.0.0.0 \
    BACKBONE_CONFIG_DIR=/etc/backbone/model_configs \
    BACKBONE_CHECKPOINT_DIR=/var/lib/backbone/checkpoints \
    BACKBONE_ENGINE_CACHE=/var/cache/backbone/engines
WORKDIR /var/lib/backbone
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["backbone-service", "health"]
ENTRYPOINT ["backbone-service"]
CMD ["serve"]
