"""Explanations of predictions: one method a file; drawing is in ``finetune.plots``."""
