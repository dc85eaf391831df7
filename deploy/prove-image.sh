#!/usr/bin/env bash
# Build the image for real and run jobs in it, on a machine without a Docker engine (docs/docker.md).
#
#   apt-get install --no-install-recommends buildah podman crun catatonit debootstrap     Debian 12, root
#   deploy/prove-image.sh /var/tmp/proof [option of buildah build]...
#
# buildah builds the Dockerfile (chroot isolation) on a base image that debootstrap makes; podman and crun run it.
# The folder takes 25 GB, and is removed at the end. With KEEP=1 it stays, and the next time only the runs are repeated.
set -euo pipefail

folder=${1:?a folder for images, layers and logs}
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PROVE_INSIDE:-}" ]; then
  if [ ! -f "$folder/.proof" ]; then # marks a folder of this script, which is removed with its contents
    mkdir "$folder"
    touch "$folder/.proof"
  fi
  # Mounts of our own, which end with this script.
  PROVE_INSIDE=1 exec unshare --mount --propagation private "$0" "$(realpath "$folder")" "${@:2}"
fi
# crun 1.8 does not run with both versions of cgroups mounted; one is unmounted, for this script only.
if mountpoint --quiet /sys/fs/cgroup/unified; then umount --lazy /sys/fs/cgroup/unified; fi

export TMPDIR=$folder/tmp
mkdir -p "$TMPDIR" "$folder/store" "$folder/state"
storage=(--root "$folder/store" --runroot "$folder/state" --storage-driver overlay)
podman() { command podman "${storage[@]}" --runtime crun "$@"; }
image=localhost/finetune-proof
clean() {
  podman rm --all --force > /dev/null
  buildah "${storage[@]}" rm --all > /dev/null # left by a failed build
  if [ -n "${KEEP:-}" ]; then return; fi
  cd / && umount --quiet --lazy "$folder/store/overlay" || true
  rm -rf "$folder"
}
trap clean EXIT

# --- base and build ---------------------------------------------------------------------------------

make_base() {
  local mirror
  # shellcheck disable=SC2016
  mirror=$(apt-get indextargets --format '$(SITE)' 'Codename: bookworm' | head -n 1)
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$folder/base" "$mirror"
  ln -s python3 "$folder/base/usr/bin/python" # as in the official image
  tar -C "$folder/base" --exclude='./var/cache/apt/*' --exclude='./var/lib/apt/lists/*' -c . | podman import - localhost/proof-base
  rm -r "$folder/base"
}

build() {
  local given=()
  for path in /etc/pip.conf /etc/ssl/certs; do # pip's configuration on this machine
    if [ -e "$path" ]; then given+=(--volume "$path:$path:ro"); fi
  done
  buildah "${storage[@]}" build --isolation chroot --format docker --build-arg BASE=localhost/proof-base \
    "${given[@]}" "$@" --tag "$image" "$root"
}

# --- runs in the image ------------------------------------------------------------------------------

# As strict as it gets: no network, nothing writable but the volumes, no privileges. Health is asked below; podman would
# have systemd ask.
strict=(--no-healthcheck --network none --read-only --read-only-tmpfs=false --cap-drop all --security-opt no-new-privileges
  --cgroups disabled --ulimit nofile=4096:4096 --ulimit nproc=4096:4096)
job=(run --data sample:digits --strategy freeze --batch-size 16 --device cpu)

fail() {
  echo "FAILED: $*" >&2
  exit 1
}

expect() { # expect CODE WHAT COMMAND...
  local wanted=$1 what=$2 code=0 start=$SECONDS
  shift 2
  "$@" > "$folder/stdout" 2> "$folder/stderr" || code=$?
  if [ "$code" != "$wanted" ] || grep -q Traceback "$folder/stderr"; then
    cat "$folder/stdout" "$folder/stderr" >&2
    fail "$what: exit $code, expected $wanted"
  fi
  printf 'ok  %-72s exit %s, %s s\n' "$what" "$code" $((SECONDS - start))
  grep -iE '^warning|warn(ing)?:' "$folder/stderr" | sed 's/^/      /' || true
}

one_shot() { podman run --rm "${strict[@]}" "$@"; }

check_start() {
  podman images --format 'size of the image: {{.Size}}' "$image"
  podman run --rm --entrypoint du "${strict[@]}" "$image" -sh /opt/finetune
  expect 0 "finetune --version" one_shot "$image" --version
  expect 0 "no words: the help" one_shot "$image"
  expect 0 "pip check" one_shot --entrypoint python "$image" -m pip check
  expect 2 "an option that does not exist is refused" one_shot "$image" run --nonsense
  expect 65 "a folder without images is refused" one_shot "$image" run --data /data --output /runs/none
  expect 78 "a GPU that is not there is refused" one_shot "$image" "${job[@]}" --device cuda --output /runs/x
}

