# Stands in for the nginx image of docker-compose.yml where no registry of images can be reached: Debian's nginx, as a number.
ARG BASE_IMAGE
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends nginx && rm -rf /var/lib/apt/lists/*
USER 101:101
