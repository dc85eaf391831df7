"""What it costs, beside what else there is: `python -m benchmarks run`."""
