"""Models written for others to use: merged, rounded or quantised, compared with what they came from."""
