"""Promise R5: where memory runs out, the batch stays whole and goes through in smaller parts.

Errors are raised where torch raises them: on the way in, in front of the head (when BatchNorm has seen the
images), and on the way back. In the last test memory really runs out.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from finetune.data.loader import Batch
from finetune.errors import EnvironmentFaultError, ExitCode
from finetune.evaluation.predictions import predict
from finetune.runs.outcome import translated_errors
from finetune.system.device import seed_everything
from finetune.targets import build_loss
from finetune.training.step import Gradient
from finetune.training.trainer import Trainer
from tests.conftest import Cli
from tests.sweeps import slow_except
from tests.training.helpers import (
    EVERYTHING_ON,
    NormFree,
    SmallNet,
    assert_same_end,
    build_trainer,
    corrupt,
    exhaust_memory,
    fit_until,
    saved,
    warnings,
)

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.slow
def test_an_allocation_that_fails_halves_the_microbatch(
    cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tests/gpu does with a GPU's memory, with that of the CPU."""
    microbatches = exhaust_memory(monkeypatch, torch.device("cpu"))
    words = ("--epochs", 2, "--batch-size", 8, "--workers", 0, "--json", "--device", "cpu")
    result = cli("run", "-b", tiny, "-d", image_folder, "-s", "full", "-o", tmp_path / "run", *words)
    assert result.exit_code == 0, result.stderr
    assert microbatches[2] > 0
    assert json.loads(result.stdout)["microbatch"] == microbatches[2]


def norm_free() -> nn.Module:
    torch.manual_seed(1)
    return NormFree()


class Limit:
    """Memory for so many images at a time: with more, a network fails at a place.

    Attributes:
        sizes: of every attempt to go through, in train mode and in eval mode.
    """

    def __init__(self, network: nn.Module, most: int, place: str = "entry", training: bool = True) -> None:
        self.most, self.training = most, training
        self.sizes: dict[bool, list[int]] = {True: [], False: []}
        network.register_forward_pre_hook(self._note)
        if place == "backward":
            network.register_forward_hook(self._fail_on_the_way_back)
        else:
            where = network if place == "entry" else network.get_submodule(place)
            where.register_forward_pre_hook(self._fail)

    def _note(self, network: nn.Module, inputs: tuple[Tensor]) -> None:
        self.sizes[network.training].append(len(inputs[0]))

    def _fail(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        if module.training == self.training and len(inputs[0]) > self.most:
            raise torch.OutOfMemoryError(CUDA)

    def _fail_on_the_way_back(self, module: nn.Module, inputs: object, logits: Tensor) -> None:
        def fail(_: Tensor) -> None:
            raise torch.OutOfMemoryError(CUDA)

        if logits.requires_grad and len(logits) > self.most:
            logits.register_hook(fail)


def limited(trainer: Trainer, most: int, place: str = "entry", training: bool = True) -> Limit:
    return Limit(trainer.task.network, most, place, training)


# --- a training step -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", slow_except(["stage2", "backward"], ["entry", "stage2", "head", "backward"])
)
def test_a_failed_attempt_leaves_no_trace(image_folder: Path, tmp_path: Path, place: str) -> None:
    """Bit for bit as if batches had gone through in parts from the start: random numbers, BatchNorm, all."""
    one = build_trainer(image_folder, tmp_path / "one", **EVERYTHING_ON)
    limited(one, 4, place)
    two = build_trainer(image_folder, tmp_path / "two", **EVERYTHING_ON)
    two.progress.microbatch = 4
    assert one.fit().microbatch == two.fit().microbatch == 4
    assert_same_end(tmp_path / "one", tmp_path / "two")


