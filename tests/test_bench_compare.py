"""Passes of a run, the noise that they tell, and the comparison of two runs by it."""

import math
import random
from pathlib import Path

import pytest
from bench_support import passes, record, write

from fastrnn.bench import compare
from fastrnn.bench.environment import lines, read
from fastrnn.bench.passes import condensed, joined, noise
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


def test_of_several_files_the_last_tells_of_a_case():
    note = {"kind": "note", "message": "n"}
    first, last = condensed([*passes("a", 1.0, 2.0, 3.0), record("b", 5.0), note]), condensed([record("a", 7.0), note])
    found = joined([first, last])
    assert [r["ratio"]["p50"] for r in found if r["kind"] == "measurement"] == [7.0, 5.0]
    assert sum(r["kind"] == "note" for r in found) == 2


def test_noise_is_of_passes_by_threads_and_type():
    many = [r for k in range(40) for r in passes(f"c{k}", 2.0, 2.0 * 1.03, threads=1)]
    some = passes("x", 1.0, 1.3, threads=2)
    half = passes("x", 1.0, 1.2, threads=2, dtype="bfloat16")
    few = [*passes("x", 1.0, 1.001, threads=4), record("y", 1.0, threads=4), record("z", 1.0, threads=4)]
    found = noise(condensed([*many, *some, *half, *few]))
    want = {("cpu", 1, "float32"): 1.03, ("cpu", 2, "float32"): 1.3, ("cpu", 2, "bfloat16"): 1.2}
    assert {g: n.deviation for g, n in found.items()} == {
        g: pytest.approx(math.log(f) / math.sqrt(2)) for g, f in want.items()
    }
    assert found["cpu", 1, "float32"].freedom == 40


def test_a_planted_regression_is_named_and_noise_is_not(tmp_path, capsys):
    """a is slower; b by less than LEAST, c by less than its own passes make likely."""
    quiet = [r for k in range(40) for r in passes(f"q{k}", 1.0, 1.01, 0.99)]
    old = [*passes("a", 2.0, 2.02, 1.98), *passes("b", 2.0, 2.0, 2.0), *passes("c", 2.0, 1.5, 2.1), record("gone", 1.0)]
    new = [*passes("a", 1.6, 1.61, 1.59), *passes("b", 1.91, 1.92, 1.91), *passes("c", 1.6, 1.6, 1.4), record("e", 1.0)]
    old, new = write(tmp_path / "old", [*quiet, *old]), write(tmp_path / "new", [*quiet, *new])
    assert main(["bench", "--compare", old, new]) == 1
    out = capsys.readouterr().out
    assert "43 cases compared, as torch.nn / fastrnn: 1 regressions" in out
    mean = math.exp((math.log(1.6 / 2) * 2 + math.log(1.91 / 2)) / 43)
    assert f"float32, 1 thread: passes deviate by 2.9% and 1.5%; geometric mean of all cases {mean:.3f}\n" in out
    assert "REGRESSION      2.00 ->     1.60  (0.80)  GRU a training float32, 1 thread" in out
    assert "in the old run only: 1, the first of them GRU gone" in out
    assert main(["bench", "--compare", new, old]) == 0
    assert "improvement" in capsys.readouterr().out


def grid(rng, factor=1.0, deviation=0.02, cases=200, count=3):
    """A run of equal cases whose passes deviate."""
    ratios = ([2 * factor * rng.lognormvariate(0, deviation) for _ in range(count)] for _ in range(cases))
    return condensed([r for k, some in enumerate(ratios) for r in passes(f"c{k}", *some)])


@pytest.mark.parametrize(("old", "new"), [(3, 3), (3, 1), (1, 3), (2, 4)])
def test_runs_of_equal_code_are_equal_and_slower_ones_are_not(old, new):
    rng = random.Random(old * 10 + new)  # so that the few cases in 10,000 do not come by chance
    equal = compare.compare(grid(rng, count=old), grid(rng, count=new))
    assert not equal.regressions
    assert not equal.worse
    slower = compare.compare(grid(rng, count=old), grid(rng, 0.8, count=new))
    assert len(slower.regressions) > 190
    ((group, whole),) = slower.groups.items()
    assert group == ("cpu", 1, "float32")
    assert whole.changed
    assert whole.mean == pytest.approx(0.8, rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"cpu": "Slide rule"}, {"torch": "9"}])
