"""What torch.compile needs of a machine, and its errors in words."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from finetune.errors import EnvironmentFaultError

_ASKED = "training.compile=true"
_FAULTS = ("torch._dynamo", "torch._inductor", "triton")
"""Modules whose errors say that a network cannot be compiled."""


def check_compiler(device: torch.device) -> None:
    """Refuse to compile a network where the tools for it are missing.

    For a CPU torch writes C++; for a GPU it needs Triton, which writes and compiles C to start its kernels.

    Raises:
        EnvironmentFaultError: this machine has no compiler, or no Triton.
    """
    if device.type != "cuda":
        tool = os.environ.get("CXX", "g++")
        if not shutil.which(tool):
            raise _refusal(f"there is no C++ compiler ({tool})", "Install g++")
        return
    if importlib.util.find_spec("triton") is None:
        raise _refusal("there is no Triton, which writes the kernels of a GPU", "Install triton")
    tools = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, tools)):
        raise _refusal(f"Triton finds no C compiler ({', '.join(tools)})", "Install gcc")


def is_compile_error(error: BaseException) -> bool:
    """Return whether an error says that torch or Triton cannot compile a network."""
    return type(error).__module__.startswith(_FAULTS)


def compile_error(error: BaseException) -> EnvironmentFaultError:
    """Return the refusal for an error of torch.compile."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return _refusal(f"torch cannot compile the network: {reason}", "Install a C++ compiler (g++)")


def _refusal(found: str, remedy: str) -> EnvironmentFaultError:
    return EnvironmentFaultError(_ASKED, found, f"{remedy}, or set training.compile to false.")