def test_a_batch_is_halved_until_it_fits_and_stays_so(image_folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(image_folder, tmp_path, epochs=1, batch_size=12, lr=0.05)
    limit = limited(trainer, 3)
    trainer.fit()
    assert limit.sizes[True] == [12, 6, *[3] * 12]
    assert [text.partition(";")[0] for text in warnings(trainer)] == ["memory ran out at step 1"] * 2
    assert "batches of 12 are now split into microbatches of 3" in warnings(trainer)[1]


def test_batchnorm_is_warned_of_and_nothing_else(image_folder: Path, tmp_path: Path) -> None:
    said = {}
    for name, network in (("with", SmallNet()), ("without", NormFree())):
        trainer = build_trainer(image_folder, tmp_path / name, network=network, epochs=1, batch_size=8)
        limited(trainer, 4)
        trainer.fit()
        said[name] = warnings(trainer)
    assert ["BatchNorm normalises each microbatch" in text for text in said["with"]] == [True]
    assert ["BatchNorm" in text for text in said["without"]] == [False]


def test_a_run_that_goes_on_does_not_try_again(image_folder: Path, tmp_path: Path) -> None:
    limited(build := build_trainer(image_folder, tmp_path / "whole", **EVERYTHING_ON), 4)
    build.fit()
    first = build_trainer(image_folder, tmp_path / "parts", **EVERYTHING_ON)
    limited(first, 4)
    fit_until(first, lambda at: at.step >= 3)
    assert saved(tmp_path / "parts").now.progress.microbatch == 4
    second = build_trainer(image_folder, tmp_path / "parts", **EVERYTHING_ON)
    limit = limited(second, 4)
    second.fit()
    assert max(limit.sizes[True]) == 4
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_a_way_back_keeps_the_parts(image_folder: Path, tmp_path: Path) -> None:
    trouble = corrupt(lambda at: at.rollbacks == 0 and at.step >= 1)
    trainer = build_trainer(image_folder, tmp_path, trainer_type=trouble, epochs=1, batch_size=8)
    limit = limited(trainer, 4)
    assert trainer.fit().rollbacks == 1
    assert limit.sizes[True].count(8) == 1


@pytest.mark.parametrize(("network", "least"), [(SmallNet, 2), (NormFree, 1)])
def test_where_the_least_is_too_much_the_end_is_clear(
    image_folder: Path, tmp_path: Path, network: Callable[[], nn.Module], least: int
) -> None:
    """Two images for BatchNorm, which cannot train on a single value; else one."""
    trainer = build_trainer(image_folder, tmp_path, network=network(), epochs=1, batch_size=8)
    before = {name: tensor.clone() for name, tensor in trainer.task.network.state_dict().items()}
    limit = limited(trainer, least - 1, "head")
    with pytest.raises(EnvironmentFaultError, match=f"with {least} images? at a time: {CUDA}") as ended:
        trainer.fit()
    assert ended.value.exit_code == ExitCode.ENVIRONMENT == 78
    assert "--img-size" in ended.value.fix
    assert limit.sizes[True] == [8, 4, 2, 1][: 4 - (least - 1)]
    after = trainer.task.network.state_dict()
    assert [name for name in before if not before[name].equal(after[name])] == []


def test_another_error_is_not_tried_again(image_folder: Path, tmp_path: Path) -> None:
    trainer, microbatches = build_trainer(image_folder, tmp_path, epochs=1, batch_size=8), []

    def fail(*_: object) -> None:
        microbatches.append(1)
        raise RuntimeError("CUDA error: device-side assert triggered")

    trainer.task.network.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        trainer.fit()
    assert len(microbatches) == 1


def test_activations_of_a_failed_attempt_are_freed_before_the_next(
    image_folder: Path, tmp_path: Path
) -> None:
    trainer = build_trainer(image_folder, tmp_path, epochs=1, batch_size=8)
    kept: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def count(*_: object) -> None:
        alive.append(sum(reference() is not None for reference in kept))

    trainer.task.network.register_forward_pre_hook(count)
    trainer.task.network.get_submodule("stage1").register_forward_hook(
        lambda _, __, features: kept.append(weakref.ref(features))
    )
    limited(trainer, 4, "head")
    gc.disable()  # by the trainer's own doing, not by chance
    try:
        trainer.fit()
    finally:
        gc.enable()
    assert len(alive) > 2
    assert alive[:2] == [0, 0]


CUDNN = "FIND was unable to find an engine to execute this computation"


@pytest.mark.sample(1)
@pytest.mark.parametrize(("failures", "microbatch"), [(1, 0), (2, 4)])
def test_a_library_without_memory_gets_a_second_chance(
    image_folder: Path, tmp_path: Path, failures: int, microbatch: int
) -> None:
    """The microbatch is tried again after torch's cache is emptied, and then halved."""
    one = build_trainer(image_folder, tmp_path / "one", **EVERYTHING_ON)
    left = [RuntimeError(CUDNN)] * failures

    def fail(module: nn.Module, _: tuple[Tensor]) -> None:
        if module.training and left:
            raise left.pop()

    one.task.network.get_submodule("head").register_forward_pre_hook(fail)
    two = build_trainer(image_folder, tmp_path / "two", **EVERYTHING_ON)
    two.progress.microbatch = microbatch
    assert one.fit().microbatch == two.fit().microbatch == microbatch
    assert len(warnings(one)) == (microbatch > 0)
    assert_same_end(tmp_path / "one", tmp_path / "two")


def test_a_library_without_memory_gets_a_second_chance_with_one_image(
    image_folder: Path, tmp_path: Path
) -> None:
    trainer = build_trainer(image_folder, tmp_path, batch_size=1)
    expected = predict(trainer.eval_network, trainer.task.val, "float32")
    left = [RuntimeError(CUDNN)]

    def fail(*_: object) -> None:
        if left:
            raise left.pop()

    trainer.task.network.register_forward_pre_hook(fail)
    assert predict(trainer.eval_network, trainer.task.val, "float32").logits.equal(expected.logits)


# --- parts are the whole -------------------------------------------------------------------------

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small": norm_free,
    "vit": lambda: timm.create_model("test_vit", num_classes=3, img_size=32),
    "convnext": lambda: timm.create_model("test_convnext", num_classes=3),
}
WEIGHTED = build_loss([7, 3, 1], "balanced", 0.1)
LOSSES = {"plain": nn.CrossEntropyLoss(), "weights and smoothing": WEIGHTED}
MIXERS = {"no mixing": None, "mixup": v2.MixUp(num_classes=3), "cutmix": v2.CutMix(num_classes=3)}


