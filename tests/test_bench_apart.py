"""Measurements in a process of their own."""

import os

import pytest
import torch
from bench_support import STEP, job, options

import fastrnn
from fastrnn.bench import apart, measuring
from fastrnn.bench.run import measure


def test_it_is_another_process_each_time_and_gives_the_answer():
    seen = {apart.call(os.getpid) for _ in range(3)}
    assert len(seen) == 3
    assert os.getpid() not in seen
    assert apart.call(divmod, 17, 5) == (3, 2)


def test_errors_come_over_by_type_and_message_and_an_end_without_answer_is_one():
    with pytest.raises(apart.Apart, match="ZeroDivisionError: "):
        apart.call(divmod, 1, 0)
    with pytest.raises(apart.Apart, match="ended with exit code 3, without an answer"):
        apart.call(os._exit, 3)


@pytest.mark.parametrize("what", ["timing", "latency"])
def test_a_record_from_there_is_like_one_from_here(what):
    """But for the times; the bound is from here."""
    made = job(STEP, cell="LSTM", what=what)
    before = torch.get_num_threads()
    there = measuring.measure(made, options(fastrnn, apart=True))
    here = measuring.measure(made, options(fastrnn))
    assert there.keys() == here.keys()
    assert {k: there[k] for k in made.key()} == {k: here[k] for k in made.key()}
    assert torch.get_num_threads() == before
    if what == "timing":
        assert there["bound"]["rates"] == here["bound"]["rates"]
        assert there["bound"]["share"]["subject"] == there["bound"]["seconds"] / there["subject"]["p50"]
    assert there["subject"]["p50"] > 0


def test_a_failure_there_is_a_record_here():
    lines = []
    record = measure(job(STEP, cell="nonsense"), options(fastrnn, apart=True), lines.append)
    assert (record["kind"], record["what"]) == ("failure", "timing")
    assert record["message"].startswith("Apart: ")
    assert len(lines) == 1
