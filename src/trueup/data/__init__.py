"""Data: files and hubs → rows → examples → token ids, with every row accounted for."""
