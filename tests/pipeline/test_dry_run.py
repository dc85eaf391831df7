"""A dry run says what the run does, and leaves nothing behind."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.pipeline.dry_run import dry_run
from finetune.recipe import Recipe, load_recipe
from finetune.runs.cache_dir import FeatureCacheDir
from finetune.runs.folder import RunFolder
from finetune.system.display import SilentDisplay
from finetune.training.batch_size import StepTrial
from tests.conftest import Cli

KEYS: dict[str, dict[str, Any]] = {
    "freeze": {"strategy.name": "freeze"},
    "solved": {"strategy.name": "freeze", "strategy.features": "all"},
    "top": {"strategy.name": "top"},
    "full": {"strategy.name": "full", "training.optimizer": "adamw", "training.ema_decay": 0.9},
    "auto": {"strategy.name": "auto"},
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", KEYS)
def test_the_plan_is_that_of_the_run(
    cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sets = [word for key, value in KEYS[kind].items() for word in ("--set", f"{key}={value}")]
    words = ("run", "-b", tiny, "-d", image_folder, "--epochs", 4, "-o", tmp_path / "run", *sets)
    done = cli(*words, "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert not (tmp_path / "run").exists()
    assert all(seconds >= 0 for seconds in facts["seconds"].values()) and sum(facts["seconds"].values()) > 0
    assert facts["num_images"] == {"train": 36, "val": 18, "test": 0}
    assert "nothing was trained" in done.stderr

    assert cli(*words).exit_code == 0
    folder = RunFolder(tmp_path / "run")
    assert (
        load_recipe(str(folder.recipe)).to_dict()
        == Recipe.model_validate_json(json.dumps(facts["recipe"])).to_dict()
    )
    rows = list(csv.DictReader(folder.plan.read_text("utf-8").splitlines()))
    for row, written in zip(facts["plan"], rows, strict=True):
        assert row.pop("rate") == float(written.pop("rate"))
        assert {key: str(value) for key, value in row.items()} == written
    trunk = json.loads(folder.trunk.read_text("utf-8")) if folder.trunk.exists() else {"cut": None}
    assert facts["cut"] == trunk["cut"]
    if kind != "auto":  # whose advice has features of its own
        kept = [file for file in FeatureCacheDir().list() if file.facts.get("kind") != "pictures"]
        assert facts["cached_bytes"] == sum(file.num_bytes for file in kept)
    written = sum(
        path.stat().st_size
        for path in (folder.model, folder.checkpoints)
        for path in path.rglob("*.safetensors")
    )
    assert written < 1.1 * facts["run_folder_bytes"] < 5 * written


def test_what_the_run_refuses_is_refused(cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path) -> None:
    words = ("run", "-b", tiny, "-d", image_folder, "--dry-run")
    refused = {
        ("-o", image_folder / "out"): "it lies in the data",
        ("--set", "strategy.features=layer9"): "strategy.features=layer9",
        ("--repeats", 2): "--dry-run --repeats",
        ("--processes", 2): "--dry-run --processes",
    }
    for more, said in refused.items():
        done = cli(*words, *more)
        assert done.exit_code == 2 and said in done.output, done.output
    assert not (image_folder / "out").exists()


def test_the_network_is_given_back(image_folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measured step changes no weight: the trial's own promise, kept when it is timed."""
    from finetune.pipeline import dry_run as module

    seen = {}
    real = module.open_trial

    def remember(setup: Any) -> StepTrial:
        seen["network"] = setup.backbone.network
        seen["before"] = {key: value.clone() for key, value in setup.backbone.network.state_dict().items()}
        return real(setup)

    monkeypatch.setattr(module, "open_trial", remember)
    keys = {"backbone.name": str(tiny), "data.path": str(image_folder), "strategy.name": "full"}
    facts = dry_run(load_recipe(None, keys), None, SilentDisplay())
    after = seen["network"].state_dict()
    assert all(torch.equal(after[key], value) for key, value in seen["before"].items())
    assert math.isfinite(facts["measured_seconds"]["step"]) and facts["measured_seconds"]["step"] > 0
