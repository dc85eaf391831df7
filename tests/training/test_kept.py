"""What the frozen trunk gives is computed once, and a run with it is the run without it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.data.dataset import Sample
from finetune.data.loader import ImageLoader, Placement
from finetune.errors import DataError, DiskError, InternalError, InterruptedRunError
from finetune.features.rows import FileRows, MemoryRows, Rows
from finetune.features.store import KeptRows
from finetune.pipeline import batches, image_loaders
from finetune.pipeline import run as main
from finetune.pipeline.run import Run, run
from finetune.recipe import load_recipe
from finetune.runs.block_file import BlockFile, journal_of
from finetune.runs.cache_dir import cache_folder
from finetune.runs.reader import RunReader
from finetune.system import device
from finetune.targets import SINGLE
from finetune.training.trunk import FeatureLoader
from tests.conftest import draw_folder
from tests.faults.results import assert_same_run, read_history
from tests.sweeps import slow_except
from tests.training.helpers import Listener

ARCHITECTURES = ("test_resnet", "test_vit", "test_convnext", "test_nfnet", "mobilenetv3_small_050")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And several batches for the trunk, the last of them a smaller one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("finetune.features.store.compute_chunk_size", lambda *_: 12)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty training images and ten validation images."""
    root = tmp_path_factory.mktemp("few")
    draw_folder(root / "train", {"red": 20, "blue": 20})
    draw_folder(root / "val", {"red": 5, "blue": 5})
    return root


Fit = Callable[..., Run]


@pytest.fixture
def fit(tiny: Path, few: Path, tmp_path: Path) -> Fit:
    """Fine-tune the tiny network: ``fit("one", "freeze", {"seed": 1})``."""

    def do(
        name: str, strategy: str = "freeze", keys: dict[str, Any] | None = None, listener: Any = None
    ) -> Run:
        settings = {
            "backbone.name": str(tiny),
            "data.path": str(few),
            "data.workers": 0,
            "cache.pictures": False,
            "cache.views": 2,
            "strategy.name": strategy,
            "training.epochs": 3,
            "training.batch_size": 8,
        }
        recipe = load_recipe(None, settings | (keys or {}))
        return run(recipe, tmp_path / name, listener or Listener())

    return do


@pytest.fixture
def computed() -> Iterator[list[int]]:
    """Images that went through a trunk, batch by batch."""
    seen: list[int] = []
    with mock.patch.object(KeptRows, "_compute", _counting(KeptRows._compute, seen)):
        yield seen


def _counting(compute: Callable[..., None], seen: list[int]) -> Callable[..., None]:
    def counted(self: KeptRows, *arguments: Any) -> None:
        before = self.num_computed
        try:
            compute(self, *arguments)
        finally:
            seen.append(self.num_computed - before)

    return counted


def trunk_of(run: Run) -> dict[str, Any]:
    return {"cut": None, "reason": "", **RunReader(run.folder).trunk}


def make_backbone(folder: Path, name: str) -> Path:
    """A folder in timm's format with seeded random weights."""
    folder.mkdir()
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10)
    save_file(network.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": name,
        "num_classes": 10,
        "pretrained_cfg": {
            "input_size": [3, 64, 64],
            "classifier": network.pretrained_cfg["classifier"],
            "first_conv": network.pretrained_cfg["first_conv"],
        },
    }
    if name == "test_vit":
        config["model_args"] = {"img_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", slow_except(["test_resnet", "test_vit"], ARCHITECTURES))
def test_losses_are_those_of_the_plain_loop(name: str, fit: Fit, tmp_path: Path) -> None:
    backbone = make_backbone(tmp_path / "backbone", name)
    keys = {"backbone.name": str(backbone), "input.augmentation": "none", "training.lr": 0.001}
    kept = fit("kept", "top", keys)
    plain = fit("plain", "top", keys | {"cache.trunk": False})
    assert trunk_of(kept)["cut"]
    assert trunk_of(plain)["cut"] is None
    for one, other in zip(read_history(kept.folder.path), read_history(plain.folder.path), strict=True):
        for column in ("train_loss", "eval_loss"):
            assert float(one[column]) == pytest.approx(float(other[column]), abs=1e-5)
        assert one["eval_accuracy"] == other["eval_accuracy"]


