"""The loop, and what makes it stop, go on and be fast."""
