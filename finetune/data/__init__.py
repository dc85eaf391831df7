"""Find the images of a dataset, split them, check them, decode them and load them in batches."""
