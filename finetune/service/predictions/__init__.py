"""The predictions of the service: models in processes of their own."""
