"""deploy/: held against Kubernetes' and Compose's own schemas, a linter for shells, and our own command line.

The SLURM scripts are run by a real bash; srun, scontrol and scancel are stand-ins, since they need a cluster.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from ruamel.yaml import YAML
from typer.main import get_command

from finetune.cli.app import app
from finetune.errors import ExitCode

DEPLOY = Path(__file__).parents[1] / "deploy"
MANIFESTS = sorted(DEPLOY.glob("kubernetes-job*.yaml"))
SERVICE = DEPLOY / "kubernetes-service.yaml"
SCRIPTS = sorted(DEPLOY.glob("slurm-*.sbatch"))
VERSIONS = ("1.31", "1.33", "1.35", "1.37")


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} belongs to the dev extra: pip install -e '.[dev]'"
    return found


def resources(path: Path) -> list[dict[str, Any]]:
    return list(YAML(typ="safe").load_all(path))


def job_of(path: Path) -> dict[str, Any]:
    (job,) = (item for item in resources(path) if item["kind"] == "Job")
    return job


def pod_of(path: Path) -> dict[str, Any]:
    return job_of(path)["spec"]["template"]["spec"]


def container_of(path: Path) -> dict[str, Any]:
    (container,) = pod_of(path)["containers"]
    return container


def parse(words: list[str]) -> dict[str, Any]:
    """What `finetune run` understands; a word that it does not know is an error."""
    assert words[0] == "run"
    command: Any = get_command(app)
    return command.commands["run"].make_context("run", words[1:]).params


# --- Kubernetes ----------------------------------------------------------------------------------


def test_there_is_something_to_look_at() -> None:
    assert len(MANIFESTS) == 3
    assert len(SCRIPTS) == 2


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", [*MANIFESTS, SERVICE], ids=lambda path: path.name)
def test_manifests_are_valid(path: Path, version: str) -> None:
    for resource in resources(path):
        kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda job: job["spec"].update(backofLimit=3),
        lambda job: job["spec"].update(backoffLimit="three"),
        lambda job: job["spec"]["template"]["spec"].update(runAsNonRoot=True),
        lambda job: job["spec"]["podFailurePolicy"]["rules"][0]["onPodConditions"][0].pop("status"),
    ],
)
def test_a_mistake_would_be_seen(spoil: Callable[[dict[str, Any]], None]) -> None:
    job = copy.deepcopy(job_of(MANIFESTS[0]))
    spoil(job)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.31", strict=True)


FINAL = {ExitCode.USAGE, ExitCode.DATA, ExitCode.DIVERGED, ExitCode.ENVIRONMENT}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_what_kubernetes_does_with_our_exit_codes(path: Path) -> None:
    spec = job_of(path)["spec"]
    disrupted, failed = spec["podFailurePolicy"]["rules"]
    assert disrupted == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    assert failed["action"] == "FailJob"
    assert failed["onExitCodes"]["containerName"] == container_of(path)["name"]
    assert set(failed["onExitCodes"]["values"]) == FINAL
    assert pod_of(path)["restartPolicy"] == "Never", "podFailurePolicy wants it"
    assert spec["podReplacementPolicy"] == "Failed", "never two pods on one run folder"
    assert spec["backoffLimit"] > 0
    assert spec["activeDeadlineSeconds"] and spec["ttlSecondsAfterFinished"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_pods_may_do_no_more_than_they_must(path: Path) -> None:
    pod, container = pod_of(path), container_of(path)
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"memory", "ephemeral-storage", "nvidia.com/gpu"} <= container["resources"]["limits"].keys()
    (token,) = (item for item in container["env"] if item["name"] == "HF_TOKEN")
    assert token["valueFrom"]["secretKeyRef"]["optional"] is True


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_pods_have_room_and_time(path: Path) -> None:
    pod, container = pod_of(path), container_of(path)
    assert pod["terminationGracePeriodSeconds"] >= 60, "the run takes up to 25 seconds to save"
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts.keys() == {"/data", "/runs", "/cache", "/dev/shm", "/tmp"}
    assert set(mounts.values()) == volumes.keys()
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert volumes[mounts["/data"]]["persistentVolumeClaim"]["readOnly"] is True


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_pods_run_a_command_that_there_is(path: Path) -> None:
    container = container_of(path)
    asked = parse(container["args"])
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert asked["data"] in mounts
    assert str(asked["output"]).startswith("/runs/"), "fixed, or no attempt would go on with another's run"
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert (asked.get("gpus") or 1) == gpus
    if gpus == 1:
        assert asked["device"] == "cuda", "without it a pod that lost its GPU would train on its processor"


def test_the_pods_of_several_machines_know_of_each_other() -> None:
    (path,) = (path for path in MANIFESTS if "multi-node" in path.name)
    (service,) = (item for item in resources(path) if item["kind"] == "Service")
    spec, pod = job_of(path)["spec"], pod_of(path)
    told = {item["name"]: item.get("value") for item in container_of(path)["env"]}
    (rank,) = (item for item in container_of(path)["env"] if item["name"] == "RANK")
    assert "job-completion-index" in rank["valueFrom"]["fieldRef"]["fieldPath"]
    assert spec["completionMode"] == "Indexed"
    assert told["WORLD_SIZE"] == str(spec["completions"]) == str(spec["parallelism"])
    name = service["metadata"]["name"]
    assert pod["subdomain"] == name
    assert told["MASTER_ADDR"] == f"{job_of(path)['metadata']['name']}-0.{name}"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job_of(path)["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True


# --- Compose -------------------------------------------------------------------------------------


def check_compose(path: Path) -> subprocess.CompletedProcess[str]:
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_compose_file_is_valid(tmp_path: Path) -> None:
    done = check_compose(DEPLOY / "compose.yaml")
    assert done.returncode == 0, done.stdout
    spoilt = tmp_path / "compose.yaml"
    spoilt.write_text((DEPLOY / "compose.yaml").read_text().replace("shm_size", "shmsize"))
    assert check_compose(spoilt).returncode != 0


def test_the_compose_file_is_as_strict_as_the_manifests() -> None:
    (content,) = resources(DEPLOY / "compose.yaml")
    service = content["services"]["finetune"]
    assert service["read_only"] is True and service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True and service["restart"] == "no"
    assert service["stop_grace_period"] == "120s"
    assert service["shm_size"] == "8gb"
    assert "gpu" in service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"]
    assert parse(service["command"])["data"] in [volume["target"] for volume in service["volumes"]]


def test_no_registry_is_named() -> None:
    for path in (*MANIFESTS, SERVICE, DEPLOY / "compose.yaml", DEPLOY / "compose-service.yaml"):
        images = [
            line.split()[-1] for line in path.read_text().splitlines() if line.strip().startswith("image:")
        ]
        assert images and all("/" not in image and ":" in image for image in images), path


# --- the service ---------------------------------------------------------------------------------


def parse_serve(words: list[str]) -> dict[str, Any]:
    assert words[0] == "serve"
    command: Any = get_command(app)
    return command.commands["serve"].make_context("serve", words[1:]).params


def test_the_pod_of_the_service_is_alone_in_its_store_and_as_strict_as_those_of_jobs() -> None:
    deployment, service = resources(SERVICE)
    spec, pod = deployment["spec"], deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    job = pod_of(MANIFESTS[0])
    assert spec["replicas"] == 1 and spec["strategy"] == {"type": "Recreate"}
    assert pod["securityContext"] == job["securityContext"]
    assert container["securityContext"] == job["containers"][0]["securityContext"]
    assert pod["terminationGracePeriodSeconds"] >= 60, "jobs take up to 25 seconds to save"
    asked, mounts = (
        parse_serve(container["args"]),
        [mount["mountPath"] for mount in container["volumeMounts"]],
    )
    assert asked["host"] == "0.0.0.0" and asked["store"] in mounts
    told = {item["name"]: item["valueFrom"]["secretKeyRef"]["name"] for item in container["env"]}
    assert told == dict.fromkeys(("FINETUNE_API_TOKEN", "FINETUNE_DATABASE_URL"), "finetune-serve")
    (port,) = container["ports"]
    assert (
        port["containerPort"] == asked["port"] and service["spec"]["ports"][0]["targetPort"] == port["name"]
    )
    assert service["spec"]["selector"] == spec["selector"]["matchLabels"]


def test_probes_ask_paths_without_a_token() -> None:
    from finetune.service.access import OPEN

    (container,) = resources(SERVICE)[0]["spec"]["template"]["spec"]["containers"]
    for name in ("livenessProbe", "readinessProbe"):
        assert container[name]["httpGet"]["path"] in OPEN


def test_the_compose_file_of_the_service(tmp_path: Path) -> None:
    path = DEPLOY / "compose-service.yaml"
    done = check_compose(path)
    assert done.returncode == 0, done.stdout
    (content,) = resources(path)
    (run,) = resources(DEPLOY / "compose.yaml")
    service, batch = content["services"]["serve"], run["services"]["finetune"]
    for key in ("read_only", "tmpfs", "cap_drop", "security_opt", "init", "stop_grace_period", "shm_size"):
        assert service[key] == batch[key], key
    asked = parse_serve(service["command"])
    assert asked["store"] in [volume["target"] for volume in service["volumes"]]
    assert service["ports"] == [f"127.0.0.1:8000:{asked['port']}"], "a proxy with TLS stands before it"


def test_the_unit_of_systemd_starts_a_command_that_there_is(tmp_path: Path) -> None:
    text = (DEPLOY / "finetune-serve.service").read_text()
    unit = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    words = unit["ExecStart"].split()
    assert words[0].endswith("/finetune") and parse_serve(words[1:])["host"] == "127.0.0.1"
    assert unit["KillMode"] == "mixed", "a signal to the jobs as well would count as the second"
    assert int(unit["TimeoutStopSec"]) >= 60
    if shutil.which("systemd-analyze"):
        (tmp_path / "finetune-serve.service").write_text(
            text.replace("/opt/finetune/bin/finetune", "/bin/true")
        )
        command = ["systemd-analyze", "verify", str(tmp_path / "finetune-serve.service")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "Unknown" not in done.stderr, done.stderr


# --- SLURM ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shells_understand_the_scripts(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    done = subprocess.run([tool("shellcheck"), str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_slurm_warns_before_the_time_limit(path: Path) -> None:
    asked = [line.split()[1] for line in path.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= set(asked)


FINETUNE = """#!/usr/bin/env bash
# Stands in for finetune: notes its words and its place, and ends as it is told to.
trap 'exit 75' TERM
place='^(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_PORT)='
{ printf '%s ' "$@"; env | grep -E "$place" | sort | tr '\\n' ' '; } > "$NOTES/finetune-${RANK:-0}"
if [ "$END" = wait ]; then while :; do sleep 0.05; done; fi
exit "$END"
"""
SRUN = """#!/usr/bin/env bash
# Stands in for srun: starts every task here, hands signals on, and ends with the highest exit code.
echo $$ > "$NOTES/srun"
while [[ $1 == --* ]]; do shift; done
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) "$@" &
done
trap 'kill -TERM $(jobs -pr)' USR2
code=0
for job in $(jobs -p); do
  while kill -0 "$job" 2> /dev/null; do wait "$job"; done
  wait "$job"; got=$?
  if [ $got -gt $code ]; then code=$got; fi
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'n1\\nn2\\n'; else echo "$@" >> "$NOTES/scontrol"; fi
"""
SCANCEL = """#!/usr/bin/env bash
# Stands in for scancel: tells all steps of the job, and not the script.
echo "$@" >> "$NOTES/scancel"
kill -USR2 "$(cat "$NOTES/srun")"
"""


class Slurm:
    """A bash that runs a batch script, with stand-ins for what needs a cluster."""

    def __init__(self, folder: Path) -> None:
        self.notes, self.output = folder / "notes", folder / "run"
        self.notes.mkdir()
        self.output.mkdir()
        stand_ins = {"finetune": FINETUNE, "srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL}
        (folder / "bin").mkdir()
        for name, text in stand_ins.items():
            path = folder / "bin" / name
            path.write_text(text)
            path.chmod(0o755)
        self.environment = {
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "NOTES": str(self.notes),
            "DATA": "/some data",
            "OUTPUT": str(self.output),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NTASKS": "4",
            "SLURM_NTASKS_PER_NODE": "2",
        }

    def start(self, script: str, *words: str, end: object = 0, **more: object) -> subprocess.Popen[str]:
        environment = (
            self.environment | {"END": str(end)} | {name: str(value) for name, value in more.items()}
        )
        command = ["bash", str(DEPLOY / script), *words]
        self.process = subprocess.Popen(command, env=environment, text=True, start_new_session=True)
        return self.process

    def signal(self, process: subprocess.Popen[str], number: int, tasks: int) -> int:
        """Send a signal to the script as soon as its tasks are at work; return its exit code."""
        deadline = time.monotonic() + 20
        while len(list(self.notes.glob("finetune-*"))) < tasks:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        time.sleep(0.2)
        process.send_signal(number)
        return process.wait(20)

    def told(self, name: str) -> str:
        path = self.notes / name
        return path.read_text().strip() if path.exists() else ""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    slurm = Slurm(tmp_path)
    yield slurm
    with suppress(ProcessLookupError):
        os.killpg(slurm.process.pid, signal.SIGKILL)  # where a test has failed


ONE, MANY = "slurm-one-node.sbatch", "slurm-many-nodes.sbatch"


@pytest.mark.parametrize("script", [ONE, MANY])
@pytest.mark.parametrize("end", [0, 65, 75])
def test_a_job_ends_as_its_run_does(slurm: Slurm, script: str, end: int) -> None:
    process = slurm.start(script, "--epochs", "3", end=end, SLURM_GPUS_ON_NODE="4" if script == ONE else "")
    assert process.wait(20) == end
    words = slurm.told("finetune-0").partition("--epochs 3")[0]
    gpus = "--gpus 4 " if script == ONE else ""
    assert words == f"run --data /some data --output {slurm.output} {gpus}"
    expected = "requeue 77" if script == MANY and end == 75 else ""  # a lost process ends the others with 75
    assert slurm.told("scontrol") == expected


@pytest.mark.parametrize("script", [ONE, MANY])
def test_words_of_the_script_are_words_of_finetune(slurm: Slurm, script: str) -> None:
    slurm.start(script, end=0, SLURM_GPUS_ON_NODE="4").wait(20)
    words = slurm.told("finetune-0").replace("/some data", "/data").split()
    parse([word for word in words if "=" not in word])


@pytest.mark.parametrize(("script", "tasks"), [(ONE, 1), (MANY, 4)])
def test_out_of_time_goes_back_into_the_queue(slurm: Slurm, script: str, tasks: int) -> None:
    process = slurm.start(script, end="wait")
    assert slurm.signal(process, signal.SIGUSR1, tasks) == ExitCode.INTERRUPTED
    assert slurm.told("scontrol") == "requeue 77"


@pytest.mark.parametrize("script", [ONE, MANY])
def test_no_job_is_queued_for_ever(slurm: Slurm, script: str) -> None:
    process = slurm.start(script, end="wait", SLURM_RESTART_COUNT=50)
    assert slurm.signal(process, signal.SIGUSR1, 1 if script == ONE else 4) == ExitCode.INTERRUPTED
    assert slurm.told("scontrol") == ""


def test_a_cancelled_job_is_not_queued_again(slurm: Slurm) -> None:
    process = slurm.start(ONE, end="wait")
    assert slurm.signal(process, signal.SIGTERM, 1) == ExitCode.INTERRUPTED
    assert slurm.told("scontrol") == ""


def test_a_cancelled_job_of_many_machines_is_not_queued_again(slurm: Slurm) -> None:
    process = slurm.start(MANY, end="wait")
    while not (slurm.notes / "finetune-3").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    os.kill(int(slurm.told("srun")), signal.SIGUSR2)  # scancel tells the steps itself
    assert process.wait(20) == ExitCode.INTERRUPTED
    assert slurm.told("scontrol") == ""


def test_every_task_learns_who_it_is(slurm: Slurm) -> None:
    assert slurm.start(MANY).wait(20) == 0
    for rank in range(4):
        said = slurm.told(f"finetune-{rank}")
        assert said.endswith(
            f"LOCAL_RANK={rank % 2} LOCAL_WORLD_SIZE=2 MASTER_PORT=20077 RANK={rank} WORLD_SIZE=4"
        )


def test_the_run_folder_knows_the_exit_code(slurm: Slurm) -> None:
    """srun gives the highest of all tasks, also where one was killed for another's fault."""
    (slurm.output / "outcome.json").write_text(json.dumps({"state": "failed", "exit_code": 65}, indent=2))
    assert slurm.start(MANY, end=137).wait(20) == ExitCode.DATA
    (slurm.output / "outcome.json").write_text(json.dumps({"state": "running", "exit_code": 0}, indent=2))
    assert slurm.start(MANY, end=137).wait(20) == 137
