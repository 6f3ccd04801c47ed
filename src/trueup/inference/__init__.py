"""Using models, and looking at runs and machines."""
