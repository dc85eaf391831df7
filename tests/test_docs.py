"""Pages that are made from the code say what the code says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.recipe import Recipe, flatten, load_recipe
from finetune.recipe.page import COMMAND, build_page

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"


def test_the_recipe_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == build_page(), f"make it again: {COMMAND}"


def test_the_command_makes_the_page(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    words = shlex.split(COMMAND)
    assert words[0] == "python"
    result = subprocess.run(
        [sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (result.stdout, result.stderr) == ("", "")
    assert (tmp_path / "docs" / "recipe.md").read_text(encoding="utf-8") == build_page()


def test_every_key_has_a_row_of_four_cells() -> None:
    rows, section = [], ""
    for line in build_page().splitlines():
        if line.startswith("## "):
            section = "".join(re.findall("`(.*)`", line))
        elif line.startswith("| `"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            assert len(cells) == 4 and all(cell.strip() for cell in cells), line
            rows.append(".".join(filter(None, [section, cells[0].strip(" `")])))
    assert sorted(rows) == sorted(key for key, _ in flatten(Recipe().to_dict()))


def test_the_example_of_the_page_is_a_recipe(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", build_page(), re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text(example)
    assert load_recipe(str(path)) != Recipe()


@pytest.mark.slow
def test_the_pages_are_a_site_without_a_dead_link(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=PAGE.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in PAGE.parent.glob("*.md")} - {"index"}
    assert {path.name for path in (tmp_path / "site").iterdir() if path.is_dir()} >= pages
