#!/usr/bin/env bash
# Write requirements/gpu.lock, cpu.lock and cpu-torch.txt, from which the image is built (docs/docker.md).
#
#   pip install uv && deploy/lock.sh              newest releases that pyproject.toml allows
#   deploy/lock.sh --upgrade-package timm         options of uv: keep the rest as it is
#
# uv uses its configured index (UV_DEFAULT_INDEX, UV_INDEX); the locks name none.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

solve() { # solve MACHINE LOCK [option of uv]... Wheels only: building a source distribution runs its code.
  local machine=$1 lock=$2
  shift 2
  uv pip compile pyproject.toml --extra serve --quiet --python-version 3.11 --python-platform "$machine-manylinux_2_28" \
    --only-binary :all: --generate-hashes --no-emit-index-url --output-file "$lock" \
    --custom-compile-command "deploy/lock.sh" "$@" > /dev/null
}

packages() { grep -oE '^[a-z0-9.-]+==[^ ]+' "$1"; }

if [ $# -eq 0 ]; then set -- --upgrade; fi
[ ! -f requirements/gpu.lock ] || cp requirements/gpu.lock "$work/gpu.lock"  # uv keeps the versions in it
solve x86_64 "$work/gpu.lock" "$@"
solve aarch64 "$work/aarch64.lock" --constraint <(packages "$work/gpu.lock")
if ! diff <(grep -v '^ *#' "$work/gpu.lock") <(grep -v '^ *#' "$work/aarch64.lock"); then
  echo "x86_64 and aarch64 need different packages: one lock does not serve both" >&2
  exit 1
fi

# The CPU flavour has the same packages, without torch and what only torch's CUDA needs.
awk '/^[a-z]/ { of_torch = /^(torch|torchvision|triton|cuda-[a-z-]+|nvidia-[a-z0-9-]+)==/ } !of_torch' \
  "$work/gpu.lock" > "$work/cpu.lock"
{
  echo "# torch for FLAVOUR=cpu, from the index that the build names (TORCH_INDEX). Written by deploy/lock.sh."
  echo "# Versions without hashes: each index has its own bytes. With --hash=sha256:... behind both, pip compares them."
  packages "$work/gpu.lock" | grep -E '^(torch|torchvision)=='
} > "$work/cpu-torch.txt"
mv "$work/gpu.lock" "$work/cpu.lock" "$work/cpu-torch.txt" requirements/