@pytest.mark.slow
def test_a_second_run_computes_nothing(fit: Fit, computed: list[int]) -> None:
    fit("one")
    assert sum(computed) == 2 * 40 + 10
    computed.clear()
    listener = Listener()
    fit("two", keys={"training.lr": 0.1, "seed": 7, "training.batch_size": 5}, listener=listener)
    assert computed == []
    fit("three", keys={"cache.views": 3, "training.epochs": 6})
    assert sum(computed) == 40  # the third view
    computed.clear()
    fit("four", keys={"cache.views": 9, "training.epochs": 3})
    assert computed == []  # no more views than epochs


@pytest.mark.slow
def test_no_more_views_than_pay_in_this_run(fit: Fit, computed: list[int]) -> None:
    """A view for each epoch saves nothing. A run that gets more epochs keeps its number of views."""
    auto = {"cache.views": "auto"}
    first = fit("one", "top", keys=auto | {"training.epochs": 4})
    assert sum(computed) == 40 + 10
    longer = fit("one", "top", keys=auto | {"training.epochs": 6})
    assert sum(computed) == 40 + 10
    for finished in (first, longer):
        recipe = RunReader(finished.folder).recipe
        assert recipe is not None
        assert recipe.cache.views == 1
    fit("two", "top", keys=auto | {"training.epochs": 6})
    assert sum(computed) == 2 * 40 + 10  # the second view


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "number"),
    [
        pytest.param({"input.img_size": 40}, 50, marks=pytest.mark.slow),
        ({"input.augmentation": "medium"}, 40),  # validation images know none
        pytest.param({"input.mean": [0.5, 0.5, 0.5]}, 50, marks=pytest.mark.slow),
        pytest.param({"training.channels_last": False}, 50, marks=pytest.mark.slow),
        pytest.param({"deterministic": True}, 50, marks=pytest.mark.slow),
        pytest.param({"cache.dtype": "float16"}, 50, marks=pytest.mark.slow),
    ],
)
def test_what_features_depend_on_makes_others(
    fit: Fit, computed: list[int], monkeypatch: pytest.MonkeyPatch, key: dict[str, Any], number: int
) -> None:
    # It would hold for the whole process.
    monkeypatch.setattr("finetune.features.network.set_deterministic", lambda _: None)
    fit("one", keys={"training.channels_last": True, "training.epochs": 1})
    computed.clear()
    fit("two", keys={"training.channels_last": True, "training.epochs": 1} | key)
    assert sum(computed) == number


@pytest.mark.slow
def test_another_image_makes_others(fit: Fit, few: Path, computed: list[int], tmp_path: Path) -> None:
    shutil.copytree(few, tmp_path / "data")
    keys = {"data.path": str(tmp_path / "data"), "training.epochs": 1}
    fit("one", keys=keys)
    computed.clear()
    shutil.copy(tmp_path / "data/val/blue/001.jpg", tmp_path / "data/val/blue/002.jpg")
    fit("two", keys=keys)
    assert computed == [10]


@pytest.mark.slow
def test_weights_make_others(fit: Fit, computed: list[int], tmp_path: Path) -> None:
    backbone = make_backbone(tmp_path / "backbone", "test_resnet")
    keys = {"backbone.name": str(backbone), "training.epochs": 1}
    fit("one", keys=keys)
    computed.clear()
    network = timm.create_model("test_resnet", num_classes=10)
    save_file(network.state_dict(), backbone / "model.safetensors")
    fit("two", keys=keys)
    assert sum(computed) == 50


