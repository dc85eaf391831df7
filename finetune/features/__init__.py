"""Features of pretrained networks, layer by layer: computed, cached, exported and probed."""
