"""Experiment trackers of others, told of a run through their own clients where a recipe asks for them."""
