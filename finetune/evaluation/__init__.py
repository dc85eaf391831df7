"""From a network and images to figures that can be stood behind."""