def test_a_ratio_that_torch_nn_alone_has_changed_is_told_as_such(changes, tmp_path, capsys):
    """Which on the same hardware and torch our own time tells; elsewhere it is another anyway."""
    quiet = [r for k in range(40) for r in passes(f"q{k}", 1.0, 1.01, 0.99)]
    many, few = passes("a", 2.0, 2.02, 1.98), passes("a", 1.6, 1.61, 1.59)
    faster = [{**r, "subject": many[0]["subject"]} for r in few]  # torch.nn's
    old = write(tmp_path / "old", [*quiet, *many])
    new = write(tmp_path / "new", [*quiet, *faster], **changes)
    for first, last, word in ((old, new, "REGRESSION"), (new, old, "improvement")):
        code = main(["bench", "--compare", first, last])
        out = capsys.readouterr().out
        assert code == (bool(changes) and word == "REGRESSION")
        assert (f"\n{word}" in out) == bool(changes)
        assert ("torch.nn alone has become " in out) == (not changes)
    assert main(["bench", "--compare", old, write(tmp_path / "slower", [*quiet, *few])]) == 1
    assert main(["bench", "--compare", write(tmp_path / "slower", [*quiet, *few]), old]) == 0
    assert "\nimprovement" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"malloc": "system"}, {"apart": False}])
def test_runs_under_other_conditions_are_not_compared(changes, tmp_path, capsys):
    old, new = write(tmp_path / "old", passes("a", 1.0, 1.1), **changes), write(tmp_path / "new", passes("a", 1.0, 1.1))
    assert main(["bench", "--compare", old, new]) == 2
    ((name, value),) = changes.items()
    assert f"was made with {name} {value}, not " in capsys.readouterr().err


def test_what_is_too_little_for_one_case_shows_in_the_mean_of_all():
    rng = random.Random(5)
    found = compare.compare(grid(rng, deviation=0.07), grid(rng, 0.92, deviation=0.07))
    assert len(found.regressions) < 20
    assert found.worse
    assert "geometric mean of all cases 0.9" in compare.text(found)
    assert ", a REGRESSION" in compare.text(found)


def test_a_run_that_became_noisy_does_not_acquit_itself():
    rng = random.Random(6)
    found = compare.compare(grid(rng), grid(rng, deviation=0.2))
    assert found.worse
    assert "NOISIER" in compare.text(found)
    assert "NOISIER" not in compare.text(compare.compare(grid(rng, deviation=0.2), grid(rng)))
    flaky = [*passes("a", 1.2, 0.9, 1.0), *(r for k in range(9) for r in passes(f"q{k}", 1.0, 0.6, 1.4))]
    steady = [*passes("a", 2.0, 2.02, 1.98), *(r for k in range(9) for r in passes(f"q{k}", 1.0, 1.01, 0.99))]
    named = compare.compare(condensed(steady), condensed(flaky)).regressions
    assert [c.key[1] for c in named] == ["a"]  # by the older run's noise, though its own is six times as large


def test_without_passes_there_is_no_noise_and_no_verdict(tmp_path, capsys):
    old, new = (write(tmp_path / name, [record("a", ratio)]) for name, ratio in (("old", 2.0), ("new", 1.0)))
    assert main(["bench", "--compare", old, new]) == 2
    assert "measure with --passes 3 --budget 0" in capsys.readouterr().err
    known = [r for name in "bcde" for r in passes(name, 1.0, 1.01)]
    both = [write(tmp_path / name, [*known, record("a", ratio, threads=2)]) for name, ratio in (("o", 2.0), ("n", 1.0))]
    assert main(["bench", "--compare", *both]) == 0
    assert "not compared: 1 cases" in capsys.readouterr().out


def test_a_case_that_fails_now_is_named(tmp_path, capsys):
    old = write(tmp_path / "old", [r for name in "abc" for r in passes(name, 2.0, 2.01, 1.99)])
    key = {"case": "b", "cell": "GRU", "mode": "training", "threads": 1}
    failure = {"kind": "failure", "what": "timing", **key, "message": "Mismatch: y: differs"}
    new = write(tmp_path / "new", [*passes("a", 2.0, 2.01, 1.99), failure, *passes("c", 2.0, 2.01, 1.99)])
    assert main(["bench", "--compare", old, new]) == 1
    out = capsys.readouterr().out
    assert "FAILED in the new run: GRU b training float32, 1 thread" in out
    assert "in the old run only" not in out


def test_a_single_pair_of_passes_is_no_noise(tmp_path, capsys):
    old, new = write(tmp_path / "old", passes("a", 2.0, 2.0)), write(tmp_path / "new", [record("a", 1.88)])
    assert main(["bench", "--compare", old, new]) == 2
    assert "measure with --passes 3 --budget 0" in capsys.readouterr().err


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
