"""``README.md`` of a model folder: the model card that the Hugging Face hub shows.

Metrics that a run did not record are left out; older runs record fewer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune import __version__
from finetune.errors import count, sanitize
from finetune.exporters.config import find_base_model, loads_in_timm
from finetune.targets import ACTIVATION, CARD_METRICS, METRIC_NAMES, make_unique
from pretrained.catalog import Card
from pretrained.preprocessing import Preprocessing

Metrics = Mapping[str, Any]

HUB_LICENSES = frozenset(
    {
        "apache-2.0",
        "apple-amlr",
        "apple-ascl",
        "bsd-3-clause",
        "cc-by-4.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "cc-by-sa-4.0",
        "cc0-1.0",
        "gemma",
        "mit",
        "unknown",
    }
)
"""Licences of timm's and torchvision's weights with an identifier on the hub; others become ``other``."""
_METRICS = METRIC_NAMES | {"roc_auc": "ROC AUC (macro, one vs. rest)", "loss": "log loss (nats)"}
_HUB_TYPES = {"f1_macro": "f1", "precision_macro": "precision", "recall_macro": "recall"}
"""The hub's names of metrics, where they differ from ours."""
_MOST_ROWS = 50
"""Largest number of classes in the table of images."""


@dataclass(frozen=True)
class TrainingData:
    """What a model card says about the images besides their number.

    Attributes:
        name: name of the data folder or file, without its path.
        counts: number of images by class and split.
    """

    name: str = ""
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def build_readme(card: Card, metrics: Metrics, source: str, data: TrainingData | None = None) -> str:
    """Return the model card: YAML front matter for the Hugging Face hub, then Markdown.

    Args:
        card: description of the trained network.
        metrics: content of ``metrics.json``; empty for a model that came without metrics.
        source: origin of the initial weights; ``""`` if they were random.
        data: further facts about the images.
    """
    data = data or TrainingData()
    sections = [
        f"# Model card\n\n{_summary(card, metrics)}",
        f"## Metrics\n\n{_metrics_table(metrics)}",
        f"## Intended use and limits\n\n{_limits(card, metrics)}",
        f"## Training data\n\n{_data(metrics, data)}",
        f"## Usage\n\n```python\n{_usage(card)}\n```\n\n{_input_sentence(card)}\n\n{_output_sentence(card)}",
        f"## Source\n\n{_source(card, metrics, source)}",
    ]
    return f"---\n{_front_matter(card, metrics, data)}---\n" + "\n\n".join(sections) + "\n"


# --- front matter --------------------------------------------------------------------------------


def _front_matter(card: Card, metrics: Metrics, data: TrainingData) -> str:
    """Return one key per line; the values are JSON, which is valid YAML and quotes any name."""
    values: dict[str, Any] = {
        "tags": ["image-classification", "finetune" if card.source == "zoo" else card.library, "finetune"],
        "pipeline_tag": "image-classification",
        "library_name": card.library if loads_in_timm(card) else "finetune",
        **_license(card),
    }
    if base := find_base_model(card):
        values |= {"base_model": base, "base_model_relation": "finetune"}
    if results := _results(metrics, data):
        values |= {"metrics": [result["type"] for result in results[0]["metrics"]]}
        values |= {"model-index": [{"name": card.architecture, "results": results}]}
    return "".join(f"{key}: {_json(value)}\n" for key, value in values.items())


def _json(value: Any) -> str:
    """Return JSON in which only characters that YAML counts as unprintable are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in text)


def _license(card: Card) -> dict[str, str]:
    if not card.license or card.license in HUB_LICENSES:
        return {"license": card.license or "unknown"}
    return {"license": "other", "license_name": card.license}


def _results(metrics: Metrics, data: TrainingData) -> list[dict[str, Any]]:
    """Return the results of the hub's ``model-index``: one task, one data set and its metrics."""
    measured = [(key, metrics[key]) for key in CARD_METRICS if _is_number(metrics.get(key))]
    if not measured:
        return []
    dataset = {"name": data.name or "images of the user", "type": "imagefolder", "split": metrics["split"]}
    found = [
        {"type": _HUB_TYPES.get(key, key), "value": round(value, 6), "name": _METRICS[key]}
        for key, value in measured
    ]
    task = {"type": "image-classification", "name": "Image classification"}
    return [{"task": task, "dataset": dataset, "metrics": found}]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# --- prose ---------------------------------------------------------------------------------------


