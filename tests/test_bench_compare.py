"""Passes of a run, the noise that they tell, and the comparison of two runs by it."""

import random
from pathlib import Path

import pytest
from bench_support import passes, record, write

from fastrnn.bench import compare
from fastrnn.bench.environment import lines, read
from fastrnn.bench.passes import condensed, noise
from fastrnn.cli import main


def test_the_middle_pass_stands_for_a_case():
    apart = [*passes("a", 3.0, 1.0, 2.0), record("b", 5.0), *passes("c", 4.0, 1.0)]
    rng = random.Random()
    rng.shuffle(apart)
    found = {r["case"]: r for r in condensed(apart)}
    assert [found[c]["ratio"]["p50"] for c in "abc"] == [2.0, 5.0, 1.0]
    assert sorted(found["a"]["passes"]) == [1.0, 2.0, 3.0]
    assert found["b"]["passes"] == [5.0]
    assert condensed([record("a", 1.0), record("a", 2.0)])[0]["ratio"]["p50"] == 2.0  # the same pass made anew


def test_what_is_no_measurement_stays_where_it_is():
    note = {"kind": "note", "message": "n"}
    assert [r["kind"] for r in condensed([*passes("a", 1.0, 2.0), note])] == ["measurement", "note"]


def test_noise_is_of_passes_and_of_their_number_of_threads():
    many = [r for k in range(40) for r in passes(f"c{k}", 2.0, 2.0 * 1.03, threads=1)]
    some = passes("x", 1.0, 1.3, threads=2)
    found = noise(condensed([*many, *some, record("y", 1.0, threads=4)]))
    assert found == {("cpu", 1): pytest.approx(1.03), ("cpu", 2): pytest.approx(1.3)}


def test_a_planted_regression_is_named_and_noise_is_not(tmp_path, capsys):
    """a is slower; b by less than LEAST, c by less than its passes differ, d by less than those of other cases."""
    quiet = [r for k in range(40) for r in passes(f"q{k}", 1.0, 1.0, 1.08)]
    old = [*passes("a", 2.0, 2.02, 1.98), *passes("b", 2.0, 2.0, 2.0), *passes("c", 2.0, 1.5, 2.1), record("gone", 1.0)]
    new = [*passes("a", 1.6, 1.61, 1.59), *passes("b", 1.95, 1.96, 1.95), *passes("c", 1.6, 1.6, 1.4), record("e", 1.0)]
    old += [*quiet, *passes("d", 2.0, 2.0, 2.0)]
    new += [*quiet, *passes("d", 1.87, 1.87, 1.87)]
    old, new = write(tmp_path / "old", old), write(tmp_path / "new", new)
    assert main(["bench", "--compare", old, new]) == 1
    out = capsys.readouterr().out
    assert "44 cases compared, as torch.nn / fastrnn: 1 regressions" in out
    assert "1 thread: noise 1.08, geometric mean of all cases 0.9" in out
    assert "REGRESSION      2.00 ->     1.60  (0.80)  GRU a training float32, 1 thread" in out
    assert "in the old run only: 1, the first of them GRU gone" in out
    assert main(["bench", "--compare", new, old]) == 0
    assert "improvement" in capsys.readouterr().out


def test_one_pass_is_held_against_three_by_its_rounds(tmp_path, capsys):
    old = write(tmp_path / "old", [*passes("a", 2.0, 2.02, 1.98), *passes("b", 2.0, 2.0, 1.98)])
    new = write(tmp_path / "new", [record("a", 1.6), record("b", 1.6, 0.3)])
    assert main(["bench", "--compare", old, new]) == 1
    out = capsys.readouterr().out
    assert "1 regressions" in out
    assert "GRU a training" in out


def test_without_passes_there_is_no_noise_and_no_verdict(tmp_path, capsys):
    old, new = (write(tmp_path / name, [record("a", ratio)]) for name, ratio in (("old", 2.0), ("new", 1.0)))
    assert main(["bench", "--compare", old, new]) == 2
    assert "measure at least one of them with --passes 3" in capsys.readouterr().err
    both = [
        write(tmp_path / n, [*passes("b", 1.0, 1.01), record("a", r, threads=2)]) for n, r in (("o", 2.0), ("n", 1))
    ]
    assert main(["bench", "--compare", *both]) == 0
    assert "not compared: 1 cases" in capsys.readouterr().out


def test_memory_that_grows_is_a_regression():
    key = {"kind": "memory", "case": "a", "cell": "GRU", "mode": "training", "threads": 1, "baseline": 0}
    old, new = ({**key, "subject": size << 20} for size in (100, 120))
    (change,) = compare.compare([old], [new]).regressions
    assert (change.before, change.after) == (100, 120)
    assert not compare.compare([old], [{**key, "subject": 101 << 20}]).regressions


def test_committed_records_are_read(capsys):
    runs = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*/cpu-*.jsonl"))
    assert runs
    for path in runs:
        assert len(read(path)) < len(lines(path))  # of several passes
        assert main(["bench", "--compare", str(path), str(path)]) == 0
        assert ": 0 regressions" in capsys.readouterr().out
