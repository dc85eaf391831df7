"""What can be fine-tuned: names, weights, networks cut into stages. Knows nothing of data folders or training."""