@pytest.mark.slow
def test_an_interrupted_pass_goes_on(fit: Fit, computed: list[int], tmp_path: Path) -> None:
    whole = fit("whole")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "other")  # monkeypatch gives it back
    computed.clear()
    append, calls = BlockFile.append, []

    def interrupted(self: BlockFile, *arguments: Any) -> None:
        append(self, *arguments)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with mock.patch.object(BlockFile, "append", interrupted), pytest.raises(InterruptedRunError):
        fit("again")
    assert sum(computed) == 24  # the block that broke off is kept, and was not counted
    computed.clear()
    again = fit("again")
    assert sum(computed) == 4 + 40 + 10  # the rest of the first view, the second one, and validation
    assert_same_run(whole.folder.path, again.folder.path)


@pytest.mark.slow
def test_a_damaged_file_is_made_again(fit: Fit, computed: list[int]) -> None:
    whole = fit("whole")
    for path in cache_folder("kept").glob("trunk-*.bin"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    computed.clear()
    listener = Listener()
    again = fit("again", listener=listener)
    assert sum(computed) == 90
    assert sum("computed again" in warning for warning in listener.warnings) == 3
    assert_same_run(whole.folder.path, again.folder.path)


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
def test_a_full_disk_costs_the_next_run_alone(fit: Fit) -> None:
    whole = fit("whole")
    for path in cache_folder("kept").glob("*.bin"):
        journal_of(path).unlink()
    listener = Listener()
    with mock.patch.object(BlockFile, "append", no_space):
        again = fit("again", listener=listener)
    assert [warning for warning in listener.warnings if "No space left" in warning]
    assert_same_run(whole.folder.path, again.folder.path)


@pytest.mark.slow
def test_a_full_disk_and_too_much_for_memory_is_the_plain_loop(fit: Fit) -> None:
    listener = Listener()
    with (
        mock.patch.object(BlockFile, "append", no_space),
        mock.patch("finetune.features.store.MEMORY_BYTES", 0),
    ):
        plain = fit("plain", listener=listener)
    assert trunk_of(plain)["cut"] is None
    assert [warning for warning in listener.warnings if "every epoch runs the whole network" in warning]
    assert plain.metrics["epochs"] == 3


@pytest.mark.slow
def test_a_full_disk_and_memory_for_some_views_only_is_the_plain_loop(fit: Fit) -> None:
    """A row has 96 numbers: the first view fits, the second does not."""
    full = mock.patch.object(BlockFile, "append", no_space)
    with full, mock.patch("finetune.features.store.MEMORY_BYTES", 60 * 96 * 4):
        plain = fit("plain")
    assert trunk_of(plain)["cut"] is None
    assert "No space left" in trunk_of(plain)["reason"]


@pytest.mark.slow
def test_rows_that_stay_in_their_file_are_the_same(fit: Fit) -> None:
    whole = fit("whole", "top")
    with mock.patch("finetune.features.store.MEMORY_BYTES", 0):
        mapped = fit("mapped", "top")
    assert_same_run(whole.folder.path, mapped.folder.path)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("strategy", "keys", "words"),
    [
        ("freeze", {"training.mixup": 0.2}, "mixup"),
        ("top", {"cache.max_gb": 1e-6}, "cache.max_gb"),
        ("full", {}, ""),
        ("freeze", {"cache.trunk": False}, ""),
    ],
)
def test_the_plain_loop_says_why(
    fit: Fit, computed: list[int], strategy: str, keys: dict[str, Any], words: str
) -> None:
    plain = fit("plain", strategy, keys)
    assert trunk_of(plain)["cut"] is None
    assert words in trunk_of(plain)["reason"]
    assert computed == []


