"""Log a run to third-party experiment trackers, through their own clients, if the recipe names them."""
