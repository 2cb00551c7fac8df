# A device or an edge site. Without torch; EXTRAS=cluster adds Ray, which a site (`blindtail edge`) runs on.
#
#   docker build -f deploy/containers/edge.Dockerfile -t blindtail-edge:0.1.0 .
#
# Two stages: the first makes a wheel of this source tree, native code included, and installs it from the
# constraints into a virtual environment; the second copies that environment. No compiler, no build tool, no
# pip and no source tree is in the final image, and what was compiled asks the processor at run time what it
# can do. For a registry of your own, append the digest that you have checked: debian:12.11-slim@sha256:...

FROM debian:12.11-slim AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates g++ libpython3-dev python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY native native
COPY blindtail blindtail
COPY edge edge
COPY cloud cloud
COPY orchestrator orchestrator
# BLINDTAIL_NATIVE: without it, code that does not compile would be left out instead of ending the build.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/tools \
 && /opt/tools/bin/pip install -c constraints.txt cmake nanobind ninja scikit-build-core \
 && BLINDTAIL_NATIVE=required /opt/tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /opt/wheels .
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/blindtail \
 && /opt/blindtail/bin/pip install -c constraints.txt /opt/wheels/blindtail-*.whl
# What only this image needs: the layer above is the same for all three.
ARG EXTRAS=""
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ -n "$EXTRAS" ]; then \
        /opt/blindtail/bin/pip install -c constraints.txt "$(echo /opt/wheels/blindtail-*.whl)[$EXTRAS]"; \
    fi \
 && /opt/blindtail/bin/pip uninstall -y setuptools pip

FROM debian:12.11-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 tini \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 65532 blindtail \
 && useradd --uid 65532 --gid 65532 --home-dir /var/lib/blindtail --no-create-home --shell /usr/sbin/nologin blindtail \
 && install -d -o 65532 -g 65532 -m 0700 /var/lib/blindtail
COPY --from=build /opt/blindtail /opt/blindtail
LABEL org.opencontainers.image.title="blindtail-edge" \
      org.opencontainers.image.description="blindtail: heads and early exits in the clear, tails encrypted" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
ENV PATH=/opt/blindtail/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/lib/blindtail \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 65532:65532
WORKDIR /var/lib/blindtail
VOLUME ["/var/lib/blindtail"]
# metrics; an edge listens on nothing else
EXPOSE 9200
STOPSIGNAL SIGTERM
# An edge dials and is never dialled: that its metrics can be had is all a probe can ask.
HEALTHCHECK --interval=15s --timeout=5s --start-period=90s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9200/metrics', timeout=4).close()"]
ENTRYPOINT ["/usr/bin/tini", "--", "blindtail"]
CMD ["edge", "--help"]
