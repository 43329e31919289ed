"""GLUE: its tasks, their rows from the hub or from local files, and their metrics."""

from .data import load_glue, preprocess
from .metrics import GlueMetric, glue_metrics, make_compute_metrics
from .tasks import DIAGNOSTIC, TASKS, GlueTask, TextTask, get_task

__all__ = [
    "DIAGNOSTIC",
    "TASKS",
    "GlueMetric",
    "GlueTask",
    "TextTask",
    "get_task",
    "glue_metrics",
    "load_glue",
    "make_compute_metrics",
    "preprocess",
]
