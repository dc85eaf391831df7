"""The first loss of every family on normalised images: log K, or above it for a reason that is stated.

A network whose logits are the same for all images has the loss log K too. So the deviation of the logits over
images is tested as well, to be about as large as it was measured.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.zoo.certify import build, pictures

SLOW = pytest.mark.slow

AS_LOG_K = [
    ("lenet5", 2.4e-5),  # weights within 2.4 / fan-in: each layer shrinks the signal
    ("lenet5_paper", 3.1e-3),
    pytest.param("zfnet", 1.6e-2, marks=SLOW),
    pytest.param("vgg11_lrn", 3.9e-4, marks=SLOW),
    pytest.param("vgg16_c", 0.17, marks=SLOW),
    ("nin_cifar", 1.2e-3),
    ("nin_imagenet", 1.3e-2),
    ("bn_inception", 4.6e-2),
    ("alphago_policy_128", 1.3e-2),
    ("conv_pattern", 5.5e-2),
    pytest.param("plain18", 4.7e-2, marks=SLOW),
    ("resnet18_a", 0.11),
    pytest.param("resnet50_v1", 0.12, marks=SLOW),
    ("cifar_plain20", 6.7e-2),
    pytest.param("cifar_plain56", 4.9e-2, marks=SLOW),
    ("cifar_preresnet110", 6.0e-2),
    ("cifar_preresnet110_bn_after", 0.22),
    pytest.param("cifar_preresnet164", 4.9e-2, marks=SLOW),
    ("cifar_se_preresnet110", 8.0e-2),
    ("cifar_wrn_16_4", 5.2e-2),
    pytest.param("cifar_resnext29_8x64d", 0.10, marks=SLOW),
    ("cifar_densenet_40_12", 5.9e-2),
    pytest.param("cifar_densenet_bc_100_12", 8.9e-2, marks=SLOW),
    ("cifar_pyramidnet110_a48", 6.2e-2),
    ("cifar_shake_shake_26_2x32d", 0.13),
]
"""Names, and the mean deviation of a logit over four images, as measured."""

ABOVE = [
    # The published biases of 1 in fc6 and fc7 (without them 1.01), and dropout that doubles what it keeps.
    ("alexnet_2012", 1.139, 1.0),
    # Biases of 0.2 in every convolution (without them 1.01), and dropout. On photographs it is 1.10 to 1.12.
    ("googlenet_2014", 1.084, 0.66),
    # Each residual block adds variance 1 to its input, and nothing normalises the last sum.
    ("cifar_resnet20", 1.151, 0.14),
    pytest.param("cifar_resnet110_sd", 1.530, 0.35, marks=SLOW),
    ("cifar_preresnet110_original", 1.734, 0.47),  # the same network as cifar_resnet110
    ("cifar_preresnet110_relu_only", 1.392, 0.36),
    # The same, and what is added is positive.
    ("cifar_preresnet110_relu_before", 4.450, 1.4),
    # The last map has one position: maxima of four rectified values, and no mean over positions.
    ("cifar_fractalnet_thin_c3", 1.098, 0.47),
]
"""Names, and the first loss over log K and the deviation of a logit over images, as measured."""


def first_logits(name: str) -> torch.Tensor:
    """Logits in training mode, (4, K)."""
    network: nn.Module = build(name)
    batch = pictures(name)
    with torch.no_grad():
        return network(batch.round() if batch.shape[1] > 3 else batch)  # boards are zeros and ones


def loss_over_log_k(logits: torch.Tensor) -> float:
    """In the mean of all labels: 1 for equal logits, 1 + v / (2 log K) for normal ones of variance v."""
    return float(-logits.log_softmax(1).mean() / math.log(logits.shape[1]))


@pytest.mark.sample(9)
@pytest.mark.parametrize(("name", "deviation"), AS_LOG_K)
def test_it_is_log_k_and_logits_depend_on_the_image(name: str, deviation: float) -> None:
    logits = first_logits(name)
    assert loss_over_log_k(logits) == pytest.approx(1, abs=0.1)
    assert deviation / 3 < logits.std(0).mean() < 3 * deviation


@pytest.mark.sample(2)
@pytest.mark.parametrize(("name", "loss", "deviation"), ABOVE)
def test_it_is_as_far_above_as_the_first_weights_explain(name: str, loss: float, deviation: float) -> None:
    logits = first_logits(name)
    assert loss_over_log_k(logits) - 1 == pytest.approx(loss - 1, rel=0.3)
    assert deviation / 3 < logits.std(0).mean() < 3 * deviation
