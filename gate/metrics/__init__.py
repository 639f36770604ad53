"""Metrics of the task, one file per task."""
