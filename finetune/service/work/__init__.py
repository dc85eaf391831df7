"""The work of the service: jobs as processes of the command line."""
