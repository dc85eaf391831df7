from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.runs.block_file import BlockFile
from finetune.runs.cache_dir import FeatureCacheDir
from tests.conftest import Cli

FACTS = {"kind": "trunk", "backbone": "timm/resnet18", "cut": "layer3", "view": 2, "num_images": 40}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def keep() -> BlockFile:
    file = BlockFile(FeatureCacheDir().path_for(FACTS), FACTS, 1)
    file.append(bytes(2_500_000))
    return file


def test_an_empty_cache(cli: Cli) -> None:
    result = cli("cache", "list")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "0 files" in result.stderr
    assert cli("cache", "clear").exit_code == 0


def test_cached_files_are_listed(cli: Cli) -> None:
    keep().close()
    result = cli("cache", "list")
    assert "trunk" in result.stdout
    assert "timm/resnet18 layer3 2" in result.stdout
    assert "2.5 MB" in result.stdout
    [row] = json.loads(cli("cache", "list", "--json").stdout)
    assert row["bytes"] == 2_500_000
    assert row["cut"] == "layer3"


def test_files_that_no_run_uses_are_removed(cli: Cli, tmp_path: Path) -> None:
    file = keep()
    result = cli("cache", "clear")
    assert "0 files" in result.stderr and "1 in use by a run" in result.stderr
    file.close()
    result = cli("cache", "clear")
    assert "1 file removed" in result.stderr and "2.5 MB freed" in result.stderr
    assert not list((tmp_path / "finetune" / "kept").iterdir())


def test_a_damaged_cache_gives_no_traceback(cli: Cli, tmp_path: Path) -> None:
    keep().close()
    for journal in (tmp_path / "finetune" / "kept").glob("*.journal"):
        journal.write_bytes(b"\xff\xfe{")
    assert cli("cache", "list").exit_code == 0
    assert cli("cache", "clear").exit_code == 0
    assert not list((tmp_path / "finetune" / "kept").iterdir())
