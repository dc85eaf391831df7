"""Commands that judge data and runs."""
