"""The Python API: docs/api.md and docs/first-steps.ipynb run as they stand."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import finetune
from finetune.cli.explain import app as explain_app
from finetune.errors import UsageError
from finetune.recipe.flags import FLAGS, Flags, build_recipe

DOCS = Path(__file__).parents[1] / "docs"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M | re.S)
EXPLAIN = tuple(name for name in finetune.__all__ if name.startswith("explain_"))
FUNCTIONS = (
    *(
        "advise",
        "audit",
        "check",
        "compare",
        "evaluate",
        "export",
        "extend",
        "extract",
        "forecast",
        "load",
        "predict",
        "probe",
        "run",
    ),
    *("explain_cam", "explain_saliency", "explain_top"),
)


@pytest.mark.slow
def test_the_page_runs(
    image_folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Word for word, but for the network: resnet50's weights are not on every machine."""
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(image_folder)
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block.replace('"resnet50"', repr(str(tiny))), names)
    assert names["run"].metrics["accuracy"] > 0.5
    assert names["prediction"].label in {"blue", "green", "red"}
    assert len(Path("predictions.csv").read_text().splitlines()) == 19
    assert names["result"]["errors"] == 0
    assert names["metrics"]["num_samples"] == 18
    assert {path.name for path in Path("features").iterdir()} >= {"layer1.csv"}
    assert Path("exported/model.safetensors").is_file()
    assert Path("cam/heat-maps.png").is_file()
    assert Path("top/top.csv").is_file()


def test_the_page_shows_every_function() -> None:
    text = "".join(BLOCKS)
    assert [name for name in FUNCTIONS if f"finetune.{name}(" not in text] == []
    assert [block for block in BLOCKS if not 1 <= len(block.strip().splitlines()) <= 5] == []


def test_each_command_that_explains_is_a_function_with_a_section() -> None:
    page = (DOCS / "explain.md").read_text(encoding="utf-8")
    commands = {command.name for command in explain_app.registered_commands}
    assert {name.removeprefix("explain_").replace("_", "-") for name in EXPLAIN} == commands
    assert [name for name in commands if f"(#{name}" not in page and f"-{name})" not in page] == []


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(DOCS / "first-steps.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(tmp_path))
    said = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("95 % interval" in output.get("text", "") for output in said)
    assert any("image/png" in output.get("data", {}) for output in said)


@pytest.mark.parametrize("name", sorted({*FUNCTIONS, *EXPLAIN}))
def test_each_function_is_one_of_the_package(name: str) -> None:
    function = getattr(finetune, name)
    assert callable(function) and not inspect.ismodule(function)
    assert name in finetune.__all__ and name in dir(finetune)


@pytest.mark.slow
def test_a_function_stays_one_when_rooms_are_imported() -> None:
    """A package of the same name would take the function's place as soon as it is imported."""
    code = "import finetune, finetune.api, finetune.pipeline.run, finetune.exporters.export\n"
    code += f"assert all(callable(getattr(finetune, name)) for name in {FUNCTIONS!r})"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_needs_no_torch() -> None:
    code = "import sys, finetune; finetune.run; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_flags_and_keyword_arguments_are_the_same() -> None:
    assert list(Flags.__annotations__) == list(FLAGS)


def test_flags_lie_over_a_recipe() -> None:
    recipe = build_recipe(None, {"epochs": 3}, {"training.lr": 0.5})
    assert (recipe.training.epochs, recipe.training.lr) == (3, 0.5)
    assert build_recipe(recipe, {"epochs": 4, "seed": None}).training == recipe.training.model_copy(
        update={"epochs": 4}
    )


def test_a_misspelt_argument_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="epochs"):
        finetune.run(data="x", epoch=3)
    with pytest.raises(UsageError, match="given as well"):
        build_recipe(None, {"epochs": 3}, {"training.epochs": 4})
