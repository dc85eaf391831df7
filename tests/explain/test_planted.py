"""The benchmark with a planted cause: the label is in the patch alone, and the mass is counted there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are not installed

from benchmarks import planted
from benchmarks.harness import Bench, Turn
from benchmarks.results import OURS, Result, Results
from finetune.explain.attribution.heat_map import HeatMap, to_heat_map


def test_only_the_patch_has_colour() -> None:
    images, labels, places = planted.draw_images(16, torch.Generator().manual_seed(0))
    assert set(labels.tolist()) == {0, 1, 2, 3} and places.max() <= planted.SIDE - planted.PATCH
    for image, label, (top, left) in zip(images, labels.tolist(), places.tolist(), strict=True):
        patch = image[:, top : top + planted.PATCH, left : left + planted.PATCH]
        inks = {tuple(pixel) for pixel in patch.flatten(1).T.tolist()}
        assert inks == {planted.COLOURS[label], (-1.0, -1.0, -1.0)}
        rest = image.clone()
        rest[:, top : top + planted.PATCH, left : left + planted.PATCH] = 0
        assert torch.equal(rest[0], rest[1]) and torch.equal(rest[0], rest[2]), "everything else is grey"
    again = planted.draw_images(16, torch.Generator().manual_seed(0))
    assert torch.equal(images, again[0])


def test_the_mass_is_counted_in_the_patch_and_just_beside_it() -> None:
    place = (40, 60)
    inside, outside = torch.zeros(128, 128), torch.zeros(128, 128)
    inside[40:72, 60:92] = 1
    outside[0:16, 0:16] = 1
    assert planted.find_mass(to_heat_map(inside), place) == 1
    assert planted.find_mass(to_heat_map(outside), place) == 0
    assert planted.find_mass(to_heat_map(inside + outside * 2), place) == pytest.approx(2 / 3, abs=1e-3)
    assert planted.find_mass(HeatMap(None, "x"), place) == 0
    assert planted.compute_chance() == pytest.approx((48 / 128) ** 2, rel=0.15)


def test_the_table_says_what_is_refused(tmp_path: Path) -> None:
    good = {"mass": 0.8, "randomisation": True, "deletion": None}
    figures = dict.fromkeys(planted.METHODS, good) | {
        "accuracy": 1.0,
        "layer-cam": good | {"randomisation": False},
        "guided": {"refused": "no ReLU"},
    }
    results = Results(tmp_path / "results.jsonl")
    results.add(Result("planted-vit", OURS, 0, figures))
    [said, head, _, row] = planted.write(results)
    assert "a map that is the same everywhere has" in said and head.startswith("| family | what it is")
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:5] == ["vit", "class token, GELU", "100", "80", "(80)"] and cells[-1] == "no"


@pytest.mark.slow
def test_every_family_is_built_and_learns_a_step(tmp_path: Path) -> None:
    for name, (_, build) in planted.FAMILIES.items():
        torch.manual_seed(0)
        network = build(num_classes=4)  # type: ignore[call-arg]
        images, labels, _ = planted.draw_images(4, torch.Generator().manual_seed(0))
        logits = network(images)
        assert logits.shape == (4, 4), name
        F.cross_entropy(logits, labels).backward()
    bench = Bench(tmp_path, tmp_path, quick=True)
    [case, *_] = planted.plan(bench)
    figures = planted.measure(Turn(case, OURS, 0, tmp_path, bench))
    assert set(figures) == {"accuracy", *planted.METHODS}