def _summary(card: Card, metrics: Metrics) -> str:
    strategy = f" (strategy `{metrics['strategy']}`)" if "strategy" in metrics else ""
    tuned = f"fine-tuned with finetune {__version__}{strategy}" if metrics else "exported with finetune"
    return f"`{card.architecture}` {tuned} for\n{card.num_classes} classes: {_class_list(card)}."


def _metrics_table(metrics: Metrics) -> str:
    if not metrics:
        return "This model came without metrics."
    intervals = metrics.get("intervals") or {}
    rows = [
        (_METRICS[key], f"{metrics[key]:.4f}", _interval(intervals.get(key)))
        for key in CARD_METRICS
        if _is_number(metrics.get(key))
    ]
    calibration = metrics.get("calibration") or {}
    if _is_number(after := calibration.get("loss_calibrated")):
        rows.append(("log loss with the temperature (nats)", f"{after:.4f}", ""))
    rows.append(("images", f"{metrics['num_samples']} of the `{metrics['split']}` split", ""))
    width = 3 if intervals else 2
    table = _table(("metric", "value", "95 % interval")[:width], [row[:width] for row in rows])
    parts = [table, _split_sentence(metrics), _seen_sentences(metrics), _calibration_sentence(calibration)]
    return "\n\n".join(filter(None, parts))


def _interval(bounds: Sequence[float] | None) -> str:
    return f"{bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else ""


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _split_sentence(metrics: Metrics) -> str:
    if metrics["split_chose_checkpoint"]:
        return (
            "The same images chose the best epoch, so these metrics are optimistic; "
            "a separate test split would show by how much."
        )
    return "These images were held out: neither the weights nor the best epoch depend on them."


def _seen_sentences(metrics: Metrics) -> str:
    """Return warnings about test images that the model or its backbone was trained on."""
    learned = {
        "num_leaked": "that this model was trained on",
        "num_seen_by_backbone": "that its initial weights were trained on in an earlier run",
    }
    counts = {what: metrics[key] for key, what in learned.items() if _is_number(metrics.get(key))}
    return "\n\n".join(
        f"**Of the {metrics['num_samples']} test images, {count} have an exact copy among the images {what}: "
        "these metrics are optimistic.**"
        for what, count in counts.items()
        if count > 0
    )


def _calibration_sentence(calibration: Mapping[str, Any]) -> str:
    before, after = calibration.get("ece"), calibration.get("ece_calibrated")
    if not _is_number(before) or not _is_number(after):
        return ""
    text = (
        f"Expected calibration error {before:.4f}; {after:.4f} with the temperature "
        f"{calibration['temperature']:.4g} that divides the logits (fitted on the validation split)."
    )
    if calibration.get("same_images") is True:
        text += (
            " The temperature was fitted on the test images, so the metrics with it are cross-fitted in "
            "five folds."
        )
    return text


def _limits(card: Card, metrics: Metrics) -> str:
    lines = [
        f"The model assigns one of these {card.num_classes} classes to every image, also to an image of "
        "something else, and often with a high probability.",
        "The metrics hold for images like the tested ones: same kind of camera, background and "
        "selection. Evaluate the model on your own images before you use it (`finetune evaluate`).",
        "It was not tested for fairness between groups of people or for robustness to adversarial images.",
    ]
    if missing := metrics.get("classes_not_judged"):
        lines.append(f"No image of these classes was tested: {_names(missing)}.")
    if confused := metrics.get("most_confused"):
        shown = [
            f"{_code(pair['label'])} predicted as {_code(pair['predicted'])} ({100 * pair['share']:.0f} %)"
            for pair in confused[:5]
        ]
        lines.append(f"Most confused: {', '.join(shown)}.")
    return "\n".join(f"- {line}" for line in lines)


