"""The data room: find the images, split them, decode them, and refuse what cannot be trusted."""
