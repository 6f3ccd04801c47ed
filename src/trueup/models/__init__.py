"""Loading models and turning batches into log-probabilities."""
