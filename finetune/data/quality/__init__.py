"""What in a dataset would make a metric misleading: copies, leaks, unreadable or unusual files."""
