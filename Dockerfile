# finetune as a batch job: GPU by default, CPU with --build-arg FLAVOUR=cpu. How to build, run and prove it: docs/docker.md.
#
# torch's wheels carry CUDA, cuDNN and NCCL, so the base is plain Python; the host gives the driver alone.
# The digest is of the index of all platforms; this prints the newest: docker buildx imagetools inspect python:3.11-slim-bookworm
# Python 3.11 is what the tests run on, and what the locks are solved for.
ARG BASE=python:3.11-slim-bookworm@sha256:2333bd330d12de02514770b3585cad313644316047cdee24a7acfdece6de6efb
FROM ${BASE} AS base

# --- build: a virtual environment, copied whole into the image below ---------------------------------
FROM base AS build
ARG FLAVOUR=gpu
ARG TORCH_INDEX=
WORKDIR /build

# Refuse before a byte is downloaded.
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

# What others wrote, in a layer of its own: the sources below change often, this seldom. Every file is compared with
# its sha256, nothing is built from source, and nothing comes that is not in the lock (pip check asks for the rest).
COPY requirements requirements
RUN --mount=type=cache,target=/root/.cache/pip \
    set -eu; \
    pip install --require-hashes --no-deps --only-binary :all: --requirement "requirements/$FLAVOUR.lock"; \
    if [ "$FLAVOUR" = cpu ]; then \
      pip install --no-deps --only-binary :all: --index-url "$TORCH_INDEX" --requirement requirements/cpu-torch.txt; \
    fi; \
    python -c "import sys, torch; cuda = torch.version.cuda; print('CUDA of torch:', cuda); \
      sys.exit(None if bool(cuda) == ('$FLAVOUR' == 'gpu') else 'this torch does not fit FLAVOUR=$FLAVOUR')"

# The package itself, with the setuptools of the lock: no index is asked.
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

# Open to every uid, as /tmp is: whatever --user says, volumes made from these can be written.
RUN install -d -m 1777 -o 10001 -g 0 /data /runs /cache
COPY --from=build /opt/finetune /opt/finetune
COPY --chmod=0644 deploy/health.py /opt/finetune/health.py

# Whatever is kept from run to run is kept in /cache (docs/offline.md). CUBLAS_WORKSPACE_CONFIG lets cuBLAS repeat its sums.
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

# Group 0: platforms that choose the uid themselves keep that group.
USER 10001:0
# From here `--data data` is /data, and the default output runs/... is /runs/...
WORKDIR /
# All that is ever written to; the rest may be read-only.
VOLUME ["/data", "/runs", "/cache", "/tmp"]
STOPSIGNAL SIGTERM
# Silence is noticed after some four minutes; the job itself waits for ten before it starts again (--stall-timeout).
HEALTHCHECK --start-period=2m --interval=1m --timeout=45s --retries=3 CMD ["python", "-IS", "/opt/finetune/health.py"]
ENTRYPOINT ["finetune"]
CMD ["--help"]
