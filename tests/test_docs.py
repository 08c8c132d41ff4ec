"""What the documents name exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "pytorch.md"
NAMED = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", TABLE.read_text()) if TABLE.exists() else []


def test_the_table_names_tests():
    first = TABLE.read_text().split("|---|---|---|\n", 1)[1].split("\n\n", 1)[0]
    rows = first.splitlines()
    assert len(rows) > 10
    without = [row for row in rows if "tests/" not in row]
    assert not without


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_named_test_exists(file, name):
    tree = ast.parse((ROOT / file).read_text())
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not name or name in found, f"{file} has no {name}"
