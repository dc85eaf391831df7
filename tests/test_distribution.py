"""The package as it is installed: under its own name, and complete without the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OTHERS = re.compile(r"finetune\[|pip install (-\S+ )*['\"]?finetune\b(?!-)")
"""What would install another project, which has the name ``finetune`` in the index."""


def test_no_text_tells_people_to_install_another_project() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split("\n") if listed.returncode == 0 else [str(p) for p in ROOT.rglob("*.md")]
    files = [
        ROOT / name
        for name in names
        if name.endswith((".py", ".md", ".toml", ".yaml", ".yml", ".ipynb", "file"))
    ]
    assert len(files) > 100
    wrong = [str(file) for file in files if file != Path(__file__) and OTHERS.search(file.read_text("utf-8"))]
    assert not wrong
    assert OTHERS.search("pip install 'finetune[onnx]'") and OTHERS.search("pip install finetune")
    assert not OTHERS.search("pip install finetune-vision")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["name"] == "finetune-vision" and list(project["scripts"]) == ["finetune"]


@pytest.mark.slow
def test_a_wheel_runs_outside_of_the_checkout(tmp_path: Path) -> None:
    """Its dependencies are those of this environment, and its own files come from the wheel alone."""
    for name in ("finetune", "pretrained", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "tree")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(tmp_path / "tree")], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("finetune_vision-*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    # A line of a .pth file adds the folder, but not what the .pth files in it name, such as the checkout.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    there = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    there |= {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "FINETUNE_STALL_TIMEOUT": "600",
    }
    where = [str(python), "-c", "import finetune, pretrained, recipes; print(finetune.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=there, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(site)
    words = [
        "-m",
        "finetune",
        "run",
        "--data",
        "sample:digits",
        "--strategy",
        "freeze",
        "--epochs",
        "1",
        "--img-size",
        "32",
        "-o",
        "run",
    ]
    done = subprocess.run(
        [str(python), *words], cwd=tmp_path, env=there, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/report.html").is_file()
