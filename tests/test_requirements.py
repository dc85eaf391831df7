"""The locks that the image is built from: whole, hashed, within pyproject.toml, silent on where to ask."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = ("gpu.lock", "cpu.lock")
OF_TORCH = re.compile(r"torch|torchvision|triton|cuda-.*|nvidia-.*")
"""What only one kind of torch has."""
ENTRY = re.compile(r"^([a-z0-9.-]+)==([\w.+!]+)((?: \\\n +--hash=sha256:[0-9a-f]{64})+)\n", re.MULTILINE)


def text(name: str) -> str:
    return (ROOT / "requirements" / name).read_text(encoding="utf-8")


def packages(name: str) -> dict[str, tuple[str, list[str]]]:
    """Version and hashes by package. Whatever is no comment and has another form is refused."""
    content = re.sub(r"^ *#.*\n", "", text(name), flags=re.MULTILINE)
    assert ENTRY.sub("", content) == ""
    return {match[1]: (match[2], re.findall(r"[0-9a-f]{64}", match[3])) for match in ENTRY.finditer(content)}


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    items = [*project["dependencies"], *project["optional-dependencies"]["serve"]]  # the image serves, too
    return [Requirement(item) for item in items]


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_has_one_version_and_hashes(name: str) -> None:
    assert len(packages(name)) > 40


@pytest.mark.parametrize("name", [*LOCKS, "cpu-torch.txt"])
def test_no_place_is_named(name: str) -> None:
    assert (
        re.findall(r"://|--(?:extra-)?index|--find-links|--trusted|@|/(?:home|root|tmp|work)/", text(name))
        == []
    )


def test_every_dependency_is_locked_within_its_range() -> None:
    found = packages("gpu.lock")
    versions = {item.name: found.get(canonicalize_name(item.name), ("missing", []))[0] for item in declared()}
    assert [str(item) for item in declared() if not item.specifier.contains(versions[item.name])] == []


def test_the_cpu_flavour_differs_by_torch_alone() -> None:
    gpu, cpu = packages("gpu.lock"), packages("cpu.lock")
    assert cpu == {package: locked for package, locked in gpu.items() if not OF_TORCH.fullmatch(package)}
    lines = [line for line in text("cpu-torch.txt").splitlines() if not line.startswith("#")]
    assert lines == [f"{package}=={gpu[package][0]}" for package in ("torch", "torchvision")]


def test_what_builds_the_package_is_locked() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    found = packages("cpu.lock")
    for item in map(Requirement, build):
        assert item.specifier.contains(found[item.name][0]), f"{item}: the image is built without an index"