def _data(metrics: Metrics, data: TrainingData) -> str:
    if not metrics:
        return "The training images are unknown."
    name = f"{_code(data.name)}: " if data.name else ""
    trained = f"{metrics['num_train']} training images; " if "num_train" in metrics else ""
    text = f"{name}{trained}{metrics['num_samples']} images of the `{metrics['split']}` split were tested."
    if not data.counts:
        return text
    splits = list(dict.fromkeys(split for counts in data.counts.values() for split in counts))
    rows = [
        (_cell(label), *(str(counts.get(split, 0)) for split in splits))
        for label, counts in data.counts.items()
    ]
    rest = f"\n\nand {len(rows) - _MOST_ROWS} more classes" if len(rows) > _MOST_ROWS else ""
    return f"{text}\n\n{_table(('class', *splits), rows[:_MOST_ROWS])}{rest}"


def _usage(card: Card) -> str:
    if not loads_in_timm(card):
        return 'import finetune\n\nprint(finetune.load("PATH/OF/THIS/FOLDER").predict("photo.jpg").label)'
    return 'import timm\n\nmodel = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True).eval()'


def _input_sentence(card: Card) -> str:
    view = card.preprocessing
    kind, unit = "RGB", "in [0, 1]"
    if view.kind == "bands":
        kind, unit = count(view.channels, "channel"), "in the numbers of the files"
    return (
        f"Input: {kind}, {' x '.join(map(str, view.size))} pixels (`crop_pct` {view.crop_pct:.4g}, "
        f"{view.resize}, {view.interpolation}), {unit}, mean {view.mean}, std {view.std}."
    ) + _range_sentence(view)


def _range_sentence(view: Preprocessing) -> str:
    """Return how images of more than 8 bits become images of 8; empty if the model was trained on none."""
    if view.value_range is None:
        return ""
    low, high = view.value_range
    return (
        f" Images of more than 8 bits are first brought to 8: {low:g} becomes 0 and {high:g} becomes 255, "
        "the same for every image. `finetune` does this; other programs must do it themselves."
    )


def _output_sentence(card: Card) -> str:
    if card.temperature == 1.0:
        return f"Output: logits; {ACTIVATION} gives the probabilities that the metrics are computed from."
    return (
        f"Output: logits. Divide them by the temperature {card.temperature:.6g} and apply {ACTIVATION} to "
        'get calibrated probabilities. Only the metrics marked "with the temperature" use it; the other log '
        f"loss is that of {ACTIVATION} alone."
    )


def _source(card: Card, metrics: Metrics, source: str) -> str:
    if not source:
        return "The network was trained from random weights."
    started = metrics.get("backbone") or card.name
    known = started.startswith(("timm/", "torchvision/", "finetune/", "hf-hub:"))
    name = f"`{started}`" if known else "another run or folder"
    terms = f"{card.license or 'unknown licence'}; {card.origin or 'no paper recorded'}"
    return f"The initial weights are those of {name} ({terms}). Their licence also applies to this model."


def _class_list(card: Card) -> str:
    return _names(make_unique(card.label_names), "config.json") or "without names"


def _names(names: Sequence[str], rest: str = "metrics.json") -> str:
    shown = ", ".join(_code(name) for name in names[:20])
    return shown + (f" and {len(names) - 20} more ({rest})" if len(names) > 20 else "")


def _code(text: str) -> str:
    """Return text as inline Markdown code on one line; HTML and backticks in it are literal."""
    line = sanitize(" ".join(text.split()))
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def _cell(text: str) -> str:
    """Return inline code for a table cell, with bars escaped."""
    return _code(text).replace("|", "\\|")