@pytest.mark.slow
def test_a_cut_that_has_no_room_makes_way_for_one_that_has(fit: Fit) -> None:
    deepest = fit("deepest", "top")
    sizes: list[int] = []

    def row_bytes(numel: int, _: str) -> int:
        sizes.append(numel)
        return 10**9 if numel == sizes[0] else 4 * numel

    with mock.patch("finetune.pipeline.batches.row_bytes", row_bytes):
        other = fit("other", "top")
    assert trunk_of(other)["cut"] not in (None, trunk_of(deepest)["cut"])
    assert trunk_of(deepest)["cut"] in trunk_of(other)["reason"]


def test_the_recipe_can_say_off(tiny: Path) -> None:
    recipe = load_recipe(None, {"cache": "off"})
    assert not recipe.cache.trunk and not recipe.cache.pictures


@pytest.mark.slow
def test_wrong_features_give_no_metrics(fit: Fit) -> None:
    rows = KeptRows.rows

    def wrong(self: KeptRows, *arguments: Any) -> list[Rows]:
        [right] = rows(self, *arguments)
        return [MemoryRows(right[torch.arange(right.shape[0]).flip(0)])]

    with (
        mock.patch.object(KeptRows, "rows", wrong),
        pytest.raises(InternalError, match="exported model with the metrics"),
    ):
        fit("wrong")


def test_a_run_goes_on_by_the_plain_loop_where_it_began_so(fit: Fit, computed: list[int]) -> None:
    keys = {"cache.max_gb": 1e-6}
    stopped = mock.patch("finetune.training.trainer.Trainer.fit", side_effect=KeyboardInterrupt)
    with stopped, pytest.raises(InterruptedRunError):
        fit("one", keys=keys)
    with mock.patch("finetune.runs.cache_dir.FeatureCacheDir.find_obstacle", return_value=""):
        again = fit("one", keys=keys)
    assert trunk_of(again)["cut"] is None
    assert computed == []


# --- rows ----------------------------------------------------------------------------------------


def loader_of(views: int, **keys: Any) -> FeatureLoader:
    rows = [torch.arange(10.0).view(10, 1) + 100 * view for view in range(views)]
    samples = [Sample(f"{number}.jpg", number % 3, "train") for number in range(10)]
    placement = Placement(torch.device("cpu"), channels_last=False)
    labels = torch.tensor([sample.label for sample in samples])
    return FeatureLoader(
        rows,
        samples,
        labels,
        SINGLE,
        **({"batch_size": 4, "placement": placement, "seed": 3, "shuffle": True} | keys),
    )


def test_views_take_turns() -> None:
    loader = loader_of(3)
    for epoch in range(7):
        batches = list(loader.batches(epoch))
        values = torch.cat([batch.images for batch in batches]).flatten()
        assert sorted(values.tolist()) == [100 * (epoch % 3) + number for number in range(10)]


def test_rows_labels_and_indices_belong_together_and_orders_differ() -> None:
    loader = loader_of(1)
    orders = []
    for epoch in range(3):
        batches = list(loader.batches(epoch))
        indices = torch.cat([batch.indices for batch in batches])
        orders.append(indices.tolist())
        assert torch.cat([batch.images for batch in batches]).flatten().equal(indices.float())
        assert torch.cat([batch.labels for batch in batches]).equal(indices % 3)
        assert [len(batch.labels) for batch in batches] == [4, 4, 2]
    assert len({tuple(order) for order in orders}) == 3
    assert next(iter(loader_of(1, shuffle=False).batches(5))).indices.tolist() == [0, 1, 2, 3]


def test_an_epoch_goes_on_in_its_middle() -> None:
    loader = loader_of(2)
    whole = [batch.images for batch in loader.batches(5)]
    rest = [batch.images for batch in loader.batches(5, start=1)]
    assert all(map(torch.equal, whole[1:], rest))
    assert len(rest) == loader.num_batches(5) - 1 == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than this machine has cores
