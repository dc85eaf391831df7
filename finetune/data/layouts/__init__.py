"""Layouts of a folder of images: class folders, splits by their names, lists of labels."""
