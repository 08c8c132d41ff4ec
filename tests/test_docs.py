"""What the documents name exists, and their figures are those of the records."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from docs_support import python_blocks, unchanged

from fastrnn.bench.environment import read
from fastrnn.bench.measure import geomean
from fastrnn.bench.report import markdown
from fastrnn.bench.shapes import CASES, MODES
from fastrnn.bench.targets import measurements
from fastrnn.cells import CELLS

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "pytorch.md"
NAMED = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", TABLE.read_text())


def test_the_table_names_tests():
    first = TABLE.read_text().split("|---|---|---|\n", 1)[1].split("\n\n", 1)[0]
    rows = first.splitlines()
    assert len(rows) > 10
    without = [row for row in rows if "tests/" not in row]
    assert not without


@pytest.mark.parametrize("document", ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_python_blocks_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write there
    scope = {"__name__": document}
    with unchanged(CELLS):
        for block in python_blocks(ROOT / document):  # in order, each after those before it
            exec(compile(block, document, "exec"), scope)


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_named_test_exists(file, name):
    tree = ast.parse((ROOT / file).read_text())
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not name or name in found, f"{file} has no {name}"


def test_the_table_of_times_is_that_of_its_records():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"`(benchmarks/results/\S+\.jsonl)`", text)
    assert len(named) == 1
    records = read(ROOT / named[0])
    assert markdown(records) in text
    listed = {case.name for case in CASES if case.listed}
    shown = [r for r in measurements(records) if r["case"] in listed and r["mode"] in MODES]
    means = [geomean([r["ratio"]["p50"] for r in shown if r["threads"] == n]) for n in (1, 2)]
    assert "{:.2f} on one thread, {:.2f} on two".format(*means) in text