def test_processes_for_the_trunk_may_grow_as_far_as_its_batches_fit(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are larger than those of training; and the processes end before training, which needs none."""
    made: list[dict[str, Any]] = []

    class Noted(ImageLoader):
        def __init__(self, *arguments: Any, **keys: Any) -> None:
            made.append(keys)
            super().__init__(*arguments, **keys)

    monkeypatch.setattr(image_loaders, "ImageLoader", Noted)
    monkeypatch.setattr(device, "available_cores", lambda: 6)
    room = 5 * device.BATCHES_PER_WORKER * 12 * 3 * 32 * 32
    monkeypatch.setattr(device, "_shared_memory_bytes", lambda: room)
    fit("run", keys={"data.workers": "auto"})
    trunk = [keys for keys in made if keys["batch_size"] == 12]
    assert [(keys["workers"], keys["max_workers"], keys["persistent"]) for keys in trunk] == 2 * [
        (3, 5, False)
    ]


def test_rows_are_read_from_their_file(tmp_path: Path) -> None:
    rows = torch.randn(20, 5)
    path = tmp_path / "rows.bin"
    path.write_bytes(rows.numpy().tobytes())
    kept = FileRows(path, (20, 5), torch.float32)
    indices = torch.tensor([3, 19, 0, 3])
    assert kept[indices].equal(rows[indices])
    assert kept.columns(indices, 1, 3).equal(MemoryRows(rows).columns(indices, 1, 3))
    os.truncate(path, 390)
    with pytest.raises(DataError, match="row 20"):
        kept[indices]


@pytest.mark.slow
def test_an_image_that_changes_on_the_way_is_not_kept_under_its_old_name(
    fit: Fit, tmp_path: Path, few: Path
) -> None:
    shutil.copytree(few, tmp_path / "data")
    choose = batches.choose_cut

    def change_and_choose(*arguments: Any, **keys: Any) -> Any:
        shutil.copy(tmp_path / "data/val/red/001.jpg", tmp_path / "data/val/red/002.jpg")
        return choose(*arguments, **keys)

    listener = Listener()
    with mock.patch.object(batches, "choose_cut", change_and_choose):
        plain = fit("plain", keys={"data.path": str(tmp_path / "data")}, listener=listener)
    assert trunk_of(plain)["cut"] is None
    assert "changed while the run was starting" in trunk_of(plain)["reason"]


@pytest.mark.slow
def test_a_run_that_has_learnt_from_features_does_not_go_on_without(fit: Fit) -> None:
    stopped = mock.patch("finetune.training.trainer.Trainer.fit", side_effect=KeyboardInterrupt)
    with stopped, pytest.raises(InterruptedRunError):
        fit("one")
    for path in cache_folder("kept").glob("*.bin"):
        journal_of(path).unlink()
    full = mock.patch.object(BlockFile, "append", no_space)
    with (
        full,
        mock.patch("finetune.features.store.MEMORY_BYTES", 0),
        pytest.raises(DiskError, match="cached features"),
    ):
        fit("one")
    again = fit("one")
    assert trunk_of(again)["cut"]


@pytest.mark.slow
def test_a_cache_that_may_not_be_written_costs_the_next_run_alone(fit: Fit) -> None:
    error = PermissionError(errno.EACCES, "Permission denied")
    listener = Listener()
    with mock.patch("finetune.features.store.BlockFile", side_effect=error):
        run = fit("one", listener=listener)
    assert trunk_of(run)["cut"]
    assert [warning for warning in listener.warnings if "Permission denied" in warning]


@pytest.mark.slow
def test_large_batches_of_the_recipe_do_not_reach_the_whole_network(fit: Fit) -> None:
    sizes: list[int] = []
    check = main.check_predictions

    def spy(network: Any, predictions: Any, images: Tensor, *others: Any) -> None:
        sizes.append(len(images))
        check(network, predictions, images, *others)

    with mock.patch.object(main, "check_predictions", spy), mock.patch("finetune.pipeline.fit.FEW", 4):
        fit("one", keys={"training.batch_size": 40})
    assert sizes == [4]
