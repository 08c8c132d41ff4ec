"""The code in the documents, for the tests that run it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastrnn.backends import clear_choices


def python_blocks(document: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)


@contextlib.contextmanager
def unchanged(registry: dict[str, Any]) -> Iterator[None]:
    """What is added to `registry` within is taken out again."""
    before = dict(registry)
    try:
        yield
    finally:
        registry.clear()
        registry.update(before)
        clear_choices()
