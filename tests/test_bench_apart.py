"""Measurements in a process of their own."""

import os
import subprocess
import sys

import pytest
import torch
from bench_support import STEP, job, options

import fastrnn
from fastrnn.bench import apart, commands, energy, environment, measuring
from fastrnn.bench.environment import PACKAGE
from fastrnn.bench.run import measure
from fastrnn.cli.parser import UsageError


def test_it_is_another_process_each_time_and_gives_the_answer():
    seen = {apart.call(os.getpid) for _ in range(3)}
    assert len(seen) == 3
    assert os.getpid() not in seen
    assert apart.call(divmod, 17, 5) == (3, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no server")
def test_elsewhere_the_process_is_started_anew(monkeypatch):
    """By this process, not by the server that has imported."""
    assert apart.call(os.getppid) != os.getpid()
    monkeypatch.setattr(apart.sys, "platform", "darwin")
    assert apart.call(os.getppid) == os.getpid()


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


SCRIPT = """import os
from fastrnn.bench import apart
print("ran", apart.call(os.getpid) != os.getpid())
"""


def test_a_script_is_not_run_again(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    path = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    ran = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, env=path)
    assert (ran.stdout, ran.stderr) == ("ran True\n", "")


def test_another_fastrnn_is_refused():
    with pytest.raises(apart.Apart, match=r"the measuring process found .*, not elsewhere: start in another folder"):
        apart.call(measuring._there, job(STEP), measuring.Options(None), "fastrnn", "elsewhere", False)


def test_counters_are_opened_there():
    """What reads them cannot be sent. Where there are none, the other process says so."""
    meter = energy.Meter(lambda: [0.0], [1.0])
    record = measure(job(STEP), options(fastrnn, apart=True, meter=meter), lambda _: None)
    assert "joules" in record or record["message"].startswith("Unmetered: ")


@pytest.mark.parametrize("malloc", ["keep", "system"])
def test_the_command_measures_apart(tmp_path, malloc):
    """And a file made so is not continued otherwise."""
    line = ["--cases", "T1-B1-H128", "--cells", "GRU", "--modes", "inference", "--sample", "0", "--rounds", "2"]
    line += ["--threads", "1", "--parts", "timing", "--passes", "2", "--malloc", malloc]
    assert commands.bench([*line, "--save", "--out", str(tmp_path)]) == 0
    (saved,) = tmp_path.glob("*/cpu-*.jsonl")
    head, *found = environment.lines(saved)
    assert head["apart"]
    assert "each measurement in a process of its own" in saved.with_suffix(".txt").read_text()
    assert [r["pass"] for r in found if r["kind"] == "measurement"] == [0, 1]
    with pytest.raises(UsageError, match="made on apart True, this is False"):
        commands.bench([*line, "--no-apart", "--resume", str(saved)])


def test_a_failure_there_is_a_record_here():
    lines = []
    record = measure(job(STEP, cell="nonsense"), options(fastrnn, apart=True), lines.append)
    assert (record["kind"], record["what"]) == ("failure", "timing")
    assert record["message"] == "AttributeError: module 'torch.nn' has no attribute 'nonsense'"
    assert len(lines) == 1
