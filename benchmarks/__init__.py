"""Benchmarks of speed, memory and accuracy: ``python -m benchmarks NAME``; one file a question."""
