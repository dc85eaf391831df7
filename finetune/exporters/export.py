"""``finetune export`` and ``finetune push``: write a model in another format and verify it before it appears.

::

    run or model folder -> network -> artefact in a temporary folder -> fresh process -> compared -> renamed
                           evaluated images ---------------------------^
"""

from __future__ import annotations

import os
import platform
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from torch import Tensor

from finetune import __version__
from finetune.data.dataset import Dataset
from finetune.data.prepare import check_outside
from finetune.errors import UsageError, suggest
from finetune.evaluation.predictions import GPU_TOLERANCE, METRICS_TOLERANCE
from finetune.exporters.config import loads_in_timm
from finetune.exporters.deployed import LAYOUTS, Interface, Layout, build_program
from finetune.exporters.folder import WEIGHTS_FILE, write_model
from finetune.exporters.graph_files import OPSETS, read_versions, write_companions, write_onnx, write_program
from finetune.exporters.hub import Pushed, check_push, push_folder
from finetune.exporters.model_card import TrainingData, build_readme
from finetune.exporters.proof import (
    TOLERANCE,
    OutputCheck,
    check_comparison,
    compare,
    predict_fresh,
    predict_here,
)
from finetune.exporters.source import Exportable, ProofInputs, draw_random, load_evaluated, open_model
from finetune.recipe import Recipe
from finetune.runs.claim import check_name
from finetune.runs.files import disk_error, write_json
from finetune.runs.new_folder import new_folder
from finetune.runs.reader import RunReader
from finetune.strategies import starts_random
from finetune.system.display import Display
from finetune.system.temporary import temporary_folder
from pretrained.catalog import Card

REPORT_FILE = "export.json"


def export(path: Path, options: ExportOptions, output: Path, display: Display) -> dict[str, Any]:
    """Write a model in another format, and verify it in a fresh process.

    Args:
        path: a finished run, or a model folder.
        options: format of the artefact, and its interface.
        output: a new folder.
        display: shows progress and warnings.

    Returns:
        The content of ``export.json``.

    Raises:
        UsageError: there is no model, the output is not empty or lies in the data, or the format cannot
            represent the network.
        DataError: the run is not finished, or its files are damaged.
        InternalError: the artefact's outputs differ from the network's; nothing is kept.
        DiskError: it cannot be written.
    """
    check_name(Path(os.path.realpath(output)))  # a fresh process loads it by its whole path
    source = open_model(path)
    _check_layout(source.card, options.interface)
    if isinstance(source.images, Dataset):
        check_outside(output, source.images)
    with new_folder(output) as folder:
        report = _make(source, options, folder, display)
    display.say(f"{options.format} {output}", style="bold")
    return report


def push(path: Path, repo_id: str, private: bool, display: Display) -> Pushed:
    """Export a model in timm's format, verify it, and upload it to a repository of the Hugging Face hub.

    Args:
        path: a finished run, or a model folder.
        repo_id: ``ORG/NAME``, or ``NAME`` for the user's own account; created if it does not exist.
        private: create the repository as private.
        display: shows progress and warnings.

    Raises:
        UsageError: there is no model, or ``repo_id`` is invalid.
        DataError: as :func:`export`.
        EnvironmentFaultError: offline mode is on, there is no network, or the hub refuses.
        InternalError: as :func:`export`.
    """
    check_push(repo_id)
    source = open_model(path)
    with temporary_folder("finetune-push-") as folder:
        _make(source, ExportOptions("timm", Interface()), folder, display)
        with display.busy("uploading"):
            return push_folder(folder, repo_id, private)


# --- export and verification ---------------------------------------------------------------------


def _make(source: Exportable, options: ExportOptions, folder: Path, display: Display) -> dict[str, Any]:
    """Write the artefact into a folder, verify it, and write ``export.json``."""
    start = time.monotonic()
    with display.busy(f"exporting {options.format}"):
        try:
            artefact, loaders = _write(source, options, folder, display)
        except OSError as error:
            raise disk_error(folder, error) from None
    written = time.monotonic()
    if loaders == ("finetune",):
        display.warn(f"only finetune can load {source.card.architecture} from this folder")
    inputs = _find_inputs(source, display)
    found, facts = dict[str, Tensor](), dict[str, Any]()
    with display.busy("comparing in a fresh process"):
        expected = predict_here(source.network, source.card, inputs.views)
        for loader in loaders:
            found[loader], its = predict_fresh(loader, artefact, inputs, source.card, options.interface)
            facts |= its
    comparisons = _check(source, options, inputs, expected, found)
    _report(inputs, comparisons, display)
    seconds = {"export": round(written - start, 3), "compare": round(time.monotonic() - written, 3)}
    report = _describe(source, options, artefact, loaders[0], facts) | _describe_proof(inputs, comparisons)
    report |= {"seconds": seconds}
    write_json(folder / REPORT_FILE, report)
    return report


