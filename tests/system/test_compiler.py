"""A machine that cannot compile a network says so before it looks at any image."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from finetune.errors import EnvironmentFaultError, ExitCode
from finetune.runs.outcome import translated_errors
from finetune.system.compiler import check_compiler
from tests.conftest import Cli

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def give_tools(monkeypatch: pytest.MonkeyPatch, *tools: str) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in tools else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in tools else None)


@pytest.mark.parametrize(
    ("device", "tools", "found", "fix"),
    [
        (CPU, ("g++",), "", ""),
        (CPU, ("gcc", "triton"), "there is no C++ compiler (g++)", "Install g++"),
        (CUDA, ("gcc", "triton"), "", ""),
        (CUDA, ("clang", "triton"), "", ""),
        (CUDA, ("gcc",), "there is no Triton", "Install triton"),
        (CUDA, ("triton",), "Triton finds no C compiler (gcc, clang)", "Install gcc"),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, tools: tuple[str, ...], found: str, fix: str
) -> None:
    give_tools(monkeypatch, *tools)
    if not found:
        check_compiler(device)
        return
    with pytest.raises(EnvironmentFaultError) as refusal:
        check_compiler(device)
    assert refusal.value.found.startswith(found)
    assert refusal.value.fix == f"{fix}, or set training.compile to false."


def test_compilers_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    give_tools(monkeypatch, "my-cc", "triton")
    monkeypatch.setenv("CC", "my-cc")
    check_compiler(CUDA)
    monkeypatch.setenv("CC", "gcc")
    with pytest.raises(EnvironmentFaultError, match="gcc"):
        check_compiler(CUDA)


def test_a_run_is_refused_before_its_folder_is_made(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    words = ["run", "-b", tiny, "-d", image_folder, "-o", tmp_path / "run", "--device", "cpu"]
    done = cli(*words, "--set", "training.compile=true")
    assert done.exit_code == ExitCode.ENVIRONMENT == 78
    assert "error: training.compile=true: there is no C++ compiler (no-such-compiler)" in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_error_of_the_compiler_in_the_backward_pass_is_no_bug() -> None:
    class InductorError(RuntimeError):
        __module__ = "torch._inductor.exc"

    with pytest.raises(EnvironmentFaultError) as refusal, translated_errors():
        raise InductorError("RuntimeError: Failed to find C compiler.\nPlease specify via CC.")
    assert refusal.value.message == (
        "training.compile=true: torch cannot compile the network: "
        "RuntimeError: Failed to find C compiler. Please specify via CC."
    )
