from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from finetune.errors import EnvironmentFaultError
from finetune.training import task as compiled
from finetune.training.task import Compiled
from tests.training.helpers import SmallNet, build_trainer


def gradients(network: nn.Module, logits: Tensor) -> list[Tensor]:
    network.zero_grad()
    logits.logsumexp(1).sum().backward()  # type: ignore[no-untyped-call]
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_computes_what_the_network_computes(backend: str) -> None:
    torch.manual_seed(0)
    network = SmallNet(dropout=0.5)
    other = copy.deepcopy(network)
    forward = Compiled(network, backend)
    for size in (6, 6, 4):
        images = torch.randn(size, 3, 16, 16)
        torch.manual_seed(1)
        mine = gradients(network, forward(images))
        torch.manual_seed(1)
        plain = gradients(other, other(images))
        for one, two in zip(mine, plain, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    for one, two in zip(network.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_failed_compilation_is_one_message() -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler here")

    with pytest.raises(EnvironmentFaultError, match="no compiler here") as caught:
        Compiled(SmallNet(), broken)(torch.randn(2, 3, 16, 16))  # type: ignore[arg-type]
    assert "training.compile" in caught.value.fix


def test_training_uses_it_when_asked(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    class Spy(Compiled):
        def __init__(self, network: nn.Module) -> None:
            super().__init__(network, "eager")

        def __call__(self, images: Tensor) -> Tensor:
            calls.append(len(images))
            return super().__call__(images)

    plain = build_trainer(image_folder, tmp_path / "plain", epochs=1)
    plain.fit()
    monkeypatch.setattr(compiled, "Compiled", Spy)
    asked = build_trainer(image_folder, tmp_path / "asked", epochs=1, compile=True)
    asked.fit()
    assert sum(calls) == 36
    for one, two in zip(
        plain.eval_network.state_dict().values(), asked.eval_network.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_classifier_sees_standardised_features_when_compiled(image_folder: Path, tmp_path: Path) -> None:
    """Features are measured before training, so that the hook comes after the first call."""
    plain = build_trainer(image_folder, tmp_path / "plain", epochs=1)
    asked = build_trainer(image_folder, tmp_path / "asked", epochs=1)
    asked.gradient.forward = Compiled(asked.task.network, "eager")
    for trainer in (plain, asked):
        trainer.standardize_head()
        trainer.fit()
    for one, two in zip(
        plain.eval_network.state_dict().values(), asked.eval_network.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
