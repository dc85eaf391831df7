"""What in a data set would make a metric misleading: copies, leaks, unreadable or unusual files."""
