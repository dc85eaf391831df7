"""The main job: from a recipe to a finished run."""
