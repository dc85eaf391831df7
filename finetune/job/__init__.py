"""The main job: from a recipe to a finished run; it calls each room once, in order."""

from finetune.run.run import Run, run

__all__ = ["Run", "run"]
