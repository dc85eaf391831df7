"""Prediction and evaluation: metrics with intervals, calibration, comparisons, label issues."""
