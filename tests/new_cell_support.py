"""The cell of docs/adding-a-cell.md, as it stands there, for the tests that run it."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from docs_support import unchanged

from fastrnn.backends import clear_choices
from fastrnn.cells import CELLS

PAGE = Path(__file__).parent.parent / "docs" / "adding-a-cell.md"
NAME = "lstm_peephole"


@pytest.fixture
def page(monkeypatch):
    """The names that the page's code makes, and its cell in the registry."""
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where torch.compile looks for a function's globals
    scope = vars(module)
    with unchanged(CELLS):
        exec(compile(code(), str(PAGE), "exec"), scope)
        clear_choices()
        yield scope


def code() -> str:
    """The page's Python on the lines where it stands there, from which Triton reads a function's text."""
    text, out = PAGE.read_text(), ""
    for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        out += "\n" * (text.count("\n", 0, block.start(1)) - out.count("\n")) + block[1]
    return out


def sources() -> dict[str, str]:
    """The page's files in C++, by their path."""
    return dict(re.findall(r"^`(csrc/\S+?)`[^\n]*:\n\n```cpp\n(.*?)```", PAGE.read_text(), re.MULTILINE | re.DOTALL))


def peephole(page, *args, dtype=torch.float64, **kwargs):
    """A module whose peepholes are not zero."""
    module = page["PeepholeLSTM"](*args, dtype=dtype, **kwargs)
    with torch.no_grad():
        for p in module.peepholes:
            p.normal_()
    return module
