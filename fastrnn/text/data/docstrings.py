"""The default data of classification: docstrings of Python's standard library, and the package each belongs to."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "tkinter", "unittest", "xml")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(least: int = 40) -> Iterator[tuple[str, str]]:
    """(docstring, package) of each docstring of at least `least` characters; none twice.

    Some systems install Python without tkinter; then its class is missing.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            if {"test", "tests"} & set(path.relative_to(root).parts):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
                if text and len(text) >= least and text not in seen:
                    seen.add(text)
                    yield text, package