def compute(network: nn.Module, loss: str, mixer: str, microbatch: int) -> tuple[Tensor, Tensor]:
    """The loss of seven images, and the whole gradient in one row."""
    torch.manual_seed(0)
    images, labels = torch.randn(7, 3, 32, 32), torch.tensor([0, 0, 1, 2, 2, 1, 2])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    network.zero_grad()
    seed_everything(0, "step", 0)
    gradient = Gradient(network, LOSSES[loss], MIXERS[mixer], scaler, "float32")
    value = gradient.compute(Batch(images, labels, labels, {}), microbatch)
    slopes = [weight.grad.flatten() for weight in network.parameters() if weight.grad is not None]
    return value, torch.cat(slopes)


@pytest.mark.sample(3)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_parts_give_the_loss_and_the_gradient_of_the_whole_batch(name: str, mixer: str, loss: str) -> None:
    torch.manual_seed(1)
    network = NETWORKS[name]().train()
    whole, expected = compute(network, loss, mixer, 0)
    for microbatch in (1, 2, 3, 6):
        value, found = compute(network, loss, mixer, microbatch)
        assert value.item() == pytest.approx(whole.item(), rel=1e-5)
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_a_training_in_parts_ends_where_the_whole_one_does(image_folder: Path, tmp_path: Path) -> None:
    """With an average of the weights, a gradient that is clipped, and everything else."""
    settings = EVERYTHING_ON | {"dropout": 0.0, "optimizer": "sgd"}
    whole = build_trainer(image_folder, tmp_path / "whole", network=norm_free(), **settings)
    parts = build_trainer(image_folder, tmp_path / "parts", network=norm_free(), **settings)
    limited(parts, 3, "backward")
    whole.fit()
    assert parts.fit().microbatch == 2
    expected, found = saved(tmp_path / "whole").now.tensors, saved(tmp_path / "parts").now.tensors
    assert [n for n in expected if not torch.allclose(expected[n], found[n], rtol=1e-4, atol=1e-6)] == []


