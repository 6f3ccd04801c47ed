"""Recipes: each builds the parts of one kind of run and calls the loop."""
