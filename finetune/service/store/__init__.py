"""The store of the service: jobs, data sets and models in a database, and their files."""
