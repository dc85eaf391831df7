"""What a network makes of images: its features layer by layer, kept, written down, and judged."""
