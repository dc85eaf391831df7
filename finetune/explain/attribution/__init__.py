"""Where in an image the evidence for a class is; one method a file."""
