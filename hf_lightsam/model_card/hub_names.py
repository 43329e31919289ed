"""What the hub calls models and metrics that have other names here."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..demo.encoder import PACKAGE

PACKAGED = "sentence-transformers/all-MiniLM-L6-v2"
"""Whose weights the packaged encoder has, under :data:`PACKAGED_LICENSE`."""

PACKAGED_LICENSE = "apache-2.0"

METRIC_TYPES = {"pearson": "pearsonr"}
"""The hub's names of metrics that are called otherwise here."""


def hub_name(name: str) -> str | None:
    """Return the name on the hub of what a model was loaded from; None for a local folder, or what can be no name."""
    if name == PACKAGE:
        return PACKAGED
    return name if is_hub_name(name) and not Path(name).is_dir() else None


def is_hub_name(name: str) -> bool:
    """Say whether the hub could have a model of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
