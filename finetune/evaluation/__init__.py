"""From a network and pictures to figures that can be stood behind."""
