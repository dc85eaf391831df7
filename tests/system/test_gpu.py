"""GPUs that are there: whether torch has code for them, and why it cannot use them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetune.errors import EnvironmentFaultError, ExitCode
from finetune.system import gpu
from finetune.system.device import resolve_device
from finetune.system.gpu import explain_unused_gpu, identify_card
from finetune.system.join import _shared_cards
from tests.conftest import Cli, draw_folder

WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
"""What torch 2.15 for CUDA 13.2 is built for."""


def show_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built_for: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Card")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    monkeypatch.setattr(torch.version, "cuda", "13.2")


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((7, 5), WHEEL, True),
        ((8, 9), WHEEL, True),  # by sm_86
        ((12, 1), WHEEL, True),
        ((7, 0), WHEEL, False),
        ((6, 1), WHEEL, False),
        ((13, 0), WHEEL, False),
        ((13, 0), [*WHEEL, "compute_120"], True),  # PTX is compiled by the driver
        ((11, 0), [*WHEEL, "compute_120"], False),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
        ((10, 3), ["sm_100f"], True),
        ((12, 0), ["sm_100f"], False),
        ((12, 0), ["compute_100f"], False),
        ((3, 7), [], True),  # a build that does not say what it was built for
        ((3, 7), ["something_new"], True),
    ],
)
def test_a_card_without_code_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built_for: list[str], runs: bool
) -> None:
    show_card(monkeypatch, capability, built_for)
    if runs:
        assert resolve_device("auto") == torch.device("cuda:0")
        return
    with pytest.raises(EnvironmentFaultError) as refusal:
        resolve_device("auto")
    major, minor = capability
    assert refusal.value.exit_code == ExitCode.ENVIRONMENT
    assert refusal.value.message.startswith(
        f"--device auto: Some Card has compute capability {major}.{minor}, and torch {torch.__version__} was "
        f"built for {built_for[0]}"
    )
    assert f"sm_{major}{minor}" in refusal.value.fix and "--device cpu" in refusal.value.fix


# --- a GPU that is not used ----------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose driver's files lie in a folder; it has none yet."""
    monkeypatch.setattr(gpu, "DRIVER", tmp_path / "driver")
    monkeypatch.setattr(gpu, "CARDS", tmp_path / "dev")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "dev").mkdir()
    return tmp_path


def load_driver(machine: Path) -> None:
    (machine / "driver").mkdir()
    version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
    (machine / "driver" / "version").write_text(version)


def add_card(machine: Path) -> None:
    load_driver(machine)
    (machine / "dev" / "nvidia0").touch()


def test_a_machine_without_a_card_is_no_surprise(machine: Path) -> None:
    assert explain_unused_gpu("auto") == ""
    (machine / "dev" / "nvidiactl").touch()
    assert explain_unused_gpu("auto") == ""


def test_a_card_that_works_is_no_surprise(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_card(machine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert explain_unused_gpu("auto") == ""


@pytest.mark.parametrize("asked", ["cpu", "cuda", "cuda:1"])
def test_only_auto_is_told(machine: Path, asked: str) -> None:
    add_card(machine)
    assert explain_unused_gpu(asked) == ""


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_cards_that_were_hidden_on_purpose(
    machine: Path, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    add_card(machine)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert explain_unused_gpu("auto") == ""


def test_a_container_that_does_not_see_the_card(machine: Path) -> None:
    load_driver(machine)
    said = explain_unused_gpu("auto")
    assert "hidden from this container" in said and "--gpus all" in said and "--device cpu" in said


def test_a_torch_without_cuda(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_card(machine)
    monkeypatch.setattr(torch.version, "cuda", None)
    said = explain_unused_gpu("auto")
    assert "is a build without CUDA" in said and "Install a build of torch with CUDA" in said


def test_a_driver_that_is_too_old(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_card(machine)
    monkeypatch.setattr(gpu, "_read_cuda_of_driver", lambda: (12, 2))
    said = explain_unused_gpu("auto")
    assert f"its driver 535.104.05 supports CUDA 12.2, and torch {torch.__version__} needs CUDA 13.2" in said
    assert "Update the driver" in said


def test_a_container_without_the_library_of_the_driver(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_card(machine)
    monkeypatch.setattr(gpu, "_read_cuda_of_driver", lambda: None)
    said = explain_unused_gpu("auto")
    assert "libcuda.so.1 is not there" in said and "NVIDIA_DRIVER_CAPABILITIES" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_every_other_reason_is_said_by_torch(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_card(machine)
    monkeypatch.setattr(gpu, "_read_cuda_of_driver", lambda: (13, 2))
    said = explain_unused_gpu("auto")
    assert "driver" in said.lower() or "CUDA" in said
    assert "Check nvidia-smi" in said


@pytest.mark.slow
def test_commands_warn(cli: Cli, tiny: Path, machine: Path, tmp_path: Path) -> None:
    load_driver(machine)
    data = draw_folder(tmp_path / "data", {"red": 4, "blue": 4})
    for words in (
        ["run", "-b", tiny, "-d", data, "-o", tmp_path / "run", "-s", "freeze", "--workers", 0],
        ["predict", tiny, data, "-o", tmp_path / "labels.csv"],
    ):
        done = cli(*words)
        assert done.exit_code == 0, done.output
        assert done.stderr.count("warning: this machine has an NVIDIA GPU that torch cannot use") == 1
        assert "cannot use" not in cli(*words[:-1], f"{words[-1]}", "--device", "cpu").stderr


# --- one process a card --------------------------------------------------------------------------


def show_properties(monkeypatch: pytest.MonkeyPatch, *cards: SimpleNamespace) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cards[index])


def describe_card(name: str, uuid: str, bus: int) -> SimpleNamespace:
    return SimpleNamespace(name=name, uuid=uuid, pci_domain_id=0, pci_bus_id=bus, pci_device_id=0)


def test_slices_of_one_card_are_one_card(monkeypatch: pytest.MonkeyPatch) -> None:
    mig = "NVIDIA A100-SXM4-40GB MIG 3g.20gb"
    show_properties(
        monkeypatch,
        describe_card(mig, "a", 7),
        describe_card(mig, "b", 7),
        describe_card(mig, "c", 8),
        describe_card("NVIDIA A100-SXM4-40GB", "d", 9),
        describe_card("NVIDIA A100-SXM4-40GB", "e", 9),  # two machines may number their cards alike
    )
    first, second, *others = map(identify_card, range(5))
    assert first == second
    assert len({first, *others}) == 4
    refusal = _shared_cards(2, 1)
    assert refusal.message == (
        "a GPU for each process: 2 processes share 1 GPU; slices (MIG) of a card count as one"
    )
