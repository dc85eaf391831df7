"""Run folders and cached files: names and formats, writing them safely, and reading them."""
