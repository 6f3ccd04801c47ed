"""Generation: the engine behind chat, evaluation and, later, online training and serving."""
