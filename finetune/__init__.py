"""Fine-tune ImageNet backbones on a folder of images, and trust the number that comes out.

The functions of :mod:`finetune.api` are the package's own: ``finetune.run(data="./photos", strategy="top")``.
"""

import os
from importlib import import_module

__version__ = "0.1.0"

_MODULES = {
    "Prediction": "finetune.evaluation.predictor",
    "Predictor": "finetune.evaluation.predictor",
    "SilentDisplay": "finetune.system.display",
    "advise": "finetune.api",
    "audit": "finetune.api",
    "check": "finetune.api",
    "compare": "finetune.api",
    "dry_run": "finetune.api",
    "evaluate": "finetune.api",
    "explain_ablate": "finetune.api",
    "explain_cam": "finetune.api",
    "explain_class": "finetune.api",
    "explain_deconv": "finetune.api",
    "explain_evolution": "finetune.api",
    "explain_filters": "finetune.api",
    "explain_influence": "finetune.api",
    "explain_invariance": "finetune.api",
    "explain_localise": "finetune.api",
    "explain_maps": "finetune.api",
    "explain_receptive_field": "finetune.api",
    "explain_saliency": "finetune.api",
    "explain_top": "finetune.api",
    "export": "finetune.api",
    "extend": "finetune.api",
    "extract": "finetune.api",
    "forecast": "finetune.api",
    "load": "finetune.evaluation.predictor",
    "predict": "finetune.api",
    "probe": "finetune.api",
    "run": "finetune.api",
}
__all__ = tuple(_MODULES)

# No telemetry: the hub's client reads this when it is first imported, by timm for one.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for (PEP 562), so that ``finetune --help`` needs no torch.

    ``__init__.pyi`` tells type checkers.
    """
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the names that the package has, and those that it imports when they are asked for."""
    return sorted({*globals(), *__all__})
