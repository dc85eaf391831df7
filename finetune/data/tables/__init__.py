"""Read tables of images: text into cells, columns by their names, cells into files and splits."""
