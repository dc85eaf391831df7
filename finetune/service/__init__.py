"""The service: jobs over HTTP, each a process of the same command; data sets, models, predictions, a page."""
