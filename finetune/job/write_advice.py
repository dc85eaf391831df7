"""``advice.json`` and its two pictures."""

from __future__ import annotations

from pathlib import Path

from finetune.features.plots import draw_matrix, draw_probe
from finetune.job.advise import Advice
from finetune.job.data import create_new_folder
from finetune.runs.files import write_json
from finetune.strategy.rule import CELLS


def write_advice(advice: Advice, folder: Path) -> None:
    """Write the advice into a folder.

    Raises:
        UsageError: something is there already.
        DiskError: it cannot be written.
    """
    create_new_folder(folder)
    write_json(folder / "advice.json", advice.to_dict())
    names = [depth.layer for depth in advice.depths]
    error = [(one.accuracy * (1 - one.accuracy) / advice.num_looked_at) ** 0.5 for one in advice.depths]
    near = [(one.neighbours * (1 - one.neighbours) / advice.num_looked_at) ** 0.5 for one in advice.depths]
    curves = {
        "linear classifier": ([one.accuracy for one in advice.depths], error),
        "nearest neighbours": ([one.neighbours for one in advice.depths], near),
    }
    chance = 1 / advice.evidence.num_classes
    draw_probe(folder / "probe.png", names, curves, chance, f"{advice.backbone}: accuracy by depth")
    cells: dict[tuple[str, str], str] = {place: cell.words for place, cell in CELLS.items()}
    place = (advice.decision.size, advice.decision.similarity)
    draw_matrix(folder / "matrix.png", cells, place, "Which strategy")
