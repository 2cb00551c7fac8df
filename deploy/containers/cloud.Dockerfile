# A cell: gateway, key store and evaluators. Has Ray, and no torch.
#
#   docker build -f deploy/containers/cloud.Dockerfile -t blindtail-cloud:0.1.0 .
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
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/blindtail/bin/pip install -c constraints.txt "$(echo /opt/wheels/blindtail-*.whl)[cluster]" \
 && /opt/blindtail/bin/pip uninstall -y setuptools pip

FROM debian:12.11-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 tini \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 65532 blindtail \
 && useradd --uid 65532 --gid 65532 --home-dir /var/lib/blindtail --no-create-home --shell /usr/sbin/nologin blindtail \
 && install -d -o 65532 -g 65532 -m 0700 /var/lib/blindtail
COPY --from=build /opt/blindtail /opt/blindtail
LABEL org.opencontainers.image.title="blindtail-cloud" \
      org.opencontainers.image.description="blindtail: a cell that evaluates encrypted tails" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
# RAY_...: no usage reports; containers of 0.1 to 0.4 MB go along with the call.
ENV PATH=/opt/blindtail/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/lib/blindtail \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0 RAY_max_direct_call_object_size=2097152 \
    BLINDTAIL_TLS=/etc/blindtail/tls
USER 65532:65532
WORKDIR /var/lib/blindtail
VOLUME ["/var/lib/blindtail"]
# gRPC; metrics
EXPOSE 50051 9100
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=90s --retries=3 \
    CMD ["sh", "-c", "exec blindtail health localhost:50051 --ca $BLINDTAIL_TLS/ca.crt --certificate $BLINDTAIL_TLS/tls.crt --key $BLINDTAIL_TLS/tls.key"]
# tini reaps what Ray's processes leave and hands signals on.
ENTRYPOINT ["/usr/bin/tini", "--", "blindtail"]
CMD ["cloud", "--config", "/etc/blindtail/cell.toml"]
