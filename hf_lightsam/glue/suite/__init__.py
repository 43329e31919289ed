"""``hf-lightsam glue``: GLUE tasks, methods and seeds in one resumable command, and what came of it."""

from .methods import Method, parse_method, parse_methods
from .statistics import Summary, bootstrap_interval, summarize
from .store import COLUMNS, read_results

__all__ = [
    "COLUMNS",
    "Method",
    "Summary",
    "bootstrap_interval",
    "parse_method",
    "parse_methods",
    "read_results",
    "summarize",
]
