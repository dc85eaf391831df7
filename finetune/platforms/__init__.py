"""What a managed platform tells a job that it starts, and what it wants to find when the job has ended.

A platform is found by what it leaves for the job, environment variables and files; where there is none,
nothing here does anything.
"""

from contextlib import suppress

from finetune.errors import FinetuneError
from finetune.platforms.platform import Platform
from finetune.platforms.sagemaker import find_sagemaker
from finetune.platforms.vertex import find_vertex

__all__ = ["Platform", "find_platform", "find_sagemaker", "find_vertex", "write_failure"]


def find_platform() -> Platform | None:
    """Return the platform that has started this process; None where none is known.

    Raises:
        UsageError: what it says cannot be understood.
    """
    return find_sagemaker() or find_vertex()


def write_failure(message: str, fix: str) -> None:
    """Leave the reason of a failure where a platform looks for it, if there is one."""
    with suppress(FinetuneError):
        if (platform := find_platform()) is not None:
            platform.write_failure(message, fix)
