"""How data flows through a network: its stages and layers, where it can be cut, and what they compute."""
