"""The benchmark suite's arithmetic: timing by a clock that is told the time, targets, tables."""

import itertools

import pytest
import torch

from fastrnn.bench import measure, report, targets


class FakeClock:
    """A clock that advances only when a call says so."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def task(self, name, *durations):
        """A call that takes each of `durations` in turn, over and over."""
        turns = itertools.cycle(durations)

        def call():
            self.log.append(name)
            self.now += next(turns)

        return call


# The timing core


def test_ratio_is_that_of_the_durations():
    clock = FakeClock()
    result = measure.compare(clock.task("a", 3.0), clock.task("b", 1.5), budget=100.0, clock=clock)
    assert result["ratio"] == pytest.approx({"p20": 2.0, "p50": 2.0, "p80": 2.0})
    assert (result["baseline"]["p50"], result["subject"]["p50"]) == (3.0, 1.5)


def test_samples_are_interleaved_after_a_warm_up():
    clock = FakeClock()
    measure.interleave([clock.task("a", 1.0), clock.task("b", 1.0)], 0.0, min_rounds=3, clock=clock)
    assert "".join(clock.log) == "ab" + "ababab"


def test_a_drift_of_the_machine_leaves_the_ratio():
    clock = FakeClock()
    slower = [1.0 + 0.1 * i for i in range(40)]
    a = clock.task("a", *(2 * s for s in slower))
    b = clock.task("b", *slower)
    result = measure.compare(a, b, budget=0.0, min_rounds=20, clock=clock)
    assert result["baseline"]["p80"] > 1.5 * result["baseline"]["p20"]
    assert result["ratio"] == pytest.approx({"p20": 2.0, "p50": 2.0, "p80": 2.0})


def test_short_calls_are_repeated_and_counted_once_each():
    clock = FakeClock()
    (samples,) = measure.interleave([clock.task("a", 1e-5)], budget=0.01, sample_seconds=1e-3, clock=clock)
    assert samples == pytest.approx([1e-5] * len(samples))
    assert 10 <= len(samples) <= 11


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 5), (100.0, 50), (101.0, 51)])
def test_rounds_fill_the_budget_and_are_never_too_few(budget, rounds):
    clock = FakeClock()
    times = measure.interleave([clock.task("a", 1.0), clock.task("b", 1.0)], budget, min_rounds=5, clock=clock)
    assert [len(t) for t in times] == [rounds, rounds]


def test_single_steps_come_in_blocks_and_the_cold_ones_do_not_count():
    """100 a side in two turns each, after a warm-up of one; the first two of each turn took longer."""
    clock = FakeClock()
    a, b = clock.task("a", 1.0, *[9.0, 9.0, *[1.0] * 50] * 2), clock.task("b", 2.0)
    times = measure.blocks([a, b], 0.0, size=50, cold=2, least=100, clock=clock)
    assert times == [[1.0] * 100, [2.0] * 100]
    assert "".join(clock.log) == "ab" + ("a" * 52 + "b" * 52) * 2
    times = measure.blocks([clock.task("a", 1.0), clock.task("b", 1.0)], 401.0, size=50, cold=0, least=1, clock=clock)
    assert [len(t) for t in times] == [250, 250]


def test_quantiles_and_geometric_mean():
    assert measure.summary([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == {"p20": 2.0, "p50": 3.5, "p80": 5.0}
    assert measure.quantile([7.0], 0.8) == 7.0
    assert measure.geomean([0.5, 8.0]) == pytest.approx(2.0)


def test_gemm_rate_is_two_operations_a_product_over_the_median_time(monkeypatch):
    def timed(calls, budget, min_rounds):
        for call in calls:
            call()
        return [[0.5, 0.25, 8.0]]

    monkeypatch.setattr(measure, "interleave", timed)
    assert measure.gemm_rate(torch.float32, size=64, repeats=3) == 2 * 64**3 / 0.5


# Targets and tables


def record(case, cell, mode, ratio, threads=1):
    times = {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    key = {"kind": "measurement", "case": case, "cell": cell, "mode": mode, "threads": threads}
    ratios = {"p20": ratio, "p50": ratio, "p80": ratio}
    return {
        **key,
        "rounds": 5,
        "baseline": times,
        "subject": times,
        "ratio": ratios,
        "gemm": None,
        "chosen": "cpu",
        "flops": 1.0,
    }


def target(text):
    (found,) = [t for t in targets.TARGETS if t.text == text]
    return found


def test_each_takes_the_least_and_names_it():
    each = target("GRU T=100 B=1 training, each")
    records = [record(f"T100-B1-H{H}", "GRU", "training", r) for H, r in ((128, 5.0), (256, 3.9), (512, 9.0))]
    verdict = targets.judge(each, records, 1)
    assert (verdict.value, verdict.status, verdict.where) == (3.9, "MISSED", "T100-B1-H256 GRU training")
    records[1]["ratio"]["p50"] = 4.0
    assert targets.judge(each, records, 1).status == "met"
    assert targets.judge(each, records[:2], 1).status == "met so far on 2 of 3"
    assert targets.judge(each, records, 2).status == "not measured"


def test_mean_target_and_noise():
    mean = target("GRU B>=16 inference, geometric mean")
    names = [case for case, _, _ in mean.group()]
    assert len(names) == 8
    ratios = [1.0, 4.0] * 4
    records = [record(name, "GRU", "inference", r) for name, r in zip(names, ratios, strict=True)]
    assert targets.judge(mean, records, 1).value == pytest.approx(2.0)
    every = target("every cell, shape and mode")
    assert targets.judge(every, [record("T1-B1-H128", "RNN", "training", 0.96)], 1).status.startswith(
        "met within noise"
    )
    assert targets.judge(every, [record("T1-B1-H128", "RNN", "training", 0.94)], 1).status.startswith("MISSED")


@pytest.mark.parametrize("goal", targets.TARGETS, ids=lambda t: t.text)
def test_every_target_is_about_cases_that_exist(goal):
    assert goal.group()


def test_report_lists_every_loss_and_marks_noise():
    noisy = record("T1-B1-H128", "GRU", "training", 0.9, threads=2)
    noisy["ratio"] = {"p20": 0.5, "p50": 0.9, "p80": 1.2}
    records = [record("T1-B1-H128", "LSTM", "inference", 4.2), noisy]
    assert report.time_line(noisy).endswith(" ~<")
    assert "0.90  GRU T1-B1-H128 training, 2 threads" in report.losing_list(records)
    assert "1 of 2 measurements" in report.losing_list(records)
    assert "4.20  met" in report.target_table(records)


@pytest.mark.parametrize(("subject", "verdict"), [(90, "met"), (100.9, "met"), (120, "MISSED")])
def test_memory_may_not_grow(subject, verdict):
    key = {"kind": "memory", "case": "T1-B1-H128", "cell": "GRU", "mode": "training", "threads": 1}
    records = [{**key, "baseline": 100 << 20, "subject": int(subject * 2**20)}]
    assert f"  {verdict}  (most: T1-B1-H128 GRU)" in report.target_table(records)


def test_markdown_has_inference_and_training_side_by_side():
    records = [record("T1-B1-H128", "LSTM", mode, r) for mode, r in (("inference", 2.5), ("training", 1.25))]
    lines = report.markdown(records).splitlines()
    assert lines[0].split(" | ")[1] == "LSTM, 1 thread"
    assert lines[2].split(" | ") == ["| T1-B1-H128", "2.50 / 1.25", "- / -", "- / - |"]
