"""What the command line does, as functions: each command is a thin layer over one of them.

Arguments have the names of the flags::

    run = finetune.run(data="./photos", backbone="resnet50", strategy="top", epochs=5)
    run.metrics["accuracy"]

``settings`` takes every other key of a recipe, dotted as for ``--set``; ``recipe`` is a whole one. Progress
goes to stderr, or nowhere with ``display=SilentDisplay()``. A refusal is a ``finetune.errors.FinetuneError``.
Functions run in the calling process, which no supervisor restarts.
"""

from finetune.api.audit import audit
from finetune.api.commands import (
    advise,
    check,
    compare,
    dry_run,
    evaluate,
    export,
    extract,
    predict,
    probe,
    run,
)
from finetune.api.explain import explain_cam, explain_localise, explain_saliency
from finetune.api.explain_networks import explain_ablate, explain_class, explain_influence, explain_invariance
from finetune.api.explain_units import (
    explain_deconv,
    explain_evolution,
    explain_filters,
    explain_maps,
    explain_receptive_field,
    explain_top,
)
from finetune.api.extend import extend
from finetune.api.forecast import forecast

__all__ = (
    "advise",
    "audit",
    "check",
    "compare",
    "dry_run",
    "evaluate",
    "explain_ablate",
    "explain_cam",
    "explain_class",
    "explain_deconv",
    "explain_evolution",
    "explain_filters",
    "explain_influence",
    "explain_invariance",
    "explain_localise",
    "explain_maps",
    "explain_receptive_field",
    "explain_saliency",
    "explain_top",
    "export",
    "extend",
    "extract",
    "forecast",
    "predict",
    "probe",
    "run",
)
