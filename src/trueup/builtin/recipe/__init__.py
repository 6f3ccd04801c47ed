"""How the built-in model is made: its text, its untrained form, and the two stages of training."""
