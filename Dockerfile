# finetune as a batch job: GPU by default, CPU with --build-arg FLAVOUR=cpu. How to build and run: docs/docker.md.
#
# torch's wheels carry CUDA, cuDNN and NCCL, so the base is plain Python; the host gives the driver alone.
# For a build that never changes, put the digest behind the tag, python:3.12-slim-bookworm@sha256:...; this prints it:
#   docker buildx imagetools inspect python:3.12-slim-bookworm
FROM python:3.12-slim-bookworm AS base

# --- build: a virtual environment, copied whole into the image below ---------------------------------
FROM base AS build
ARG FLAVOUR=gpu
ARG TORCH_INDEX=
WORKDIR /build

# Refuse before a byte is downloaded. On x86-64 a plain install of torch is the CUDA one.
RUN set -eu; \
    case "$FLAVOUR" in \
      gpu|cpu) ;; \
      *) echo "FLAVOUR=$FLAVOUR: there are two flavours. Give --build-arg FLAVOUR=gpu or FLAVOUR=cpu." >&2; exit 2 ;; \
    esac; \
    if [ "$FLAVOUR" = cpu ] && [ -z "$TORCH_INDEX" ] && [ "$(uname -m)" = x86_64 ]; then \
      echo "FLAVOUR=cpu: no index with CPU wheels was named. Give --build-arg TORCH_INDEX=<its url>." >&2; exit 2; \
    fi; \
    python -m venv /opt/finetune
ENV PATH=/opt/finetune/bin:$PATH

# torch first, in a layer of its own: the sources below change often, torch seldom.
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    set -eu; \
    python -c "import tomllib; wanted = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']; \
      print(*(item for item in wanted if item.startswith('torch')), sep='\n')" > torch.txt; \
    if [ -n "$TORCH_INDEX" ]; then export PIP_INDEX_URL=$TORCH_INDEX; fi; \
    pip install --requirement torch.txt

COPY README.md LICENSE ./
COPY recipes recipes
COPY pretrained pretrained
COPY finetune finetune
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install . && pip check && \
    python -c "import sys, torch; cuda = torch.version.cuda; print('CUDA of torch:', cuda); \
      sys.exit(None if bool(cuda) == ('$FLAVOUR' == 'gpu') else 'this torch does not fit FLAVOUR=$FLAVOUR')"

# --- run: no compiler, no sources, no network needed --------------------------------------------------
FROM base
LABEL org.opencontainers.image.title="finetune" \
      org.opencontainers.image.description="Transfer-learning fine-tuning for image classification" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

# uid 10001 with group 0: platforms that choose the uid themselves keep that group, hence g+w.
RUN install -d -m 0775 -o 10001 -g 0 /data /runs /cache /cache/huggingface /cache/torch
COPY --from=build /opt/finetune /opt/finetune

# Weights are looked for in /cache (docs/offline.md). CUBLAS_WORKSPACE_CONFIG lets cuBLAS repeat its sums.
ENV PATH=/opt/finetune/bin:$PATH \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    TORCH_HOME=/cache/torch \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    CUBLAS_WORKSPACE_CONFIG=:4096:8 \
    PYTHONFAULTHANDLER=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

USER 10001:0
# From here `--data data` is /data, and the default output runs/... is /runs/...
WORKDIR /
VOLUME ["/data", "/runs", "/cache"]
STOPSIGNAL SIGTERM
# A batch job answers with its exit code (docs/errors.md).
HEALTHCHECK NONE
ENTRYPOINT ["finetune"]
CMD ["--help"]
