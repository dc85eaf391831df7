"""FractalNet for CIFAR: "FractalNet: Ultra-Deep Neural Networks without Residuals", arXiv:1605.07648.

As published: f_1 is one convolution and f_(c+1)(z) = join(f_c(f_c(z)), conv(z)), so a block of C columns has
1, 2, 4, ... 2^(C-1) layers in them; a join is the mean of its inputs; B = 5 blocks of 64, 128, 256, 512, 512
channels with 2x2 max pooling at their ends, and one linear layer on the 1x1 map. A layer is conv, dropout,
BN, ReLU; the dropout of the blocks is 0, 0.1, 0.2, 0.3, 0.4.

Drop-path, half of the mini-batches each: local, where every join drops each input with probability 0.15 and
keeps one at random if none is left; global, where one column, the same in all blocks, is all that is read. A
join takes the mean of what is left; in evaluation nothing is dropped. Dropped columns are computed all the
same, and update the running statistics of their batch norms.

As in section 4, each column is pooled before the join that ends a block (figure 1 has the pooling behind the
join).
Decided here: convolutions without bias and batch norm with scale and shift (the authors' Caffe layers have a
bias that batch norm cancels, and no scale); first weights as for ReLU (arXiv:1502.01852), the authors' are
Xavier's; channels' mean and deviation on the cards, where a file of the authors subtracts a mean image.
Where public ports differ: pytorchcv pools behind the join, and draws global and local for the images of one
batch.
The stated widths do not give the 38.6 M that later papers quote: C = 3 has 33.7 M. The thin networks of the
paper's own table (widths 16, 32, 64, 128, 128; C = 1 to 6: 0.3, 0.8, 2.1, 4.8, 10.2, 21.1 M) are met.

Shape legend: B batch, C columns, D H W channels, rows and columns of a map, J inputs of a join.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pretrained.zoo.base import register
from pretrained.zoo.residual import StagedNetwork, chain, cifar_card, conv

PAPER = "arXiv:1605.07648"
WIDTHS = (64, 128, 256, 512, 512)
THIN_WIDTHS = (16, 32, 64, 128, 128)
LOCAL_DROP = 0.15
GLOBAL_SHARE = 0.5
ALL_COLUMNS = -1
"""In place of the number of a column: no column was drawn, joins drop locally."""


class Join(nn.Module):
    """The mean of the columns that are not dropped: J maps (B, D, H, W) -> (B, D, H, W).

    Args:
        first_column: number of the shallowest column among the inputs.
        local_drop: probability that an input is dropped where no column was drawn.
    """

    def __init__(self, first_column: int, local_drop: float) -> None:
        super().__init__()
        self.first_column, self.local_drop = first_column, local_drop

    def forward(self, columns: Sequence[Tensor], column: int) -> Tensor:
        """Return the mean.

        Args:
            columns: maps of the columns from ``first_column`` on, J of them.
            column: the column drawn for the network, or ``ALL_COLUMNS``.
        """
        if not self.training:
            return torch.stack(tuple(columns)).mean(dim=0)
        kept = self.draw(len(columns), column).to(columns[0])
        factors = kept / kept.sum()
        return torch.stack([factor * one for factor, one in zip(factors, columns, strict=True)]).sum(dim=0)

    def draw(self, count: int, column: int) -> Tensor:
        """Return which of so many inputs are kept, a mask (J,) on the CPU."""
        if column != ALL_COLUMNS:
            # A join without the drawn column is not on its path, and nothing reads what it gives.
            on_path = torch.arange(self.first_column, self.first_column + count) == column
            return on_path if on_path.any() else torch.ones(count, dtype=torch.bool)
        kept = torch.rand(count) >= self.local_drop
        if not kept.any():
            kept[torch.randint(count, ())] = True
        return kept


class FractalBlock(nn.Module):
    """Columns of 1, 2, 4, ... layers, joined where several end: (B, D, H, W) -> (B, D', H / 2, W / 2).

    Layers are in ``layers[step]``, from the deepest column up: at step t (from 1) column c of C (0 is the
    shallowest) has a layer if t is a multiple of 2^(C-1-c).

    Args:
        inputs: D.
        outputs: D'.
        columns: C.
        drop_rate: dropout in every layer.
        local_drop: of the joins.
    """

    def __init__(self, inputs: int, outputs: int, columns: int, drop_rate: float, local_drop: float) -> None:
        super().__init__()
        self.columns = columns
        self.layers = nn.ModuleList()
        self.joins = nn.ModuleList()
        for step in range(1, 2 ** (columns - 1) + 1):
            active = [column for column in range(columns) if step % 2 ** (columns - 1 - column) == 0]
            row = nn.ModuleDict()
            for column in active:
                is_first = step == 2 ** (columns - 1 - column)
                layer = conv(inputs if is_first else outputs, outputs, 3)
                row[f"column{column}"] = chain("cdbr", layer.in_channels, [layer], drop_rate)
            self.layers.append(row)
            self.joins.append(Join(active[0], local_drop))
        self.pool = nn.MaxPool2d(2)

    @property
    def drops_columns(self) -> bool:
        """Whether one of its joins drops inputs: not if the block is frozen."""
        steps = zip(self.layers, self.joins, strict=True)
        return any(join.training and len(row) > 1 for row, join in steps)  # type: ignore[arg-type]

    def forward(self, features: Tensor, column: int) -> Tensor:
        """Return the block's output; for ``column`` see :class:`Join`."""
        latest = [features] * self.columns
        for step, (row, join) in enumerate(zip(self.layers, self.joins, strict=True), start=1):
            assert isinstance(row, nn.ModuleDict)
            first = self.columns - len(row)
            outputs = [layer(latest[first + index]) for index, layer in enumerate(row.values())]
            if step == len(self.layers):
                outputs = [self.pool(output) for output in outputs]
            joined = join(outputs, column) if len(outputs) > 1 else outputs[0]
            latest[first:] = [joined] * len(outputs)
        return latest[-1]


class FractalNet(StagedNetwork):
    """Fractal blocks with drop-path: (B, 3, 32, 32) -> (B, K).

    Args:
        columns: C.
        widths: output channels of the blocks.
        local_drop: probability that a join drops an input in a mini-batch of local drop-path.
        global_share: share of mini-batches with global drop-path; 0 has local drop-path alone.
        in_chans: channels of an image.
        num_classes: K.
        global_pool: see :meth:`PooledNetwork.add_head`.
        drop_rate: dropout in the last block; it grows from 0 by equal steps.
    """

    def __init__(
        self,
        columns: int,
        widths: Sequence[int] = WIDTHS,
        *,
        local_drop: float = LOCAL_DROP,
        global_share: float = GLOBAL_SHARE,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        drop_rate: float = 0.4,
    ) -> None:
        inputs = (in_chans, *widths)
        blocks = [
            FractalBlock(
                inputs[index], width, columns, drop_rate * index / max(1, len(widths) - 1), local_drop
            )
            for index, width in enumerate(widths)
        ]
        super().__init__(nn.Identity(), blocks, widths[-1], num_classes=num_classes, global_pool=global_pool)
        self.columns, self.global_share = columns, global_share

    def draw_column(self) -> int:
        """Return the column that a mini-batch of training reads, or ``ALL_COLUMNS``."""
        if torch.rand(()) >= self.global_share:
            return ALL_COLUMNS
        return int(torch.randint(self.columns, ()))

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last map (B, D, H / 2^blocks, W / 2^blocks)."""
        column: int | None = None
        for block in self.stages:
            if column is None and block.drops_columns:  # frozen blocks before it draw nothing
                column = self.draw_column()
            images = block(images, ALL_COLUMNS if column is None else column)
        return images

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns: one group a step of the deepest column; ``coarse`` has one a block."""
        block = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.layers\.(\d+)"
        return {"stem": r"^stages\.0\.layers\.0\.", "blocks": block}


def _register_all() -> None:
    card = cifar_card(PAPER)
    first_conv = "stages.0.layers.0.column{}.conv1"
    for columns, name, widths in (
        (3, "fractalnet20", WIDTHS),
        *((columns, f"fractalnet_thin_c{columns}", THIN_WIDTHS) for columns in range(1, 7)),
    ):
        own = replace(card, first_conv=first_conv.format(columns - 1))
        register(f"cifar_{name}", FractalNet, own, columns=columns, widths=widths)


_register_all()
