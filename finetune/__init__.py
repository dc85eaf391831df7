"""Fine-tune ImageNet backbones on a folder of images, and stand behind the number that comes out."""

import os
from importlib import import_module

__version__ = "0.1.0"
__all__ = ("Prediction", "Predictor", "load")

# No telemetry: the hub's client reads this when it is first imported, by timm for one.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> object:
    """Look up what predicts when it is first asked for: it imports torch, and the rooms above (PEP 562).

    ``__init__.pyi`` tells type checkers.
    """
    if name in __all__:
        return getattr(import_module("finetune.evaluation.predictor"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
