# finetune as a batch job: GPU by default, CPU with --build-arg FLAVOUR=cpu. How to build, run and test it: docs/docker.md.
#
# torch's wheels contain CUDA, cuDNN and NCCL, so the base is plain Python; only the driver comes from the host.
# The digest is that of the multi-platform index; to see the newest: docker buildx imagetools inspect python:3.11-slim-bookworm
# The tests run on Python 3.11, and the locks are solved for it.
ARG BASE=python:3.11-slim-bookworm@sha256:2333bd330d12de02514770b3585cad313644316047cdee24a7acfdece6de6efb
FROM ${BASE} AS base

# --- build: a virtual environment, copied whole into the image below ---------------------------------
FROM base AS build
ARG FLAVOUR=gpu
ARG TORCH_INDEX=
WORKDIR /build

# Check the arguments before anything is downloaded.
RUN set -eu; \
    case "$FLAVOUR:${TORCH_INDEX:+named}" in \
      gpu:|cpu:named) ;; \
      gpu:named) echo "TORCH_INDEX: FLAVOUR=gpu takes the torch of requirements/gpu.lock. Drop it, or give FLAVOUR=cpu." >&2; exit 2 ;; \
      cpu:) echo "FLAVOUR=cpu: no index with CPU wheels was named. Give --build-arg TORCH_INDEX=<its url>." >&2; exit 2 ;; \
      *) echo "FLAVOUR=$FLAVOUR: there are two flavours. Give --build-arg FLAVOUR=gpu or FLAVOUR=cpu." >&2; exit 2 ;; \
    esac; \
    python -m venv /opt/finetune
ENV PATH=/opt/finetune/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# Third-party packages are a layer of their own, since they change less often than the sources below. Every file is
# compared with its sha256, nothing is built from source, and only what is in the lock is installed (pip check verifies
# that nothing is missing).
COPY requirements requirements
RUN --mount=type=cache,target=/root/.cache/pip \
    set -eu; \
    pip install --require-hashes --no-deps --only-binary :all: --requirement "requirements/$FLAVOUR.lock"; \
    if [ "$FLAVOUR" = cpu ]; then \
      pip install --no-deps --only-binary :all: --index-url "$TORCH_INDEX" --requirement requirements/cpu-torch.txt; \
    fi; \
    python -c "import sys, torch; cuda = torch.version.cuda; print('CUDA of torch:', cuda); \
      sys.exit(None if bool(cuda) == ('$FLAVOUR' == 'gpu') else 'this torch does not fit FLAVOUR=$FLAVOUR')"

# The package itself, built with the setuptools of the lock, without an index.
COPY pyproject.toml README.md LICENSE ./
COPY recipes recipes
COPY pretrained pretrained
COPY finetune finetune
RUN pip install --no-cache-dir --no-index --no-deps --no-build-isolation . && pip check

# --- run: no compiler, no sources, no network needed --------------------------------------------------
FROM base
LABEL org.opencontainers.image.title="finetune" \
      org.opencontainers.image.description="Transfer-learning fine-tuning for image classification" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

# Writable for every uid, as /tmp is, so that volumes made from these folders work with any --user.
RUN install -d -m 1777 -o 10001 -g 0 /data /runs /cache
COPY --from=build /opt/finetune /opt/finetune
COPY --chmod=0644 deploy/health.py /opt/finetune/health.py

# Everything that is kept between runs is in /cache (docs/offline.md). CUBLAS_WORKSPACE_CONFIG makes cuBLAS deterministic.
ENV PATH=/opt/finetune/bin:$PATH \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    TORCH_HOME=/cache/torch \
    MPLCONFIGDIR=/cache/matplotlib \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    CUBLAS_WORKSPACE_CONFIG=:4096:8 \
    PYTHONFAULTHANDLER=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

# Group 0, because platforms that choose the uid themselves use that group.
USER 10001:0
# From here `--data data` is /data, and the default output runs/... is /runs/...
WORKDIR /
# Only these are written to (/data is not); the rest may be read-only.
VOLUME ["/data", "/runs", "/cache", "/tmp"]
STOPSIGNAL SIGTERM
# A hang is shown after about four minutes; the supervisor restarts a hanging run after ten (--stall-timeout).
HEALTHCHECK --start-period=2m --interval=1m --timeout=45s --retries=3 CMD ["python", "-IS", "/opt/finetune/health.py"]
ENTRYPOINT ["finetune"]
CMD ["--help"]
