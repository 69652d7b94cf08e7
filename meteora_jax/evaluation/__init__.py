"""Judging a model: the tasks, the metrics, and the runs over them."""
