"""What a network makes of pictures: its features layer by layer, kept, written down, and judged."""