# --- without a gradient --------------------------------------------------------------------------


@pytest.mark.slow
def test_validation_goes_through_in_parts(image_folder: Path, tmp_path: Path) -> None:
    one = build_trainer(image_folder, tmp_path / "one", epochs=2, batch_size=8, lr=0.05)
    limit = limited(one, 1, training=False)
    two = build_trainer(image_folder, tmp_path / "two", epochs=2, batch_size=8, lr=0.05)
    one.fit()
    two.fit()
    assert limit.sizes[False] == 2 * [8, 4, 2, *18 * [1]]  # it is found out once in a pass
    assert set(limit.sizes[True]) == {4, 8}
    for row, other in zip(one.progress.history, two.progress.history, strict=True):
        assert row["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-5)
        assert row["eval_accuracy"] == other["eval_accuracy"]


def test_predictions_in_parts_are_those_of_whole_batches_in_order(image_folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(image_folder, tmp_path, batch_size=8)
    expected = predict(trainer.eval_network, trainer.task.val, "float32")
    limited(trainer, 3, training=False)
    done: list[int] = []
    found = predict(trainer.eval_network, trainer.task.val, "float32", done.append)
    torch.testing.assert_close(found.logits, expected.logits)
    assert found.labels.equal(expected.labels)
    assert done == [8, 8, 2]


def test_one_image_that_is_too_much_to_predict_ends_clearly(image_folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(image_folder, tmp_path, batch_size=8)
    limited(trainer, 0, training=False)
    with pytest.raises(EnvironmentFaultError, match=CUDA) as ended, translated_errors():
        predict(trainer.eval_network, trainer.task.val, "float32")
    assert ended.value.exit_code == 78
    assert trainer.task.network.training


def test_features_are_measured_in_parts(image_folder: Path, tmp_path: Path) -> None:
    moments = []
    for name, most in (("whole", 8), ("parts", 3)):
        trainer = build_trainer(image_folder, tmp_path / name, network=norm_free(), batch_size=8)
        limited(trainer, most)
        trainer.standardize_head()
        moments.append(trainer._moments)
    torch.testing.assert_close(moments[0], moments[1])


# --- a process whose memory really runs out ------------------------------------------------------

SCRIPT = """
import resource, sys
from pathlib import Path

import torch
from tests.training.helpers import SmallNet, build_trainer, warnings

class Wide(SmallNet):
    '''32 MB of activations an image.'''

    def forward(self, images):
        wide = images.mean((1, 2, 3))[:, None] * torch.ones(8 * 2**20)
        return super().forward(images) + wide.mean(1, keepdim=True)

torch.set_num_threads(1)
trainer = build_trainer(Path(sys.argv[1]), Path(sys.argv[2]), network=Wide(), epochs=1, batch_size=18)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20, resource.RLIM_INFINITY))
print(trainer.fit().microbatch, *warnings(trainer), sep="|")
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux limits a process's memory")
def test_a_process_without_memory_trains_on(image_folder: Path, tmp_path: Path) -> None:
    """18 images need 600 MB and more in one go; there are 500."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, image_folder, tmp_path],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    microbatch, *said = done.stdout.strip().split("|")
    assert 2 <= int(microbatch) < 18
    assert "memory ran out at step 1; batches of 18 are now split into microbatches of 9" in said[0]
    assert saved(tmp_path).now.progress.step == 2