def _write(
    source: Exportable, options: ExportOptions, folder: Path, display: Display
) -> tuple[Path, tuple[str, ...]]:
    """Write the artefact; return its path and the names of its loaders (see ``fresh.py``)."""
    card = source.card
    if options.format == "timm":
        write_model(folder, card, source.network, _build_card(source, display))
        return folder, _find_loaders(card)
    program = build_program(source.network, card, options.interface)
    write_companions(folder, card, options.interface)
    if options.format == "onnx":
        return write_onnx(program, folder, card, options.interface, options.opset), ("onnx",)
    return write_program(program, folder), ("torch-export",)


def _find_loaders(card: Card) -> tuple[str, ...]:
    """Return the libraries that must load a folder of timm's format: transformers too if installed."""
    if not loads_in_timm(card):
        return ("finetune",)
    return ("timm", "transformers") if find_spec("transformers") else ("timm",)


def _build_card(source: Exportable, display: Display) -> str:
    """Return the model card; of a run whose ``metrics.json`` was damaged, one without metrics."""
    metrics = RunReader(source.run, tolerant=True).metrics if source.run is not None else {}
    started = "" if starts_random(str(metrics.get("strategy"))) else source.card.name
    data = _describe_data(source)
    try:
        return build_readme(source.card, metrics, started, data)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        display.warn(f"the model card has no metrics: metrics.json is not one of a run ({error!r:.200})")
        return build_readme(source.card, {}, started, data)


def _describe_data(source: Exportable) -> TrainingData:
    if source.run is None:
        return TrainingData()
    counts: dict[str, dict[str, int]] = {name: defaultdict(int) for name in source.card.label_names}
    for row in RunReader(source.run).split:
        counts.setdefault(row["label"], defaultdict(int))[row["split"]] += 1
    path = source.recipe.data.path if source.recipe else None
    return TrainingData(Path(path).name if path else "", counts)


def _check_layout(card: Card, interface: Interface) -> None:
    if interface.layout and not card.preprocessing.is_rgb:
        found = f"{card.name} takes no 8-bit RGB images"
        raise UsageError(f"--with-preprocessing {interface.layout}", found, "Leave it out.")


def _find_inputs(source: Exportable, display: Display) -> ProofInputs:
    """Return the run's evaluated images, or random inputs with a warning."""
    inputs = _load_inputs(source, display)
    if isinstance(inputs, str):
        inputs = draw_random(source.card, inputs)
        display.warn(f"{inputs.notes[0]}: compared on random inputs instead of the run's evaluated images")
        return inputs
    for note in inputs.notes:
        display.warn(note)
    return inputs


def _load_inputs(source: Exportable, display: Display) -> ProofInputs | str:
    if source.run is None or isinstance(source.images, str):
        return str(source.images)
    with display.busy("reading evaluated images"):
        return load_evaluated(source.run, source.images.root, source.card)


def _check(
    source: Exportable,
    options: ExportOptions,
    inputs: ProofInputs,
    expected: Tensor,
    found: Mapping[str, Tensor],
) -> dict[str, OutputCheck]:
    """Compare the outputs of each loader with the network's, and the first's with ``predictions.csv``."""
    asked = f"exporting {options.format} of {source.path}"
    first, *others = found
    comparisons = {"network": compare(expected, found[first])}
    if inputs.recorded is not None:
        tolerance = _recorded_tolerance(source.recipe)
        comparisons["predictions.csv"] = compare(inputs.recorded, found[first], tolerance)
    comparisons |= {loader: compare(expected, found[loader]) for loader in others}
    for what, comparison in comparisons.items():
        name = "those of the run's predictions.csv" if what == "predictions.csv" else "the network's"
        loaded = f", loaded with {what}," if what in others else ""
        check_comparison(f"{asked}{loaded}", name, comparison, len(inputs.views), inputs.source)
    return comparisons


def _recorded_tolerance(recipe: Recipe | None) -> float:
    """Return the tolerance against ``predictions.csv``, by the precision and device of the run."""
    if recipe is None or recipe.training.precision == "auto":
        return max(METRICS_TOLERANCE.values())
    kinds = {recipe.training.precision, recipe.cache.dtype}
    least = TOLERANCE if recipe.device == "cpu" else GPU_TOLERANCE
    return least if kinds == {"float32"} else max(least, *(METRICS_TOLERANCE[kind] for kind in kinds))


