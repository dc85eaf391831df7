"""The page of a run: everything worth looking at, in one file."""
