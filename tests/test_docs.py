"""What the documents name exists, and their figures are those of the records."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
from pathlib import Path

import pytest
from docs_support import python_blocks, unchanged

from benchmarks.picture import heat_map
from fastrnn.bench.environment import read
from fastrnn.bench.measure import geomean
from fastrnn.bench.report import markdown
from fastrnn.bench.shapes import CASES, MODES
from fastrnn.bench.targets import measurements
from fastrnn.cells import CELLS

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "pytorch.md"
DOCUMENTS = [
    p.relative_to(ROOT).as_posix() for p in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
]
NAMED = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", TABLE.read_text())


def test_the_table_names_tests():
    first = TABLE.read_text().split("|---|---|---|\n", 1)[1].split("\n\n", 1)[0]
    rows = first.splitlines()
    assert len(rows) > 10
    without = [row for row in rows if "tests/" not in row]
    assert not without


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
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
    assert (ROOT / "docs/img/speed.svg").read_text() == heat_map(records, 2)


def test_the_rates_of_ragged_inference_are_those_of_the_record():
    """Percent of the sgemm rate on one thread: ours packed, ours by lengths, torch.nn's in both."""
    text = (ROOT / "README.md").read_text()
    (name,) = re.findall(r"`(benchmarks/results/\S+\.jsonl)`", text)
    rows = [r for r in measurements(read(ROOT / name)) if r["mode"] == "inference" and r["threads"] == 1]
    shown = []
    for side, cases in (("subject", "packed"), ("subject", "lengths"), ("baseline", ("packed", "lengths"))):
        found = [100 * r["flops"] / r[side]["p50"] / r["gemm"] for r in rows if r["case"].startswith(cases)]
        assert found
        shown += [min(found), max(found), sum(found) / len(found)]
    sentence = re.search(r"Ragged inference on one thread(.*?);", " ".join(text.split()))
    assert sentence
    assert re.findall(r"\d+", sentence[1]) == [f"{figure:.0f}" for figure in shown]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_lists_are_lists_on_the_site_too(document):
    """Markdown for the site wants an empty line before a list or a table, and four blanks before a list in a list."""
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    assert not re.findall(r"^ {1,3}- .*", text, re.MULTILINE)
    assert not re.findall(r"^(?![-| #]|\d+\. ).+\n(?:- |\|).*", text, re.MULTILINE)


def test_the_pictures_are_what_their_script_draws(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs/img")
    script = importlib.import_module("draw")
    for name, draw in script.PICTURES.items():
        assert (ROOT / f"docs/img/{name}.svg").read_text() == draw(), f"run python docs/img/draw.py: {name}"


def test_the_version_stands_in_one_place():
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    others = [ROOT / name for name in ("setup.py", "CMakeLists.txt", "CITATION.cff", "mkdocs.yml", "README.md")]
    for path in [*others, *(ROOT / "fastrnn").rglob("*.py")]:
        assert not re.search(rf"(?<![\d.]){re.escape(version)}(?![\d.])", path.read_text()), path


def sections(text: str) -> list[tuple[str, str]]:
    """(level of the heading, what stands under it), code blocks taken out."""
    parts = re.split(r"^(#+) .*$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("what", ["headings", "code", "tables", "links", "figures"])
def test_the_chinese_readme_is_in_step(what):
    """The same headings, blocks of code, rows of tables, links, code words and figures, section by section."""
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README.zh.md"))
    if what == "code":
        assert re.findall(r"```.*?```", english, re.DOTALL) == re.findall(r"```.*?```", chinese, re.DOTALL)
        return
    ours, theirs = sections(english), sections(chinese)
    if what == "headings":
        assert [level for level, _ in ours] == [level for level, _ in theirs]
        return
    pattern = {
        "tables": r"^\|.*\d\.\d\d.*$|^(\|)",
        "links": r"\]\((?!README)([^)]+)\)|`([^`]+)`",
        "figures": r"(?<![A-Za-z0-9_.])\d+(?:\.\d+)?",
    }[what]
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        want, got = (Counter(m.group() for m in re.finditer(pattern, part, re.MULTILINE)) for part in (a, b))
        assert want == got, f"only in README.md: {want - got}; only in README.zh.md: {got - want}; under {a[:60]!r}"


def test_results_of_training_are_those_of_their_outputs():
    text = (ROOT / "docs" / "training.md").read_text().split("## Results", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"\| .*?\[output\]\((results/\S+\.log)\).*? \| (.*?) \|", text)
    assert rows
    for name, reached in rows:
        command, output = (ROOT / "docs" / name).read_text().split("\n", 1)
        assert command.removeprefix("$ ") in text
        scores = [line for line in output.splitlines() if line.startswith(("test:", "valid:"))]
        (score,) = [line for line in scores if line.startswith(reached.split()[0])]
        figures = re.findall(r"\d[\d.]*%?", reached)
        assert figures, name
        assert all(figure in score for figure in figures), name
