"""The routes of the service; one kind of resource a file."""
