"""One file per task: what its batches, steps and figures are."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {"lm": "LmTask", "classify": "ClassifyTask", "translate": "TranslateTask"}


def find_task(name: str) -> Any:
    """The Task class called `name`, imported when first asked for."""
    return getattr(import_module(f".{name}", __name__), _WHERE[name])
