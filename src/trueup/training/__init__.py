"""The training engine: loop, optimizer, checkpoints, events. It knows nothing of objectives, models
or data.
"""