check_job() { # check_job WHO UID:GID GROUP... : a whole run, in folders that this user owns
  local who=$1 user=$2
  local runs=$folder/runs-${user/:/-}
  shift 2
  install -d -o "${user%:*}" -g "${user#*:}" "$runs" "$runs-cache"
  expect 0 "a whole run as $who" podman run --name "job-${user/:/-}" "${strict[@]}" --user "$user" "$@" \
    --volume "$runs:/runs" --volume "$runs-cache:/cache" "$image" "${job[@]}" --epochs 1 --output /runs/x
  grep -E '"(state|exit_code|step)"' "$runs/x/outcome.json" | sed 's/^/      /'
  grep -q '"state": "done"' "$runs/x/outcome.json" || fail "outcome.json"
  [ -z "$(find "$runs" ! -user "${user%:*}")" ] || fail "files of another owner"
  # What podman itself makes for its mounts is not the job's.
  podman diff "job-${user/:/-}" | grep -vE '^[AC] /(etc|run|dev|proc|sys|data|runs|cache|tmp)(/|$)' \
    && fail "written outside of the volumes"
  echo "      left in /cache: $(cd "$runs-cache" && find . -mindepth 1 -maxdepth 2 | sort | xargs)"
  expect 0 "the same command again does nothing" one_shot --user "$user" --volume "$runs:/runs" "$image" \
    "${job[@]}" --epochs 1 --output /runs/x
  podman rm --volumes "job-${user/:/-}" > /dev/null
}

check_stop() { # check_stop [option of podman run]: SIGTERM, health, and going on
  local runs=$folder/stopped code
  rm -rf "$runs" && install -d -o 10001 -g 0 "$runs"
  local long=("$image" "${job[@]}" --epochs 40 --output /runs/x)
  podman run --detach --name long "${strict[@]}" "$@" --volume "$runs:/runs" "${long[@]}" > /dev/null
  for _ in $(seq 600); do # until it learns
    if [ -s "$runs/x/history.csv" ]; then break; fi
    sleep 0.2
  done
  if ! podman container exists long; then fail "the job ended early"; fi
  check_health
  podman stop --time 60 long > /dev/null
  code=$(podman wait long)
  podman logs long > "$folder/long.log" 2>&1
  podman rm --volumes long > /dev/null
  [ "$code" = 75 ] || { cat "$folder/long.log" >&2 && fail "SIGTERM: exit $code, expected 75"; }
  echo "ok  SIGTERM in training${*:+ ($*)}: exit $code, $(grep -oE '"step": [0-9]+' "$runs/x/outcome.json")"
  expect 0 "the same command goes on to the end" one_shot --volume "$runs:/runs" "${long[@]}"
  grep -E '"(step|attempt)"' "$runs/x/outcome.json" | sed 's/^/      /'
}

check_health() { # of the container "long"
  local check worker
  mapfile -t check < <(podman image inspect --format '{{range .HealthCheck.Test}}{{println .}}{{end}}' "$image" | grep .)
  check=(podman exec long "${check[@]:1}") # without the word CMD
  expect 0 "health of a job that works" "${check[@]}"
  worker=$(podman exec long sh -c 'grep -l FINETUNE_PULSE= /proc/[0-9]*/environ' | grep -oE '[0-9]+' | sort -n | head -n 1)
  podman exec long python -c "import os; os.kill($worker, 19)"
  expect 1 "health of a job that was stopped (SIGSTOP)" "${check[@]}"
  podman exec long python -c "import os; os.kill($worker, 18)"
  expect 0 "health after it went on" "${check[@]}"
}

if podman image exists "$image"; then
  echo "the image was built before"
else
  make_base > "$folder/base.log" 2>&1 || { tail "$folder/base.log" && fail "debootstrap"; }
  build "${@:2}" > "$folder/build.log" 2>&1 || { tail -n 40 "$folder/build.log" && fail "the build"; }
  grep -E '^(CUDA of torch|No broken requirements)' "$folder/build.log"
fi
check_start
check_job "the image's own user" 10001:0
check_job "another user, another group" 12345:12345
expect 0 "a run in volumes that nobody prepared" one_shot --user 23456:23456 "$image" "${job[@]}" --epochs 1
expect 0 "a run in two processes, without a network between them" one_shot "$image" "${job[@]}" --epochs 1 --processes 2
check_stop
check_stop --init
echo "proved"
