"""Text tasks: GLUE's or one's own, their rows from the hub or from local files, and their metrics."""

from .data import load_glue, preprocess
from .data_report import DataReport, report_rows
from .metrics import GlueMetric, glue_average, glue_metrics, make_compute_metrics, task_metrics
from .own_data import load_own_data
from .preprocessing import tokenize
from .tasks import DIAGNOSTIC, TASKS, GlueTask, TextTask, get_task

__all__ = [
    "DIAGNOSTIC",
    "TASKS",
    "DataReport",
    "GlueMetric",
    "GlueTask",
    "TextTask",
    "get_task",
    "glue_average",
    "glue_metrics",
    "load_glue",
    "load_own_data",
    "make_compute_metrics",
    "preprocess",
    "report_rows",
    "task_metrics",
    "tokenize",
]
