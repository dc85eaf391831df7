"""LayerCAM: Grad-CAM with a weight of its own for each position (Jiang et al., doi:10.1109/TIP.2021.3089943).

Each feature is multiplied by its own gradient where that is positive. At the last layer the map is like that
of Grad-CAM; at earlier layers, whose gradients differ from position to position, it stays sharp.
"""

from __future__ import annotations

from torch import Tensor

from finetune.explain.attribution.cam import GradCam


class LayerCam(GradCam):
    """Computes LayerCAM maps of one network; used as :class:`finetune.explain.attribution.cam.GradCam` is."""

    def _weigh(self, features: Tensor, slopes: Tensor) -> Tensor:
        return (slopes.clamp_min(0) * features).sum(dim=1)
