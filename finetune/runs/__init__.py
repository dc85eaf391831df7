"""The folder a run leaves: names, formats, and how they are written."""
