"""Untrusted archives: their entries, what of them is unpacked, and the folder that holds it."""
