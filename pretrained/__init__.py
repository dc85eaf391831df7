"""What can be fine-tuned: names, weights, networks cut into stages; nothing of data folders or training."""
