"""A strategy that the package does not have, added as anybody would: a class, and a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from finetune.strategies import STRATEGIES, Phase, Strategy, StrategyKeys, register_strategy
from pretrained.graph.stages import Stage


class GradualUnfreezing(Strategy):
    """Gradual unfreezing (ULMFiT, arXiv:1801.06146): the head, then one of the top stages more a phase."""

    def phases(self, stages: Sequence[Stage], keys: StrategyKeys) -> Sequence[Phase]:
        order = [stage.name for stage in stages][::-1]
        deepest = 1 + keys.top_stages
        return [
            Phase({name: keys.head_factor if place < size else 0.0 for place, name in enumerate(order)})
            for size in range(1, deepest + 1)
        ]


@contextmanager
def gradual_unfreezing() -> Iterator[Strategy]:
    """The strategy, known under its name while the block runs."""
    strategy = GradualUnfreezing("gradual", "the head, then one stage more a phase", fine_tunes=True)
    register_strategy(strategy)
    try:
        yield strategy
    finally:
        del STRATEGIES[strategy.name]
