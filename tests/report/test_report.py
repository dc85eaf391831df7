"""The report of a folder's files: its content, what it leaves out, and untrusted names."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from finetune.errors import UsageError
from finetune.report.facts import load_facts
from finetune.report.images import Explainer
from finetune.report.write_report import write_run_report
from finetune.runs.files import write_csv
from finetune.runs.folder import RunFolder
from finetune.system.display import SilentDisplay
from pretrained.backbone import load_source
from pretrained.catalog import find_card
from tests.conftest import Cli
from tests.report.folders import HOSTILE, write_folder
from tests.sweeps import slow_except

SECTIONS = (
    "result",
    "check",
    "mistakes",
    "data",
    "plan",
    "training",
    "confusion",
    "classes",
    "calibration",
    "next",
    "run",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = write_folder(tmp_path_factory.mktemp("made"), ("ants", "bees", "wasps"))
    write_run_report(folder, SilentDisplay(), command="finetune run --data x")
    return folder


@pytest.fixture
def copy(made: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(made.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def remake(folder: RunFolder) -> str:
    write_run_report(folder, SilentDisplay())
    return folder.report.read_text(encoding="utf-8")


def sections(html: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', html)


def change_metrics(folder: RunFolder, **values: object) -> None:
    metrics = json.loads(folder.metrics.read_text()) | values
    folder.metrics.write_text(json.dumps(metrics))


def test_every_section_is_there(made: RunFolder) -> None:
    html = made.report.read_text(encoding="utf-8")
    assert tuple(sections(html)) == SECTIONS
    accuracy = load_facts(made).number("accuracy")
    assert accuracy is not None
    assert f"<b>{100 * accuracy:.1f} %</b>" in html
    assert "95 % interval" in html and "The same images also chose the best epoch" in html
    assert f"finetune run --recipe {made.recipe.absolute()}" in html
    assert len(html) < 5_000_000


def test_the_heat_maps_lie_beside_it(made: RunFolder) -> None:
    from PIL import Image

    mistakes = load_facts(made).mistakes
    assert mistakes
    files = sorted(made.plots.glob("mistake-*.jpg"))
    assert files
    with Image.open(files[0]) as image:
        assert image.mode == "RGB" and min(image.size) > 100
    html = made.report.read_text(encoding="utf-8")
    embedded = base64.b64encode(files[0].read_bytes()).decode()
    assert embedded in html


def test_mistakes_are_sorted_by_confidence(made: RunFolder) -> None:
    html = made.report.read_text(encoding="utf-8")
    shown = re.findall(r"Predicted <b>(\w+)</b> with ([\d.]+) %, but labelled <b>(\w+)</b>", html)
    expected = [(one.predicted, f"{100 * one.size:.1f}", one.label) for one in load_facts(made).mistakes[:12]]
    assert shown == expected


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("file", "section"),
    [
        ("check.json", "check"),
        ("plan.csv", "plan"),
        ("history.csv", "training"),
        ("per_class.csv", "classes"),
        ("predictions.csv", "mistakes"),
    ],
)
@pytest.mark.parametrize("how", ["absent", "damaged"])
def test_unreadable_files_are_left_out(copy: RunFolder, file: str, section: str, how: str) -> None:
    path = copy.path / file
    path.unlink() if how == "absent" else path.write_bytes(b'{"\xff,\n1,2')
    html = remake(copy)
    assert section not in sections(html) and f'href="#{section}"' not in html
    assert set(sections(html)) >= set(SECTIONS) - {section, "data"}
    assert (f"could not be read: {file}" in html) == (how == "damaged")


def test_a_split_with_a_short_row_is_left_out(copy: RunFolder) -> None:
    copy.split.write_text(f"{copy.split.read_text()}train/x.jpg,ants\n")
    assert "could not be read: split.csv" in remake(copy)


@pytest.mark.slow
def test_old_metrics_are_enough(copy: RunFolder) -> None:
    old = {
        "accuracy": 0.5,
        "balanced_accuracy": 0.5,
        "f1_macro": 0.4,
        "loss": 1.0,
        "num_samples": 18,
        "split": "val",
    }
    copy.metrics.write_text(json.dumps(old))
    html = remake(copy)
    assert "calibration" not in sections(html) and "95 % interval" not in html
    assert "<b>50.0 %</b>" in html


STRANGE = [None, "many", [1], {"bins": [None]}, -1e400, {"temperature": "x"}]


@pytest.mark.slow
@pytest.mark.parametrize("value", slow_except(["many"], STRANGE))
def test_invalid_metrics_raise_no_exception(copy: RunFolder, value: object) -> None:
    for key in ("intervals", "calibration", "reject", "most_confused", "seconds", "features", "accuracy"):
        change_metrics(copy, **{key: value})
        remake(copy)


def test_an_evaluation_needs_no_recipe_and_no_model(made: RunFolder, copy: RunFolder) -> None:
    for path in (copy.recipe, copy.history, copy.plan, copy.split, copy.check, copy.advice, copy.environment):
        path.unlink()
    shutil.rmtree(copy.model)
    change_metrics(copy, data=str(made.path.parent / "data"), split_chose_checkpoint=False)
    html = remake(copy)
    assert "plan" not in sections(html) and "training" not in sections(html)
    assert "data:image/jpeg" in html and "evidence for" not in html
    assert "held out" in html and not list(copy.plots.glob("mistake-*"))
    change_metrics(copy, model=str(made.model))
    assert "evidence for" in remake(copy)


def test_evaluated_images_are_not_shown_as_a_training_split(copy: RunFolder) -> None:
    for path in (copy.recipe, copy.history, copy.plan, copy.check, copy.advice):
        path.unlink()
    copy.split.write_text(copy.split.read_text().replace(",val,", ",train,"))
    for part, words in (("all", "evaluated"), ("train", "training"), ("test", "test")):
        change_metrics(copy, split=part)
        html = remake(copy)
        assert f"On 18 {words} images of 3 classes" in html
        assert "raining images would help" not in html and "training images per class" not in html
        assert load_facts(copy).counts.keys() == {"test" if part == "test" else "evaluated"}


@pytest.mark.slow
def test_metrics_that_contradict_the_predictions_are_reported(copy: RunFolder) -> None:
    words = "The files do not belong together"
    assert words not in remake(copy)
    change_metrics(copy, num_samples=17)
    assert f"{words}: predictions.csv has 18 rows, but metrics.json counts 17 images" in remake(copy)
    change_metrics(copy, num_samples=18, accuracy=0.123)
    assert f"{words}: the accuracy is" in remake(copy) and "12.30 % in metrics.json" in remake(copy)
    copy.predictions.unlink()
    assert words not in remake(copy)


def reject_rows(html: str) -> list[list[str]]:
    [table] = re.findall(r'aria-label="Confidence thresholds">(.*?)</table>', html, re.DOTALL)
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
    return [[cell.strip() for cell in row] for row in rows]


@pytest.mark.slow
def test_thresholds_are_shown_with_what_they_achieved(copy: RunFolder) -> None:
    old = reject_rows(remake(copy))
    assert old[0] == ["wanted", "confidence from", "images answered", "achieved"]
    assert old[1] == ["90 %", "0.7000", "60.0 %", ""]
    new = {
        "precision": 0.9,
        "threshold": 0.7,
        "coverage": 0.5,
        "achieved": 8 / 9,
        "low": 0.8123,
        "num_images": 40,
    }
    change_metrics(
        copy, reject=[new, {"precision": 0.99, "threshold": None, "coverage": 0.0, "achieved": None}]
    )
    html = remake(copy)
    header, first, second = reject_rows(html)
    assert header[3:] == ["achieved", "at least"]
    assert first == ["90 %", "0.7000", "50.0 %", "88.9 % of 9 images", "81.2 %, by 40 images"]
    assert second == ["99 %", "not reached", "0.0 %", "", ""]
    assert "chosen on these images" in html and "one-sided 95 % limit" in html
    metrics = json.loads(copy.metrics.read_text())
    change_metrics(copy, calibration=metrics["calibration"] | {"same_images": False})
    assert "hosen on these images" not in remake(copy)


@pytest.mark.slow
def test_missing_images_are_replaced_by_a_note(made: RunFolder, copy: RunFolder, tmp_path: Path) -> None:
    copy.recipe.write_text(f"backbone:\n  name: x\ndata:\n  path: {tmp_path / 'nowhere'}\n")
    html = remake(copy)
    assert "data:image" not in html and ">missing</span>" in html
    data = tmp_path / "data"
    shutil.copytree(made.path.parent / "data", data)
    (data / load_facts(copy).mistakes[0].path).unlink()
    copy.recipe.write_text(f"backbone:\n  name: x\ndata:\n  path: {data}\n")
    html = remake(copy)
    assert html.count(">missing: file not found</span>") == 1 and "data:image" in html


def test_image_paths_cannot_leave_the_data_folder(copy: RunFolder, tmp_path: Path) -> None:
    from PIL import Image

    secret = tmp_path / "secret.jpg"
    Image.new("RGB", (300, 300), (1, 2, 3)).save(secret)
    for path in (str(secret), "../secret.jpg", "../../secret.jpg"):
        copy.predictions.write_text(f"path,label,predicted,confidence\n{path},ants,bees,0.9\n")
        copy.split.unlink(missing_ok=True)
        (tmp_path / "data").mkdir(exist_ok=True)
        copy.recipe.write_text(f"backbone:\n  name: x\ndata:\n  path: {tmp_path / 'data'}\n")
        assert "data:image" not in remake(copy)


def test_a_damaged_model_costs_the_heat_maps_only(copy: RunFolder) -> None:
    file = copy.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    html = remake(copy)
    assert "mistakes" in sections(html) and "evidence for" not in html


def test_the_content_security_policy_allows_its_own_style_and_script(made: RunFolder) -> None:
    html = made.report.read_text(encoding="utf-8")
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    policy = policy.replace("&#39;", "'")
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for tag in ("style", "script"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)


def test_names_are_escaped_in_page_and_plots(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, HOSTILE)
    html = remake(folder)
    assert "<script>window" not in html and "<img src=x" not in html
    assert "&lt;script&gt;window.hacked=1&lt;/script&gt;" in html
    for plot in folder.plots.glob("*.svg"):
        tree = ElementTree.fromstring(plot.read_text(encoding="utf-8"))
        assert {element.tag.rpartition("}")[2] for element in tree.iter()} <= {
            "svg", "style", "rect", "text", "line", "polyline", "circle", "g", "title",
        }  # fmt: skip
        assert "http" not in plot.read_text().replace("http://www.w3.org/2000/svg", "")


@pytest.mark.slow
def test_many_classes_stay_readable_and_small(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(130)]
    folder = write_folder(tmp_path, names, per_class=2)
    html = remake(folder)
    assert not (folder.plots / "confusion_matrix.svg").exists()
    assert (
        "130 classes are too many for a readable plot" in html and "most frequent mistakes</caption>" in html
    )
    assert "the other 100 are left out" in html
    assert html.count('<th scope="row" data-value="class ') == 130
    assert len(html) < 2_000_000


def write_confusion(folder: RunFolder, classes: tuple[str, ...], counts: list[list[int]]) -> None:
    rows = [(name, *row) for name, row in zip(classes, counts, strict=True)]
    write_csv(folder.confusion_matrix, rows, ("label", *classes))


@pytest.mark.slow
def test_classes_that_are_often_confused_both_ways_are_named(copy: RunFolder) -> None:
    classes = ("ants", "bees", "wasps")
    write_confusion(copy, classes, [[20, 0, 1], [9, 12, 4], [0, 6, 19]])
    words = "both ways: 10 of 20 mistakes are between these two, 20.0 % of their 50 images"
    assert remake(copy).count("often confused both ways") == 1
    assert words in remake(copy)
    write_confusion(copy, classes, [[20, 0, 1], [9, 12, 0], [0, 6, 19]])  # one way only
    assert "both ways" not in remake(copy)
    write_confusion(copy, classes, [[200, 0, 0], [0, 200, 2], [0, 2, 200]])  # rarely
    assert "both ways" not in remake(copy)


def test_the_lowest_f1_comes_first_and_an_undefined_one_last(copy: RunFolder) -> None:
    rows = [
        ("ants", 0.9, 0.9, 0.9, 9, 9),
        ("bees", "n/a", "n/a", "n/a", 0, 0),
        ("wasps", 0.1, 0.1, 0.1, 9, 9),
    ]
    write_csv(copy.per_class, rows, ("label", "precision", "recall", "f1", "support", "predicted"))
    table = remake(copy).partition('<section id="classes"')[2].partition("</table>")[0]
    assert re.findall(r'<th scope="row" data-value="(\w+)"', table) == ["wasps", "ants", "bees"]
    assert table.count('aria-sort="ascending"') == 1


def test_a_full_album_leaves_images_out(made: RunFolder) -> None:
    from finetune.report.images import Album

    album = Album(made.path.parent / "data", most_bytes=3000)
    shown = [album.show_file(row["path"], 104) for row in load_facts(made).split]
    assert 0 < sum(bool(one.source) for one in shown) < len(shown)
    assert album.left_out == sum(not one.source for one in shown)


def test_a_folder_without_metrics_and_predictions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither metrics\.json nor"):
        write_run_report(RunFolder(tmp_path), SilentDisplay())


def test_the_report_command_writes_it_again(cli: Cli, copy: RunFolder) -> None:
    copy.report.unlink()
    shutil.rmtree(copy.plots)
    result = cli("report", copy.path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"report": str(copy.report), "plots": str(copy.plots)}
    assert copy.report.is_file() and (copy.plots / "loss.svg").is_file()
    assert cli("report", copy.path / "nowhere").exit_code == 2


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("names", "classes"), [(("a", "a", *"cdefghij"), ["a (0)", "a (1)"]), ((), ["0", "9"])]
)
def test_evidence_is_shown_for_the_names_that_predictions_have(
    tiny: Path, names: tuple[str, ...], classes: list[str]
) -> None:
    """Of a model of others, which may have one name twice, or no names."""
    card = replace(find_card(str(tiny)), label_names=names)
    explainer = Explainer(load_source(card).network.eval(), card)
    view = explainer.transform(Image.new("RGB", (40, 36)))
    maps = explainer.explain([view], *([name] for name in classes))
    assert len(maps) == len(classes) and all("does not know" not in one.reason for [one] in maps)
    [[unknown]] = explainer.explain([view], ["no such class"])
    assert unknown.values is None and "does not know" in unknown.reason


@pytest.mark.parametrize(("similar", "is_shown"), [(0.1, True), (0.9, False)])
def test_maps_that_do_not_depend_on_the_weights_are_left_out(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, similar: float, is_shown: bool
) -> None:
    from finetune.report import images

    monkeypatch.setattr(images, "measure_randomisation", lambda *_: {"head": similar})
    monkeypatch.setattr(images, "measure_advantage", lambda _, pixels, *__: [[1.0]] * len(pixels))
    card = find_card(str(tiny))
    explainer = Explainer(load_source(card).network.eval(), card)
    noise = np.random.default_rng(0).integers(0, 256, (4, 36, 40, 3), dtype=np.uint8)
    views = [explainer.transform(Image.fromarray(one)) for one in noise]
    [maps] = explainer.explain(views, ["3"] * 4)
    assert any(one.values is not None for one in maps) is is_shown
    assert any("random weights" in one.reason for one in maps) is not is_shown


@pytest.mark.sample(1)
@pytest.mark.parametrize("names", [None, -5, 1.5, True, "x", {"a": 1}, [None, ["a"]], 10**30, float("inf")])
def test_classes_not_judged_that_are_no_names(copy: RunFolder, names: object) -> None:
    metrics = json.loads(copy.metrics.read_text("utf-8")) | {"classes_not_judged": names}
    copy.metrics.write_text(json.dumps(metrics))
    page = remake(copy)
    assert ("no image among them" in page) == isinstance(names, list)
