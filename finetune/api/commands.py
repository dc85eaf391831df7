"""Train, test, predict and export: the functions behind ``finetune run`` and its neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from finetune.api.shared import AnyPath, loading_torch, to_path
from finetune.recipe import Recipe
from finetune.recipe.flags import Flags, build_recipe, split_words
from finetune.runs.folder import default_folder
from finetune.system.display import Display
from finetune.system.signals import StopSignal

if TYPE_CHECKING:
    from finetune.evaluation.compare_runs import ComparisonResult
    from finetune.features.probe import ProbeRow
    from finetune.pipeline.advise import Advice
    from finetune.pipeline.run import Run
    from finetune.system.distributed import Distributed


def run(
    *,
    recipe: Recipe | str | None = None,
    settings: Mapping[str, Any] | None = None,
    output: AnyPath | None = None,
    allow_changed: bool = False,
    display: Display | None = None,
    distributed: Distributed | None = None,
    **flags: Unpack[Flags],
) -> Run:
    """Fine-tune a backbone on a folder of images, as ``finetune run`` does.

    Args:
        recipe: a whole recipe, the name of a shipped one, or the path of a YAML file.
        settings: other keys of the recipe, such as ``{"training.weight_decay": 0.0}``.
        output: the run folder, by default ``runs/<time>-<backbone>-<strategy>``; this run in it is resumed.
        allow_changed: resume a run even if its recipe, images or weights have changed.
        display: where progress is shown; stderr by default.
        distributed: the processes that share the work; by default this one alone.
        flags: ``data``, ``backbone``, ``strategy``, ``epochs``, ``lr`` and so on
            (:class:`finetune.recipe.flags.Flags`).

    Returns:
        The finished run: its folder, and the content of its ``metrics.json``.

    Raises:
        FinetuneError: every refusal and failure; its ``exit_code`` is documented in docs/errors.md.
    """
    wanted = build_recipe(recipe, flags, settings)
    with loading_torch(display) as shown:
        from finetune.pipeline.run import run as run_recipe
        from finetune.system.distributed import SINGLE_PROCESS
    return run_recipe(wanted, to_path(output), shown, allow_changed, distributed or SINGLE_PROCESS)


def dry_run(
    *,
    recipe: Recipe | str | None = None,
    settings: Mapping[str, Any] | None = None,
    output: AnyPath | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> dict[str, Any]:
    """Return what :func:`run` would train, cache and need, as plain JSON (docs/strategies.md).

    The arguments are those of :func:`run`; the run folder is not created.
    """
    wanted = build_recipe(recipe, flags, settings)
    with loading_torch(display) as shown:
        from finetune.pipeline.dry_run import dry_run as show_run
    return show_run(wanted, to_path(output), shown)


def advise(
    *,
    recipe: Recipe | str | None = None,
    settings: Mapping[str, Any] | None = None,
    output: AnyPath | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> Advice:
    """Choose a strategy by the number of images and their similarity to what the backbone was trained on.

    Args:
        recipe, settings: see :func:`run`.
        output: a folder for ``advice.json``, ``probe.png`` and ``matrix.png``; None writes nothing.
        display, flags: see :func:`run`.

    Raises:
        DataError: the images have no labels.
        FinetuneError: every other refusal and failure.
    """
    wanted, folder = build_recipe(recipe, flags, settings), to_path(output)
    with loading_torch(display) as shown:
        from finetune.pipeline.advise import advise as advise_strategy
        from finetune.pipeline.auto import write_advice
        from finetune.runs.outcome import translated_errors
    with translated_errors():
        advice = advise_strategy(wanted, shown, folder)
        if folder is not None:
            write_advice(advice, folder)
            shown.say(f"{folder}/advice.json, probe.png, matrix.png")
    return advice


def check(
    *,
    recipe: Recipe | str | None = None,
    settings: Mapping[str, Any] | None = None,
    output: AnyPath | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> dict[str, Any]:
    """Look at every image of a data set, and list what would make a metric misleading.

    Args:
        recipe, settings: see :func:`run`.
        output: a new folder for ``check.json`` and ``check.png``; by default ``runs/<time>-check``.
        display: see :func:`run`.
        flags: see :func:`run`; ``data``, ``group_by``, ``folds``, ``val_fraction``, ``seed`` and
            ``allow_leaks`` count.

    Returns:
        The content of ``check.json``. A run would accept the data where ``errors`` is 0. Nothing is written
        for a path that does not exist.
    """
    wanted = build_recipe(recipe, flags, settings)
    with loading_torch(display) as shown:
        from finetune.data.quality.check import check as check_data
    return check_data(wanted, to_path(output) or default_folder("check"), shown)


def extract(
    *,
    output: AnyPath,
    layers: str | Sequence[str] = "all",
    pool: str = "auto",
    format: str | None = None,
    recipe: Recipe | str | None = None,
    settings: Mapping[str, Any] | None = None,
    display: Display | None = None,
    distributed: Distributed | None = None,
    **flags: Unpack[Flags],
) -> dict[str, Any]:
    """Write the features of a network's layers as tables, all from one forward pass.

    Args:
        output: a folder, which gets a table for each layer, or a ``.csv``, ``.parquet`` or ``.npz`` file.
        layers: stages, modules and patterns; ``all``, ``last`` or ``pre_logits``.
        pool: how a feature map becomes a row: one of :data:`pretrained.graph.pooling.POOLS`.
        format: ``csv``, ``parquet`` or ``npz``; by default that of the output's suffix, else CSV.
        recipe, settings, display, distributed, flags: see :func:`run`.

    Returns:
        Counts and paths.
    """
    wanted = build_recipe(recipe, flags, settings)
    with loading_torch(display) as shown:
        from finetune.features.extract import extract as extract_features
        from finetune.system.distributed import SINGLE_PROCESS
        from pretrained.graph.pooling import read_pool
    return extract_features(
        wanted,
        split_words(layers),
        Path(fspath(output)),
        read_pool(pool),
        format,
        display=shown,
        distributed=distributed or SINGLE_PROCESS,
    )


def probe(
    *,
    output: AnyPath | None = None,
    layers: str | Sequence[str] = "all",
    per_class: int = 30,
    classifiers: str | Sequence[str] = (),
    repeats: int = 5,
    pool: str = "auto",
    recipe: Recipe | str | None = None,
    settings: Mapping[str, Any] | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> list[ProbeRow]:
    """Find out which layer is best: train classifiers on the features of each.

    Args:
        output: a new folder for ``probe.csv`` and ``probe.png``; by default ``runs/<time>-probe``.
        layers: see :func:`extract`.
        per_class: training images of each class; the others are tested.
        classifiers: of ``svm``, ``softmax``, ``logreg``, ``ridge`` and ``knn``; by default
            ``svm,softmax,knn``, of several labels ``logreg,knn``, and of numbers ``ridge,knn``.
        repeats: draws of training images.
        pool: see :func:`extract`.
        recipe, settings, display, flags: see :func:`run`.
    """
    wanted = build_recipe(recipe, flags, settings)
    with loading_torch(display) as shown:
        from finetune.features.probe import probe as probe_layers
        from finetune.features.probe import read_classifiers
        from pretrained.graph.pooling import read_pool
    kinds = read_classifiers(split_words(classifiers))
    folder = to_path(output) or default_folder("probe")
    return probe_layers(
        wanted, split_words(layers), per_class, kinds, repeats, folder, read_pool(pool), shown
    )


def evaluate(
    models: AnyPath | Sequence[AnyPath],
    *,
    data: AnyPath | None = None,
    split: str | None = None,
    crops: int = 1,
    scales: Sequence[int] = (),
    output: AnyPath | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    offline: bool = False,
    follow_links: bool = False,
    allow_leaks: bool = False,
    display: Display | None = None,
) -> dict[str, Any]:
    """Test finished models on labelled images, and write metrics, predictions and a report.

    Args:
        models: finished runs or model folders; several are an ensemble.
        data: a folder, archive or CSV with labels; by default the images of the first model's run.
        split: ``train``, ``val``, ``test`` or ``all``; by default the split that the data offer.
        crops: 1, 5 or 10 views of each image, averaged.
        scales: short sides in pixels to which each image is resized as well.
        output: a new folder; by default ``runs/<time>-evaluate``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        batch_size: images that go through the network at a time.
        workers: decoding threads.
        offline: never ask the network.
        follow_links: read images through links that lead out of the folder.
        allow_leaks: also test on images that a model was trained on.
        display: see :func:`run`.

    Returns:
        The content of ``metrics.json``.
    """
    with loading_torch(display) as shown:
        from finetune.data.inputs import read_split_name
        from finetune.evaluation.evaluate import EvaluateRequest, evaluate_models
        from finetune.report.write_report import add_report
    listed = [models] if isinstance(models, str | PathLike) else models
    request = EvaluateRequest(
        models=tuple(fspath(one) for one in listed),
        data=to_path(data),
        split=read_split_name(split),
        crops=crops,
        scales=tuple(scales),
        output=to_path(output) or default_folder("evaluate"),
        device=device,
        batch_size=batch_size,
        workers=workers,
        offline=offline,
        follow_links=follow_links,
        allow_leaks=allow_leaks,
    )
    metrics = evaluate_models(request, shown, lambda folder: add_report(folder, shown, request.command))
    return {"output": str(request.output), **metrics}


def predict(
    model: AnyPath,
    images: AnyPath,
    output: AnyPath,
    *,
    format: str | None = None,
    top: int = 1,
    reject_below: float | None = None,
    crops: int = 1,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    null: bool = False,
    follow_links: bool = False,
    offline: bool = False,
    display: Display | None = None,
    distributed: Distributed | None = None,
) -> dict[str, Any]:
    """Predict any number of images, and write one row for each; :func:`load` predicts in memory.

    Args:
        model: a finished run, an exported folder, or a name with published weights.
        images: a file, a folder, a CSV with a column ``path``, a pattern, or ``-`` for paths on stdin.
        output: a ``.csv``, ``.jsonl`` or ``.parquet`` file. An interrupted prediction is resumed.
        format: ``csv``, ``jsonl`` or ``parquet``; by default that of the output's suffix, else CSV.
        top: classes to name, the most probable first.
        reject_below: no label under this confidence, in [0, 1].
        crops: 1, 5 or 10 views of each image, averaged.
        batch_size: images that go through the network at a time.
        workers: decoding threads.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        null: paths on stdin end with a zero byte.
        follow_links: read images through links that lead out of the folder.
        offline: never ask the network.
        display, distributed: see :func:`run`.

    Returns:
        Counts, paths and speed.
    """
    with loading_torch(display) as shown:
        from finetune.evaluation.predict_files import PredictRequest, predict_files
        from finetune.system.distributed import SINGLE_PROCESS
    request = PredictRequest(
        model=fspath(model),
        input=fspath(images),
        output=Path(fspath(output)),
        format=format,
        top=top,
        reject_below=reject_below,
        crops=crops,
        batch_size=batch_size,
        workers=workers,
        device=device,
        nul=null,
        follow_links=follow_links,
        offline=offline,
    )
    return predict_files(request, shown, distributed or SINGLE_PROCESS)


def export(
    run: AnyPath,
    output: AnyPath,
    *,
    format: str = "timm",
    preprocessing: str | None = None,
    probabilities: bool = False,
    opset: int | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Export a model, and verify in a fresh process that it gives the run's predictions.

    Args:
        run: a finished run, or a model folder.
        output: a new folder.
        format: ``timm``, ``onnx`` or ``torch-export``.
        preprocessing: ``nchw`` or ``nhwc``: the graph takes uint8 RGB images, and normalises them itself.
        probabilities: the graph gives probabilities instead of logits, with the temperature applied.
        opset: of ONNX, 18 to 23.
        display: see :func:`run`.

    Returns:
        The content of ``export.json``.
    """
    with StopSignal():
        with loading_torch(display) as shown:
            from finetune.exporters.export import export as export_model
            from finetune.exporters.export import parse_export_options
        wanted = parse_export_options(format, preprocessing, probabilities, opset)
        return export_model(Path(fspath(run)), wanted, Path(fspath(output)), shown)


def compare(
    runs: Sequence[AnyPath], output: AnyPath | None = None, *, display: Display | None = None
) -> ComparisonResult:
    """Compare runs on the images that all of them tested: a table, and a paired test for each pair.

    Args:
        runs: folders of at least two runs or evaluations.
        output: a new folder for tables and a plot; None writes nothing.
        display: see :func:`run`.
    """
    with loading_torch(display) as shown:
        from finetune.evaluation.compare_runs import compare_runs
    return compare_runs([Path(fspath(one)) for one in runs], to_path(output), shown)
