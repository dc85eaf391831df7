"""Commands that measure the images on features, without training a network."""
