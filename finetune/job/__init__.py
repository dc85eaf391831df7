"""The main job: from a recipe to a finished run; it calls each room once, in order."""

from finetune.job.main import Run, run

__all__ = ["Run", "run"]
