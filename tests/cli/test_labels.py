"""Several labels and numbers, from training to the export: the same commands as for one class an image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

import finetune
from finetune.data.discover import discover
from finetune.data.prepare import draw_evenly
from finetune.data.split import SplitConfig
from finetune.errors import ExitCode
from tests.cli.test_processes import finetune as start
from tests.conftest import QUICK_RUN, Cli

KINDS = ("multi", "number")
COLUMN = {"multi": "label", "number": "value"}
"""Column of the answers of `finetune predict`."""


def draw(generator: np.random.Generator) -> tuple[Image.Image, str, str]:
    """An image whose quarters may be red, green or blue: its colours, and how bright it is."""
    pixels = np.full((32, 32, 3), generator.integers(0, 120), dtype=np.uint8)
    colours = {"red": (230, 30, 30), "green": (30, 230, 30), "blue": (30, 30, 230)}
    own = [name for name in sorted(colours) if generator.random() < 0.5]
    for quarter, name in enumerate(own):
        top, left = divmod(quarter, 2)
        pixels[16 * top : 16 * top + 16, 16 * left : 16 * left + 16] = colours[name]
    noise = generator.integers(0, 25, pixels.shape, dtype=np.uint8)  # no two images are the same
    return Image.fromarray(pixels + noise), "|".join(own), repr(float(pixels.mean()))


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_tables(tmp_path_factory.mktemp("tables"))


def draw_tables(folder: Path) -> Path:
    """Write ``multi.csv`` and ``number.csv`` beside their images, with splits."""
    folder.mkdir(exist_ok=True)
    generator, rows = np.random.default_rng(0), []
    for index in range(120):
        image, labels, value = draw(generator)
        image.save(folder / f"{index}.png")
        split = "train" if index < 64 else "val" if index < 92 else "test"
        rows.append({"path": f"{index}.png", "labels": labels, "value": value, "split": split})
    table = pd.DataFrame(rows)
    table[["path", "labels", "split"]].to_csv(folder / "multi.csv", index=False)
    table[["path", "value", "split"]].to_csv(folder / "number.csv", index=False)
    return folder


def invoke(*words: object) -> str:
    from finetune.cli.app import app

    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def run(kind: str, tables: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp(kind) / "run"
    words = ("-b", tiny, "-d", tables / f"{kind}.csv", "-s", "full", *QUICK_RUN, "--lr", 0.02)
    invoke("run", *words, "-o", output)
    return output


def read(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def test_a_run_judges_its_kind(run: Path, kind: str) -> None:
    metrics = read(run / "metrics.json")
    assert metrics["target"] == kind
    assert metrics["split"] == "test"
    score = {"multi": "map", "number": "r2"}[kind]
    low, high = metrics["intervals"][score]
    assert low < metrics[score] < high
    assert metrics[score] > {"multi": 0.6, "number": 0.3}[kind]
    assert f"eval_{score}" in pd.read_csv(run / "history.csv").columns
    assert metrics[f"val_{score}"] == pytest.approx(pd.read_csv(run / "history.csv")[f"eval_{score}"].max())
    page = (run / "report.html").read_text(encoding="utf-8")
    assert {"multi": "mean average precision", "number": "mean absolute error"}[kind] in page
    heading = {"multi": "The most confident mistakes", "number": "The largest errors"}[kind]
    assert heading in page and page.count("evidence for") >= page.count('<p class="path">') > 5
    assert ("confusion" in page.lower()) == (run / "confusion_matrix.csv").exists() is False


@pytest.mark.parametrize("strategy", ["solved", "best", "freeze", "top", "scratch"])
def test_every_strategy_learns_it(kind: str, strategy: str, tables: Path, tiny: Path, tmp_path: Path) -> None:
    features = {"solved": "all", "best": "best"}.get(strategy)
    words = ["-s", "freeze", "--set", f"strategy.features={features}"] if features else ["-s", strategy]
    invoke("run", "-b", tiny, "-d", tables / f"{kind}.csv", *words, *QUICK_RUN, "-o", tmp_path / "run")
    metrics = read(tmp_path / "run" / "metrics.json")
    assert np.isfinite(metrics[{"multi": "map", "number": "r2"}[kind]])
    if features:
        assert metrics[{"multi": "map", "number": "r2"}[kind]] > 0.5


def test_answers_of_a_model_are_those_of_the_run(run: Path, kind: str, tables: Path, tmp_path: Path) -> None:
    told = pd.read_csv(run / "predictions.csv", dtype={"label": str}, keep_default_na=False)
    (tmp_path / "images").mkdir()
    for path in told["path"]:
        shutil.copyfile(tables / path, tmp_path / "images" / path)
    invoke("predict", run, tmp_path / "images", "-o", tmp_path / "answers.csv")
    found = pd.read_csv(tmp_path / "answers.csv", keep_default_na=False).set_index("path").loc[told["path"]]
    column = COLUMN[kind]
    if kind == "number":
        assert found[column].to_numpy() == pytest.approx(told["predicted"].astype(float).to_numpy(), abs=1e-2)
        assert (found["low"] < found[column]).all() and (found[column] < found["high"]).all()
    else:
        assert found[column].tolist() == told["predicted"].tolist()
        names = ["prob_blue", "prob_green", "prob_red"]
        assert found[names].to_numpy() == pytest.approx(told[names].to_numpy(), abs=1e-4)
    first = tmp_path / "images" / told["path"][0]
    prediction = finetune.load(run).predict(first)
    assert prediction.confidence is None
    expected = found[column].iloc[0]
    assert prediction.label == expected or float(prediction.label) == pytest.approx(expected, abs=1e-3)


def test_an_evaluation_gives_the_runs_metrics(run: Path, kind: str, tables: Path, tmp_path: Path) -> None:
    own, told = tmp_path / "own", read(run / "metrics.json")
    invoke("evaluate", run, "-o", own)
    other = tmp_path / "other"
    invoke("evaluate", run, "-d", tables / f"{kind}.csv", "--split", "test", "-o", other)
    score = {"multi": "map", "number": "r2"}[kind]
    for folder in (own, other):
        found = read(folder / "metrics.json")
        assert found["target"] == kind
        assert found["num_samples"] == told["num_samples"]
        assert found[score] == pytest.approx(told[score], abs=1e-4)
        assert (folder / "report.html").exists()


@pytest.mark.parametrize("format", ["timm", "onnx"])
def test_an_export_gives_the_same_answers(run: Path, kind: str, format: str, tmp_path: Path) -> None:
    words = () if format == "timm" else ("--with-softmax",)
    invoke("export", run, "--format", format, *words, "-o", tmp_path / "model")
    report = read(tmp_path / "model" / "export.json")
    assert report["max_difference"] < 1e-4 * (100 if kind == "number" else 1)
    if format == "timm":
        config = read(tmp_path / "model" / "config.json")
        problem = {"multi": "multi_label_classification", "number": "regression"}[kind]
        assert config["problem_type"] == problem
        assert config["finetune"]["target"]["kind"] == kind


def test_a_stopped_run_ends_in_the_same_bits(
    run: Path, kind: str, tables: Path, tiny: Path, tmp_path: Path
) -> None:
    words = ("-b", tiny, "-d", tables / f"{kind}.csv", "-s", "full", *QUICK_RUN, "--lr", 0.02)
    invoke("run", *words, "--epochs", 2, "-o", tmp_path / "run")
    invoke("run", *words, "-o", tmp_path / "run", "--allow-changed")
    again = tmp_path / "again"
    invoke("run", *words, "-o", again)
    for name in ("model/model.safetensors", "predictions.csv", "split.csv"):
        assert (again / name).read_bytes() == (run / name).read_bytes()


def test_an_unknown_kind_is_refused(kind: str, tables: Path, tiny: Path, tmp_path: Path, cli: Cli) -> None:
    words = ("-d", tables / f"{kind}.csv", "--target", "boxes", "-o", tmp_path / "run")
    result = cli("run", "-b", tiny, *words)
    assert result.exit_code == ExitCode.USAGE, result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verify", ["false", "true"])
def test_a_strategy_is_chosen_for_it(
    kind: str, verify: str, tables: Path, tiny: Path, tmp_path: Path, cli: Cli
) -> None:
    words = ("--set", f"advise.verify={verify}", *QUICK_RUN, "-o", tmp_path / "run")
    said = cli("run", "-b", tiny, "-d", tables / f"{kind}.csv", "-s", "auto", *words)
    assert said.exit_code == 0, said.output
    assert "leave-one-out R squared" in said.output
    assert ("not verified" in said.output) == (kind == "multi" and verify == "true")
    advice = read(tmp_path / "run" / "advice.json")
    assert advice["metric"] == "r2"
    assert advice["normalised_leep"] is None
    assert all(depth["score"] <= 1 and depth["score_error"] > 0 for depth in advice["depths"])
    assert max(candidate["score"] for candidate in advice["candidates"]) > 0.3
    score = {"multi": "map", "number": "r2"}[kind]
    assert read(tmp_path / "run" / "metrics.json")[score] > 0.5


def test_advice_is_given_for_it(kind: str, tables: Path, tiny: Path, tmp_path: Path) -> None:
    said = invoke("advise", "-b", tiny, "-d", tables / f"{kind}.csv", "--workers", 0, "-o", tmp_path / "out")
    assert "strategy: freeze" in said
    assert (tmp_path / "out" / "probe.png").exists()


def test_some_images_of_many_numbers_are_drawn_from_the_whole_range(tables: Path) -> None:
    dataset = discover(tables / "number.csv", SplitConfig(0.2, 0)).prepared({})
    few = draw_evenly(dataset, 20, 0)
    values = sorted(float(few.label_of(sample)) for sample in few.samples)
    every = sorted(float(dataset.label_of(sample)) for sample in dataset.of("train"))
    assert len(values) == 20 and draw_evenly(dataset, 20, 1).samples != few.samples
    tenth = len(every) // 10
    assert values[1] <= every[2 * tenth] and values[-2] >= every[-2 * tenth]


@pytest.mark.parametrize(
    "key", ["training.class_weights=balanced", "training.label_smoothing=0.1", "training.mixup=0.2"]
)
def test_numbers_have_no_classes(key: str, tables: Path, tiny: Path, tmp_path: Path, cli: Cli) -> None:
    result = cli("run", "-b", tiny, "-d", tables / "number.csv", "--set", key, "-o", tmp_path / "run")
    assert result.exit_code == ExitCode.USAGE
    assert "labels are numbers" in result.output


def test_wrong_numbers_do_not_rule_the_huber_loss(tables: Path, tiny: Path, tmp_path: Path, cli: Cli) -> None:
    """Every eighth training label is off by 20 deviations."""
    table = pd.read_csv(tables / "number.csv")
    wrong = table.index[table["split"] == "train"][::8]
    table.loc[wrong, "value"] = table["value"] + 20 * table["value"].std()
    table["path"] = [f"images/{path}" for path in table["path"]]
    (tmp_path / "images").symlink_to(tables)
    table.to_csv(tmp_path / "wrong.csv", index=False)
    errors = []
    for name, delta in (("squared", "null"), ("huber", 0.1)):
        words = ("-s", "full", *QUICK_RUN, "--lr", 0.02, "--set", f"training.huber_delta={delta}")
        links = ("--set", "data.follow_links=true")
        invoke("run", "-b", tiny, "-d", tmp_path / "wrong.csv", *words, *links, "-o", tmp_path / name)
        errors.append(read(tmp_path / name / "metrics.json")["mae"])
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("multi", (), "labels are classes"),
        ("number", ("--set", "strategy.features=all"), "solves ridge regression"),
    ],
)
def test_the_huber_loss_is_refused_where_it_does_nothing(
    name: str, words: tuple[str, ...], said: str, tables: Path, tiny: Path, tmp_path: Path, cli: Cli
) -> None:
    huber = ("--set", "training.huber_delta=1", "-s", "freeze")
    result = cli("run", "-b", tiny, "-d", tables / f"{name}.csv", *huber, *words, "-o", tmp_path / "run")
    assert result.exit_code == ExitCode.USAGE
    assert said in result.output


def test_several_labels_are_weighted_smoothed_and_mixed(tables: Path, tiny: Path, tmp_path: Path) -> None:
    keys = ("training.class_weights=balanced", "training.label_smoothing=0.1", "training.mixup=0.2")
    sets = [word for key in keys for word in ("--set", key)]
    invoke(
        "run", "-b", tiny, "-d", tables / "multi.csv", "-s", "full", *sets, *QUICK_RUN, "-o", tmp_path / "run"
    )
    assert np.isfinite(read(tmp_path / "run" / "metrics.json")["map"])


@pytest.fixture(scope="session")
def solved(kind: str, tables: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp(f"solved-{kind}") / "solved"
    words = ("-s", "freeze", "--set", "strategy.features=all", *QUICK_RUN)
    invoke("run", "-b", tiny, "-d", tables / f"{kind}.csv", *words, "-o", output)
    return output


def test_runs_are_compared_by_their_score(
    run: Path, solved: Path, kind: str, tmp_path: Path, cli: Cli
) -> None:
    said = cli("compare", run, solved, "-o", tmp_path / "out", "--json")
    assert said.exit_code == 0, said.output
    found = read(tmp_path / "out" / "comparison.json")
    score = {"multi": "map", "number": "r2"}[kind]
    assert found["metric"] == score
    (pair,) = found["pairs"]
    scores = [read(folder / "metrics.json")[score] for folder in (run, solved)]
    assert [pair["first_score"], pair["second_score"]] == pytest.approx(scores, abs=1e-3)
    low, high = pair["interval"]
    assert low < pair["difference"] < high
    assert pair["claimed"] == (pair["p_value"] < 0.05 and not low <= 0 <= high)
    assert {"multi": "mean average precision", "number": "R squared"}[kind] in pair["sentence"]
    rows = pd.read_csv(tmp_path / "out" / "runs.csv")
    assert rows[score].tolist() == pytest.approx(scores) and "accuracy" not in rows.columns
    shown = cli("compare", run, solved)
    assert shown.exit_code == 0 and pair["sentence"] in shown.output


def test_a_run_and_its_evaluation_do_not_differ(run: Path, kind: str, tmp_path: Path, cli: Cli) -> None:
    invoke("evaluate", run, "-o", tmp_path / "own")
    said = cli("compare", run, tmp_path / "own", "--json")
    assert said.exit_code == 0, said.output
    (pair,) = json.loads(said.stdout)["pairs"]
    assert not pair["claimed"] and abs(pair["difference"]) < 1e-3


@pytest.mark.parametrize("damage", ["score", "value", "label"])
def test_what_does_not_belong_together_is_not_compared(
    run: Path, kind: str, damage: str, tmp_path: Path, cli: Cli
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    score, table = {"multi": "map", "number": "r2"}[kind], pd.read_csv(other / "predictions.csv", dtype=str)
    if damage == "score":
        (other / "metrics.json").write_text(json.dumps(read(run / "metrics.json") | {score: 0.01}))
    column = {"multi": "prob_red", "number": "predicted"}[kind]
    if damage != "score":
        table.loc[0, column if damage == "value" else "label"] = "violet"
    table.to_csv(other / "predictions.csv", index=False)
    said = cli("compare", run, other)
    assert said.exit_code == ExitCode.DATA, said.output


def test_runs_of_two_kinds_are_not_compared(
    run: Path, kind: str, image_folder: Path, tiny: Path, tmp_path: Path, cli: Cli
) -> None:
    invoke("run", "-b", tiny, "-d", image_folder, "-s", "freeze", *QUICK_RUN, "-o", tmp_path / "classes")
    said = cli("compare", run, tmp_path / "classes")
    assert said.exit_code == ExitCode.DATA
    assert "has the score" in said.output


@pytest.mark.slow
def test_blocks_are_removed(run: Path, kind: str, tmp_path: Path) -> None:
    """The complete network has the error of the run."""
    invoke("explain", "ablate", run, "--workers", 0, "-o", tmp_path / "out")
    record, metrics = read(tmp_path / "out" / "explain.json"), read(run / "metrics.json")
    assert record["metric"] == {"multi": "map", "number": "r2"}[kind]
    assert record["error"] == pytest.approx(1 - float(str(metrics[record["metric"]])), abs=1e-3)
    table = pd.read_csv(tmp_path / "out" / "ablation.csv")
    assert (table["low"] <= table["increase"]).all() and (table["increase"] <= table["high"]).all()
    assert table["error"].to_numpy() == pytest.approx(record["error"] + table["increase"], abs=1e-5)
    assert table["increase"].abs().max() > 0.01


def test_answers_to_changed_images_are_followed(run: Path, kind: str, tables: Path, tmp_path: Path) -> None:
    """Of the class of an image that has one, and the most probable one of others; or of the number."""
    told = pd.read_csv(run / "predictions.csv", keep_default_na=False)
    words = ("explain", "invariance", run, "--layer", "last", "--workers", 0)
    invoke(*words, "--data", tables / f"{kind}.csv", "-o", tmp_path / "out")
    name = {"multi": "probabilities", "number": "values"}[kind]
    found = np.load(tmp_path / "out" / "invariance.npz")
    still = found[f"translation_{name}"][:, 5]
    if kind == "number":
        expected = told["predicted"].astype(float).to_numpy()
    else:
        alone = [label if label and "|" not in label else None for label in told["label"]]
        best = told[[f"prob_{name}" for name in ("blue", "green", "red")]].max(axis=1)
        expected = np.array(
            [
                probability if own is None else told[f"prob_{own}"][row]
                for row, (own, probability) in enumerate(zip(alone, best, strict=True))
            ]
        )
        assert None in alone and len({*alone}) > 2
    assert still == pytest.approx(expected, abs=1e-3)
    table = pd.read_csv(tmp_path / "out" / "invariance.csv")
    assert {*table["value"]} == {"distance", {"multi": "probability", "number": "value"}[kind]}


@pytest.mark.slow
def test_class_images_need_classes(run: Path, kind: str, tmp_path: Path, cli: Cli) -> None:
    words = ("explain", "class", run, "--class", "red", "--seeds", 1, "-o", tmp_path / "out")
    result = cli(*words)
    if kind == "number":
        assert result.exit_code == ExitCode.USAGE and "it predicts numbers" in result.stderr
        return
    assert result.exit_code == 0, result.output
    (row,) = pd.read_csv(tmp_path / "out" / "class-images.csv").to_dict("records")
    assert row["probability"] == pytest.approx(1 / (1 + np.exp(-row["score"])), abs=1e-3)


@pytest.mark.slow
def test_feature_maps_add_to_the_most_probable_output(
    run: Path, kind: str, tables: Path, tmp_path: Path
) -> None:
    invoke("explain", "maps", run, tables / "0.png", "--workers", 0, "-o", tmp_path / "out")
    (name,) = {*pd.read_csv(tmp_path / "out" / "maps.csv")["class"]}
    invoke("predict", run, tables / "0.png", "-o", tmp_path / "told.csv")
    told = pd.read_csv(tmp_path / "told.csv").iloc[0]
    columns = [column for column in told.index if column.startswith("prob_")]
    best = max(columns, key=lambda column: told[column]).removeprefix("prob_") if columns else "value"
    assert name == best


def test_labels_of_another_kind_are_refused(
    run: Path, image_folder: Path, tmp_path: Path, cli: Cli, kind: str
) -> None:
    result = cli("explain", "ablate", run, "--data", image_folder, "-o", tmp_path / "out")
    assert result.exit_code == ExitCode.DATA and f"those of {kind}" in result.stderr


@pytest.mark.slow
def test_backbones_are_ranked(kind: str, tables: Path, tiny: Path, tmp_path: Path, cli: Cli) -> None:
    """A network whose last stage is dead tells nothing."""
    from safetensors.torch import load_file, save_file

    dead = shutil.copytree(tiny, tmp_path / "dead")
    state = load_file(dead / "model.safetensors")
    dark = {key: 0 * value if "layer4" in key else value for key, value in state.items()}
    save_file(dark, dead / "model.safetensors")
    words = ("-d", tables / f"{kind}.csv", "--workers", 0, "--json")
    result = cli("advise", "--backbones", f"{dead},{tiny}", *words)
    assert result.exit_code == 0, result.output
    first, second = json.loads(result.stdout)
    assert first["metric"] == "r2" and str(tiny) in first["backbone"]
    assert first["score"] > second["score"] + 0.1


def test_no_other_command_takes_them_for_classes(run: Path, kind: str, tmp_path: Path, cli: Cli) -> None:
    commands = [
        ("probe", "--run", run, "--classifiers", "svm", "-o", tmp_path / "probe"),
        ("forecast", run, "-o", tmp_path / "forecast"),
        ("audit", run, "-o", tmp_path / "audit"),
        ("predict", run, tmp_path, "--top", 2, "-o", tmp_path / "top.csv"),
    ]
    for words in commands:
        result = cli(*words)
        assert result.exit_code not in (0, ExitCode.INTERNAL), (words, result.output)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["freeze", "solved", "full"])
def test_two_processes_have_the_metrics_of_one(
    kind: str, strategy: str, tables: Path, tiny: Path, tmp_path: Path
) -> None:
    ways = {
        "solved": ("-s", "freeze", "--set", "strategy.features=all"),
        "full": ("-s", "full", "--lr", 0.02),
    }
    way = ways.get(strategy, ("-s", strategy))
    words = ("run", "-b", tiny, "-d", tables / f"{kind}.csv", *way, *QUICK_RUN)
    invoke(*words, "-o", tmp_path / "one")
    variables = {"FINETUNE_STALL_TIMEOUT": "60", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = start(*words, "-o", tmp_path / "two", "--processes", 2, **variables)
    assert done.returncode == 0, done.stderr
    score = {"multi": "map", "number": "r2"}[kind]
    one, two = (read(tmp_path / name / "metrics.json") for name in ("one", "two"))
    assert two["num_samples"] == one["num_samples"]
    assert two[score] == pytest.approx(one[score], abs=1e-3 if strategy == "solved" else 0.02)
    rows = [pd.read_csv(tmp_path / name / "predictions.csv", dtype=str) for name in ("one", "two")]
    assert rows[0][["path", "label"]].equals(rows[1][["path", "label"]])
    for name, number in (("alone", 1), ("both", 2)):
        output = tmp_path / f"{name}.csv"
        done = start("predict", tmp_path / "one", tables, "-o", output, "--processes", number)
        assert done.returncode == 0, done.stderr
    alone, both = (pd.read_csv(tmp_path / f"{name}.csv").set_index("path") for name in ("alone", "both"))
    column = {"multi": "prob_red", "number": "value"}[kind]
    assert both.loc[alone.index, column].to_numpy() == pytest.approx(alone[column].to_numpy(), abs=1e-3)


def test_layers_are_probed_for_it(kind: str, tables: Path, tiny: Path, tmp_path: Path) -> None:
    per_class = {"multi": 20, "number": 6}[kind]
    words = ("-d", tables / f"{kind}.csv", "--per-class", per_class, "--repeats", 2, "--workers", 0)
    invoke("probe", "-b", tiny, *words, "-l", "layer1,layer4", "-o", tmp_path / "out")
    found = pd.read_csv(tmp_path / "out" / "probe.csv")
    score = {"multi": "map", "number": "r2"}[kind]
    assert found["classifier"].tolist() == [{"multi": "logreg", "number": "ridge"}[kind], "knn"] * 2
    assert (found[f"mean_{score}"] > 0.3).all() and (found[f"std_{score}"] < 0.3).all()
    assert (tmp_path / "out" / "probe.png").exists()


@pytest.mark.parametrize("command", ["cam", "saliency", "localise"])
def test_heat_maps_explain_it(run: Path, kind: str, command: str, tables: Path, tmp_path: Path) -> None:
    told = pd.read_csv(run / "predictions.csv").head(3)
    images = [tables / path for path in told["path"]]
    invoke("explain", command, run, *images, "--workers", 0, "-o", tmp_path / "out")
    found = pd.read_csv(tmp_path / "out" / ("boxes.csv" if command == "localise" else "heat-maps.csv"))
    if kind == "number" and command != "localise":
        assert found["value"].to_numpy() == pytest.approx(told["predicted"].to_numpy(), abs=1e-2)
    elif kind == "number":
        assert len(found) == 3
    elif command == "localise":
        names = ["blue", "green", "red"]
        best = told[[f"prob_{name}" for name in names]].to_numpy()
        assert found["class"].tolist() == [names[place] for place in best.argmax(axis=1)]
        assert found["probability"].to_numpy() == pytest.approx(best.max(axis=1), abs=1e-3)


@pytest.mark.parametrize("command", ["cam", "saliency"])
def test_every_class_that_is_predicted_has_a_map(
    run: Path, kind: str, command: str, tables: Path, tmp_path: Path
) -> None:
    """A class that no image has by its threshold is left out; an image without one has its most probable."""
    if kind == "number":
        pytest.skip("a number has no classes")
    told = pd.read_csv(run / "predictions.csv", keep_default_na=False).set_index("path")
    images = [tables / path for path in told.index]
    invoke("explain", command, run, *images, "--workers", 0, "-o", tmp_path / "out")
    found = pd.read_csv(tmp_path / "out" / "heat-maps.csv", keep_default_na=False)
    names = ["blue", "green", "red"]
    wanted = []
    for path, row in told.iterrows():
        own = [name for name in names if name in str(row["predicted"]).split("|")]
        own = own or [max(names, key=lambda name: row[f"prob_{name}"])]
        wanted += [
            (str(tables / str(path)), name) for name in sorted(own, key=lambda name: -row[f"prob_{name}"])
        ]
    assert len(wanted) > len(told)
    assert [Path(path).name for path in found["path"]] == [Path(path).name for path, _ in wanted]
    assert found["class"].tolist() == [name for _, name in wanted]
    for _, row in found.iterrows():
        assert row["probability"] == pytest.approx(
            told.loc[Path(row["path"]).name, f"prob_{row['class']}"], abs=1e-3
        )
    maps = np.load(tmp_path / "out" / "heat-maps.npz")
    assert maps["classes"].tolist() == found["class"].tolist() and len(maps["maps"]) == len(found)
    first = [number for number, (path, _) in enumerate(wanted) if path == wanted[0][0]]
    own = tmp_path / "own"
    invoke("explain", command, run, images[0], "--class", wanted[first[-1]][1], "--workers", 0, "-o", own)
    again = np.load(own / "heat-maps.npz")["maps"][0]
    assert maps["maps"][first[-1]] == pytest.approx(again, abs=1e-3)
    assert read(tmp_path / "out" / "explain.json")["num_images"] == len(told)


def test_the_class_of_a_heat_map_can_be_named(run: Path, kind: str, tables: Path, tmp_path: Path) -> None:
    if kind == "number":
        pytest.skip("a number has no classes")
    image = tables / pd.read_csv(run / "predictions.csv")["path"][0]
    invoke("explain", "cam", run, image, "--class", "red", "--workers", 0, "-o", tmp_path / "out")
    assert pd.read_csv(tmp_path / "out" / "heat-maps.csv")["class"].tolist() == ["red"]


def test_an_ensemble_averages_the_answers_of_its_members(
    run: Path, solved: Path, kind: str, tmp_path: Path
) -> None:
    invoke("evaluate", run, solved, "-o", tmp_path / "both")
    column = {"multi": "prob_red", "number": "predicted"}[kind]
    values = [pd.read_csv(folder / "predictions.csv")[column] for folder in (run, solved, tmp_path / "both")]
    assert values[2].to_numpy() == pytest.approx((values[0] + values[1]).to_numpy() / 2, abs=1e-3)
    score = {"multi": "map", "number": "r2"}[kind]
    variants = pd.read_csv(tmp_path / "both" / "variants.csv")
    assert variants[score].iloc[-1] == pytest.approx(read(tmp_path / "both" / "metrics.json")[score])


def test_several_crops_are_averaged(run: Path, kind: str, tmp_path: Path) -> None:
    invoke("evaluate", run, "--crops", 5, "-o", tmp_path / "five")
    variants = pd.read_csv(tmp_path / "five" / "variants.csv")
    assert variants["views"].tolist() == [1, 5]
    assert np.isfinite(variants[{"multi": "map", "number": "r2"}[kind]]).all()


@pytest.mark.slow
def test_wrong_labels_of_a_run_are_suspected(kind: str, tmp_path: Path, cli: Cli) -> None:
    table_file = draw_tables(tmp_path / "tables") / f"{kind}.csv"
    table, wrong = pd.read_csv(table_file, keep_default_na=False), ["5.png", "50.png", "100.png"]
    rows = table["path"].isin(wrong)
    if kind == "number":
        table.loc[rows, "value"] += 200
    else:
        inverted = [
            "|".join(sorted({"red", "green", "blue"} - {*label.split("|")})) for label in table["labels"]
        ]
        table.loc[rows, "labels"] = pd.Series(inverted)[rows]
    table.to_csv(table_file, index=False)
    words = ("-s", "freeze", "--set", "strategy.features=last", "--img-size", 64, *QUICK_RUN)
    invoke("run", "-b", "tf_efficientnet_lite0", "-d", table_file, *words, "-o", tmp_path / "run")
    result = cli("check", "--run", tmp_path / "run", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["num_judged"] == told["num_images"] == 120
    assert {"multi": "map", "number": "r2"}[kind] in told
    found = pd.read_csv(tmp_path / "out" / "label_issues.csv", keep_default_na=False, dtype={"label": str})
    first = [*found["path"][: len(wrong)]]
    assert first and set(first) <= set(wrong)  # of three flipped labels a classifier may learn some
    given = table.astype(str).set_index("path")[{"multi": "labels", "number": "value"}[kind]]
    assert found["label"].tolist() == given.loc[found["path"]].tolist()
    columns = {"multi": ["label_probability", "suggested_probability"], "number": ["error", "deviations"]}
    assert [*found.columns[3:5]] == columns[kind]
    assert (tmp_path / "out" / "label_issues.png").stat().st_size > 1000
    shown = cli("check", "--run", tmp_path / "run", "-o", tmp_path / "again")
    assert {"multi": "have the mean average precision", "number": "deviations"}[kind] in shown.output


def test_runs_of_a_series_are_averaged(kind: str, tables: Path, tiny: Path, tmp_path: Path) -> None:
    words = ("-b", tiny, "-d", tables / f"{kind}.csv", "-s", "freeze", "--epochs", 1, "--workers", 0)
    said = invoke("run", *words, "--repeats", 2, "--stall-timeout", 0, "-o", tmp_path / "series")
    score = {"multi": "map", "number": "r2"}[kind]
    series = read(tmp_path / "series" / "series.json")
    assert series["mean"][score] == pytest.approx(np.mean([run[score] for run in series["runs"]]))
    assert f"{series['mean'][score]:.4f} +/- " in said
