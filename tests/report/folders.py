"""Run folders with every file that the report reads, for any class names, without training a network."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.runs.files import write_csv
from finetune.runs.folder import RunFolder
from tests.conftest import draw, make_tiny

HOSTILE = (
    "<script>window.hacked=1</script>",
    "=cmd()",
    '"><img src=x onerror="window.hacked=1">',
    "plain & simple",
)
HOSTILE_FILE = '"><img src=x onerror="window.hacked=1">&lt;.jpg'


def write_folder(root: Path, classes: Sequence[str], per_class: int = 6, *, spare: str = "") -> RunFolder:
    """Write data and a finished run beside each other.

    Args:
        root: for ``data/`` and ``run/``.
        classes: names in index order.
        per_class: number of evaluated images of each class.
        spare: whether to add a class without an evaluated image.
    """
    folder = RunFolder(root / "run")
    make_model(folder.path, classes)
    rows, counts = [], [[0] * len(classes) for _ in classes]
    chance = random.Random(0)
    split = []
    for index, name in enumerate(classes):
        for number in range(per_class if name != spare else 0):
            file = HOSTILE_FILE if number == 1 else f"{number}.jpg"
            path = f"val/{index}/{file}"
            draw(root / "data" / path, (40 * index % 255, 120, 80), seed=index * 100 + number)
            guess = index if chance.random() < 0.6 else chance.randrange(len(classes))
            sure = 0.4 + 0.5 * chance.random()
            if number == 1:  # the most confident mistake of its class
                guess, sure = (index + 1) % len(classes), 0.99
            counts[index][guess] += 1
            rows.append(
                (
                    path,
                    name,
                    classes[guess],
                    sure,
                    *[sure if k == guess else (1 - sure) / (len(classes) - 1) for k in range(len(classes))],
                )
            )
            split.append((path, name, "val", "0" * 64))
        for number in range(3):
            path = f"train/{index}/{number}.jpg"
            draw(root / "data" / path, (40 * index % 255, 120, 80), seed=index * 100 + number)
            split.append((path, name, "train", "0" * 64))
    write_csv(folder.split, split, ("path", "label", "split", "sha256"))
    columns = ("path", "label", "predicted", "confidence", *(f"prob_{name}" for name in classes))
    write_csv(folder.predictions, rows, columns)
    write_csv(
        folder.confusion_matrix, [(n, *c) for n, c in zip(classes, counts, strict=True)], ("label", *classes)
    )
    write_per_class(folder, classes, counts)
    write_rest(folder, root / "data", classes, counts)
    return folder


def make_model(path: Path, classes: Sequence[str]) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    path.mkdir(parents=True)
    model = make_tiny(path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"num_classes": len(classes), "label_names": list(classes)}
    config["finetune"] = {"library": "timm", "head": "replace", "temperature": 1.3}
    (model / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=len(classes))
    save_file(network.state_dict(), model / "model.safetensors")


def write_per_class(folder: RunFolder, classes: Sequence[str], counts: list[list[int]]) -> None:
    rows: list[tuple[Any, ...]] = []
    for index, name in enumerate(classes):
        support, predicted = sum(counts[index]), sum(row[index] for row in counts)
        right = counts[index][index]
        precision = right / predicted if predicted else "n/a"
        recall = right / support if support else "n/a"
        f1 = 2 * right / (support + predicted) if support else "n/a"
        rows.append((name, precision, recall, f1, support, predicted))
    write_csv(folder.per_class, rows, ("label", "precision", "recall", "f1", "support", "predicted"))


def write_rest(folder: RunFolder, data: Path, classes: Sequence[str], counts: list[list[int]]) -> None:
    folder.metrics.write_text(json.dumps(make_metrics(classes, counts)))
    folder.classes.write_text("\n".join(classes) + "\n")
    with folder.history.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(
            ["epoch", "lr", "train_loss", "eval_loss", "eval_accuracy", "seconds", "images_per_second"]
        )
        table.writerows(
            [[n, 0.01 / n, 1.2 / n, 1.0 / n + 0.2, 0.5 + 0.04 * n, 2.0, 100] for n in (1, 2, 3, 4)]
        )
    plan = [("body", "stem", 1000, False, 0, "none"), ("head", "head", 26, True, 0.01, "none")]
    write_csv(folder.plan, plan, ("group", "stage", "parameters", "trained", "rate", "norm"))
    folder.recipe.write_text(f"backbone:\n  name: test_resnet\ndata:\n  path: {json.dumps(str(data))}\n")
    folder.environment.write_text(json.dumps({"torch": "2.15.0", "device": "cpu", "gpu": None}))
    finding = {
        "severity": "warning",
        "count": 1,
        "message": f"{classes[0]} is odd",
        "fix": "Look at it.",
        "paths": ["a.jpg"],
    }
    folder.check.write_text(json.dumps({"findings": [finding]}))
    folder.advice.write_text(json.dumps({"reasons": [f"because of {classes[0]}"]}))


def make_metrics(classes: Sequence[str], counts: list[list[int]]) -> dict[str, Any]:
    total = sum(map(sum, counts))
    accuracy = sum(row[i] for i, row in enumerate(counts)) / max(total, 1)
    interval = [max(0.0, accuracy - 0.07), min(1.0, accuracy + 0.07)]
    bins = [
        {
            "low": n / 5,
            "high": (n + 1) / 5,
            "count": n * 3,
            "confidence": n / 5 + 0.1 if n else None,
            "accuracy": n / 5 if n else None,
        }
        for n in range(5)
    ]
    return {
        "accuracy": accuracy, "balanced_accuracy": accuracy, "f1_macro": accuracy, "loss": 0.8,
        "error": 1 - accuracy, "precision_macro": accuracy, "recall_macro": accuracy, "roc_auc": None,
        "num_samples": total, "classes_not_judged": [], "split": "val", "split_chose_checkpoint": True,
        "features": None, "best_epoch": 4, "epochs": 4, "images_per_second": 100.0, "data_wait_fraction": 0.4,
        "skipped_steps": 0, "rollbacks": 0, "microbatch": None, "backbone": "timm/test_resnet",
        "strategy": "freeze", "num_classes": len(classes), "num_train": 3 * len(classes),
        "intervals": {"accuracy": interval, "loss": [0.7, 0.9], "roc_auc": None},
        "most_confused": [{"label": classes[0], "predicted": classes[1], "count": 2, "share": 0.25}],
        "calibration": {
            "temperature": 1.3, "fitted_on": "val", "same_images": True, "ece": 0.1, "ece_calibrated": 0.06,
            "loss": 0.9, "loss_calibrated": 0.8, "bins": bins, "bins_calibrated": bins,
        },
        "reject": [
            {"precision": 0.9, "threshold": 0.7, "coverage": 0.6},
            {"precision": 0.99, "threshold": None, "coverage": 0.0},
        ],
        "seconds": {"load": 0.2, "train": 75.0, "total": 75.2},
    }  # fmt: skip
