"""What a run is told: the only schema behind YAML, flags, help, forms and docs. Nothing here imports torch."""
