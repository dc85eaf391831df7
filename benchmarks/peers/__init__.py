"""Other tools doing the same job, one script each; they import nothing of ours."""
