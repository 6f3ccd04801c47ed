"""Models measured: on data, by their answers, against each other and against where they started."""
