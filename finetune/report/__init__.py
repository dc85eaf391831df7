"""The HTML report of a run or an evaluation: metrics, plots and images in one file."""
