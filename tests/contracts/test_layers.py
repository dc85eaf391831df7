"""Every family gives features by stage: in order, apart by image, and what its classifier reads.

Real networks with random weights, on the CPU: twelve by default, all families with ``-m slow`` (minutes).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pretrained.backbone import _stages_of
from pretrained.catalog import find_card
from pretrained.graph.classifier import classifier_layers
from pretrained.graph.layers import FeatureExtractor, Layers
from pretrained.network import build_network
from tests.contracts.families import DEFAULT
from tests.contracts.test_cut_networks import NAMES
from tests.sweeps import slow_except


def check(name: str) -> None:
    card = find_card(name)
    torch.manual_seed(0)
    network = build_network(replace(card, num_classes=10)).eval()
    stages = _stages_of(network, card.preprocessing)
    layers = Layers(network, stages, card.preprocessing.input_size)
    chosen = layers.all
    below = [stage.name for stage in stages if stage.role != "head"]  # and pre_logits, where it differs
    assert [layer.name for layer in chosen if layer.name != "pre_logits"] == below
    shares = [layer.share for layer in chosen]
    assert shares == sorted(shares) and len(set(shares)) > 1
    assert layers.pre_logits is not None
    images = torch.randn(3, *card.preprocessing.input_size, generator=torch.Generator().manual_seed(1))
    everything = [*chosen, layers.pre_logits]
    extract = FeatureExtractor(network, everything, "auto", with_logits=True)
    with torch.no_grad():
        rows, single = extract(images), extract(images[1:2])
    for layer, together, alone in zip(everything, rows, single, strict=False):
        assert together.shape == (3, layer.num_features("auto")), layer.name
        assert together.dtype == torch.float32 and together.isfinite().all()
        scale = together.abs().max().clamp_min(1e-6)
        assert (together[1] - alone[0]).abs().max() <= 1e-3 * scale, layer.name  # nothing of its neighbours
        if layer.share > 0:
            assert not torch.equal(together[0], together[2]), layer.name
    assert torch.allclose(rows[-1], network(images), atol=1e-4, rtol=1e-3)
    # The last of all is what the classifier reads, pooled: a new linear classifier can stand on it.
    assert chosen[-1].num_features("auto") == layers.pre_logits.num_features("auto")
    if len(classifier_layers(network)) == 1:
        assert torch.allclose(rows[len(chosen) - 1], rows[len(chosen)], atol=1e-4, rtol=1e-3)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", slow_except(DEFAULT, NAMES))
def test_features_of_every_layer(name: str) -> None:
    check(name)
