"""What a run is told: one schema behind YAML, flags, help, forms and docs. Without torch."""
