"""ZFNet (Zeiler, Fergus: Visualizing and understanding convolutional networks, arXiv:1311.2901).

``zfnet``      Figure 3: AlexNet with 7 x 7 kernels of stride 2 in the first and stride 2 in the second
               convolution, and dense connections in all. 62,357,608 parameters (computed; not published).
``zfnet_512``  With 512, 1024 and 512 maps in convolutions 3 to 5, the best single net of Table 2.

As published: sizes 110, 55, 26, 13, 13, 13, 13, 6; after each of the first two ReLUs a 3 x 3 pool of stride
2 and *then* the contrast normalisation across maps; dropout 0.5 in fc6 and fc7; weights of 1e-2 and biases
of 0 at first.

Decided here: the normalisation is AlexNet's (the paper gives no constants); one row of padding at the first
convolution and pools that round up, which gives the printed sizes at 224 pixels; the weights are drawn with
the deviation 1e-2, since equal weights would stay equal. The renormalisation of filters whose root mean
square exceeds 0.1 belongs to training and is not here.

Public ports differ: pytorchcv's normalises before it pools.

``zfnet_without_7`` and so on lack layers (Table 3).

Shape legend: B batch, C channels, H W rows and columns, K classes.
"""

from __future__ import annotations

from collections.abc import Collection

from pretrained.zoo.alexnet import ABLATIONS, Convolution, EightLayerNetwork
from pretrained.zoo.base import PIXEL_STD, make_card, register


class ZFNet(EightLayerNetwork):
    """The network of Zeiler and Fergus: (B, C, 224, 224) -> (B, K).

    Args:
        num_classes: K.
        in_chans: channels of the images.
        drop_rate: probability that a value of fc6 or fc7 is zero in training.
        global_pool: see :class:`EightLayerNetwork`.
        remove: numbers of the layers that are left out, among 3, 4, 6 and 7.
        widths: maps of convolutions 3, 4 and 5.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.5,
        global_pool: str = "avg",
        remove: Collection[int] = (),
        widths: tuple[int, int, int] = (384, 384, 256),
    ) -> None:
        convolutions = (
            Convolution(96, 7, stride=2, padding=1, after=("pool", "norm")),
            Convolution(256, 5, stride=2, after=("pool", "norm")),
            Convolution(widths[0], 3, padding=1),
            Convolution(widths[1], 3, padding=1),
            Convolution(widths[2], 3, padding=1, after=("pool",)),
        )
        super().__init__(convolutions, num_classes, in_chans, drop_rate, global_pool, remove)


_CARD = make_card((3, 224, 224), paper="arXiv:1311.2901", classifier="fc8", first_conv="conv1", std=PIXEL_STD)

register("zfnet", ZFNet, _CARD)
register("zfnet_512", ZFNet, _CARD, widths=(512, 1024, 512))
for _remove in ABLATIONS:
    register(f"zfnet_without_{''.join(map(str, _remove))}", ZFNet, _CARD, remove=_remove)
