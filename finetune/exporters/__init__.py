"""Hand the trained model over in a form that other tools load."""