def _report(inputs: ProofInputs, comparisons: Mapping[str, OutputCheck], display: Display) -> None:
    for what, comparison in comparisons.items():
        same = "most probable class identical"
        if comparison.num_near_ties:
            differing, ties = comparison.num_top1_differences, comparison.num_near_ties
            same += f" (another one for {differing} of {ties} near ties)"
        against = "predictions.csv" if what == "predictions.csv" else "the network"
        loaded = " with transformers" if what == "transformers" else ""
        display.say(
            f"a fresh process{loaded} against {against}, {len(inputs.views)} {inputs.source}: largest "
            f"probability difference {comparison.max_difference:.2g}, {same}"
        )


# --- the report ----------------------------------------------------------------------------------


def _describe(
    source: Exportable, options: ExportOptions, artefact: Path, loader: str, facts: Mapping[str, Any]
) -> dict[str, Any]:
    card, interface = source.card, options.interface
    versions = {key: facts[key] for key in ("onnxruntime", "transformers") if key in facts}
    if options.format == "onnx":
        import onnx

        versions["onnx"] = onnx.__version__
    return {
        "format": options.format,
        "file": artefact.name if artefact.is_file() else WEIGHTS_FILE,
        "loads_with": {"onnx": "onnxruntime", "torch-export": "torch"}.get(loader, loader),
        "architecture": card.architecture,
        "num_classes": card.num_classes,
        "temperature": card.temperature,
        "versions": {
            "finetune": __version__,
            "torch": str(torch.__version__),
            "timm": timm.__version__,
            "python": platform.python_version(),
            **versions,
        },
        **(read_versions(artefact) if options.format == "onnx" else {"opset": None, "ir_version": None}),
        "inputs": [
            {
                "name": interface.input_name,
                "dtype": interface.input_dtype,
                "shape": ["batch", *interface.input_shape(card.preprocessing)],
            }
        ],
        "outputs": [
            {"name": interface.output_name, "dtype": "float32", "shape": ["batch", card.num_classes]}
        ],
    }


def _describe_proof(inputs: ProofInputs, comparisons: Mapping[str, OutputCheck]) -> dict[str, Any]:
    recorded, transformers = comparisons.get("predictions.csv"), comparisons.get("transformers")
    return {
        "compared_on": inputs.source,
        "num_images": len(inputs.views),
        "num_judged": inputs.num_evaluated,
        "notes": list(inputs.notes),
        **comparisons["network"].to_dict(),
        "predictions_csv": recorded.to_dict() if recorded else None,
        "transformers": transformers.to_dict() if transformers else None,
    }


# --- options of the command line -----------------------------------------------------------------


Format = Literal["timm", "onnx", "torch-export"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class ExportOptions:
    """Format of an export and its options.

    Attributes:
        format: format of the artefact.
        interface: input and output of a graph; unused by timm's format, which holds weights only.
        opset: version of ONNX's operators.
    """

    format: Format
    interface: Interface
    opset: int = OPSETS[0]


def parse_export_options(
    format: str, layout: str | None, with_probabilities: bool, opset: int | None
) -> ExportOptions:
    """Validate the options of the command line.

    Raises:
        UsageError: an option is unknown, or two contradict each other.
    """
    known = next((name for name in FORMATS if name == format), None)
    if known is None:
        found = f"the format is unknown{suggest(format, FORMATS)}"
        raise UsageError(f"--format {format}", found, f"Choose one of {', '.join(FORMATS)}.")
    if known == "timm" and (layout or with_probabilities):
        flag = "--with-preprocessing" if layout else "--with-softmax"
        fix = "Use --format onnx or torch-export."
        raise UsageError(flag, "timm's format holds weights only, no graph", fix)
    if opset is not None and known != "onnx":
        raise UsageError(f"--opset {opset}", f"--format {known} has no opset", "Leave it out.")
    if opset is not None and not OPSETS[0] <= opset <= OPSETS[1]:
        fix = f"Use {OPSETS[0]} to {OPSETS[1]}."
        raise UsageError(f"--opset {opset}", "torch's exporter does not support it", fix)
    return ExportOptions(known, Interface(_read_layout(layout), with_probabilities), opset or OPSETS[0])


def _read_layout(name: str | None) -> Layout | None:
    found = next((layout for layout in LAYOUTS if layout == name), None)
    if name is not None and found is None:
        fix = f"Use {' or '.join(LAYOUTS)}."
        raise UsageError(f"--with-preprocessing {name}", "the image layout is unknown", fix)
    return found
