"""Everything that draws: SVG for pages, PNG for files, from plain values and Pillow images."""
