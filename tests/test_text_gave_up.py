"""A kernel that gives up in the harness: one line and exit code 2, in every process, and nothing kept of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra [train]")

from gave_up_processes import STEP
from test_text_processes import GLOO, ROOT, in_two_processes
from text_processes import write_data
from text_support import at_step, config, one_thread, quiet

import fastrnn
from fastrnn import cli
from fastrnn.backends import meeting
from fastrnn.text import ClassifyConfig, UserError, sampling, train_classify, train_lm
from fastrnn.text import checkpoint as checkpoints
from fastrnn.text.tasks import classify
from fastrnn.text.tasks.lm import LmTask

__all__ = ["config", "one_thread"]  # fixtures
CPU = torch.device("cpu")
SAID = "error: a persistent CUDA kernel on cpu gave up at a barrier"
needs_gloo = pytest.mark.skipif(not GLOO, reason="torch was built without gloo")


def give_up() -> None:
    """As a kernel and the call after it."""
    meeting.watchdog.flag(CPU).fill_(1)
    meeting.watchdog.check(CPU)


@pytest.mark.parametrize("save_every", [0, 20])
def test_no_checkpoint_holds_what_a_kernel_left_that_gave_up(config, monkeypatch, save_every, tmp_path):
    """The flag goes up in the second epoch: what the first one saved is kept."""
    flag = meeting.watchdog.flag(torch.device("cpu"))
    at_step(monkeypatch, LmTask, 60, lambda: flag.fill_(1))
    last, said = tmp_path / "run" / "last.ckpt", []
    with pytest.raises(UserError, match=rf"kernel on cpu gave up .*; nothing of it was saved: .*--resume {last}$"):
        train_lm(dataclasses.replace(config, save_every=save_every), echo=said.append)
    assert checkpoints.load(last)["global_step"] == (60 if save_every else 50)
    assert sum("epoch" in line for line in said) == 1
    fastrnn.check_device()


def test_a_kernel_that_gives_up_before_the_first_checkpoint(config, monkeypatch, tmp_path):
    flag = meeting.watchdog.flag(torch.device("cpu"))
    at_step(monkeypatch, LmTask, 3, lambda: flag.fill_(1))
    with pytest.raises(UserError, match="nothing of it was saved: start again"):
        train_lm(config, echo=quiet)
    assert not list((tmp_path / "run").glob("*.ckpt"))


def test_a_call_that_raises_within_a_step_ends_the_run_with_its_way_on(config, monkeypatch, tmp_path):
    at_step(monkeypatch, LmTask, 60, give_up)
    last = tmp_path / "run" / "last.ckpt"
    with pytest.raises(UserError, match=rf"kernel on cpu gave up .*; nothing of it was saved: .*--resume {last}$"):
        train_lm(config, echo=quiet)
    assert checkpoints.load(last)["global_step"] == 50
    assert len(train_lm(config, resume=str(last), echo=quiet).history) == config.epochs, "and it goes on"


def test_results_of_a_kernel_that_gave_up_are_not_reported(config, monkeypatch, tmp_path):
    """By what scores the run after training, whether a call raises within or none comes after it."""
    plain = LmTask.finish
    for last in (lambda: meeting.watchdog.flag(CPU).fill_(1), give_up):
        monkeypatch.setattr(LmTask, "finish", lambda *a, last=last: (plain(*a), last()))
        run = dataclasses.replace(config, epochs=1, report=True)
        with pytest.raises(UserError, match=rf"gave up .*score {tmp_path}/run/best.ckpt anew with fastrnn evaluate"):
            train_lm(run, overwrite=True, echo=quiet)
        assert not (tmp_path / "run" / "report.html").exists()
        fastrnn.check_device()


def refuses_to_print(line, owner, name, monkeypatch, capsys, way_on) -> None:
    """The command prints as long as all is well; not where a kernel gave up in what `owner` holds as `name`."""
    assert cli.main(line) == 0
    assert capsys.readouterr().out.strip()
    plain = getattr(owner, name)
    for last in (lambda: meeting.watchdog.flag(CPU).fill_(1), give_up):
        monkeypatch.setattr(owner, name, lambda *a, last=last, **k: (plain(*a, **k), last())[0])
        assert cli.main(line) == 2
        said = capsys.readouterr()
        assert not said.out
        assert SAID in said.err
        assert said.err.endswith(f"{way_on} again, or with --layer torch\n")
        assert said.err.count("\n") == 1
        fastrnn.check_device()


def test_no_score_and_no_text_is_printed_of_a_kernel_that_gave_up(config, monkeypatch, tmp_path, capsys):
    train_lm(dataclasses.replace(config, epochs=1), echo=quiet)
    capsys.readouterr()
    checkpoint = str(tmp_path / "run" / "best.ckpt")
    line = ["evaluate", "--checkpoint", checkpoint]
    refuses_to_print(line, LmTask, "evaluate", monkeypatch, capsys, "there is no score: evaluate")
    line = ["generate", "--checkpoint", checkpoint, "--length", "5"]
    refuses_to_print(line, sampling, "generate", monkeypatch, capsys, "there is no text: generate")


def test_no_prediction_is_printed_of_a_kernel_that_gave_up(monkeypatch, tmp_path, capsys):
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(40)))
    run = ClassifyConfig(data=str(tmp_path / "data.csv"), hidden_size=4, max_steps=2, out=str(tmp_path / "run"))
    train_classify(dataclasses.replace(run, report=False, compare=0, device="cpu"), echo=quiet)
    line = ["predict", "--checkpoint", str(tmp_path / "run" / "best.ckpt"), "--text", "one text"]
    refuses_to_print(line, classify, "predict", monkeypatch, capsys, "there is no prediction: predict")


def train_line(folder) -> list[str]:
    write_data(folder)
    line = f"train lm --data {folder}/text.txt --batch-size 4 --bptt 16 --emb-size 8 --hidden-size 12 --epochs 2"
    line += f" --save-every 20 --device cpu --devices 2 --compare 0 --sample 0 --report false --out {folder}/run"
    return line.split()


def check_what_was_kept(folder) -> None:
    kept = checkpoints.load(folder / "run" / "last.ckpt")
    assert (kept["global_step"], len(kept["fastrnn"]["run"]["history"])) == (50, 1)
    assert STEP > 50


@needs_gloo
def test_a_kernel_of_one_process_ends_both_at_the_next_checkpoint(tmp_path):
    """The second one's, so that the first, which writes, must be told."""
    first, second = in_two_processes(tmp_path, "gave_up_processes.py", "checkpoint", "1", *train_line(tmp_path))
    way_on = f"nothing of it was saved: continue with --resume {tmp_path}/run/last.ckpt\n"
    assert first[0] == second[0] == 2, first[1] + second[1]
    assert f"error: a kernel of another process gave up; {way_on}" in first[1]
    assert SAID in second[1]
    assert way_on in second[1]
    assert "Traceback" not in first[1] + second[1]
    check_what_was_kept(tmp_path)


@needs_gloo
def test_a_call_that_raises_in_one_process_ends_it_and_the_other_fails(tmp_path):
    """By gloo the first one is told that the connection is closed, before a launcher ends it."""
    first, second = in_two_processes(tmp_path, "gave_up_processes.py", "call", "1", *train_line(tmp_path))
    assert second[0] == 2, second[1]
    assert SAID in second[1]
    assert "Traceback" not in second[1]
    assert first[0] != 0
    check_what_was_kept(tmp_path)


@needs_gloo
def test_processes_that_lightning_started_are_ended(tmp_path):
    """The second waits for ever; its output, which is the first one's, too, is open as long as it is there."""
    command = [sys.executable, str(ROOT / "tests" / "gave_up_processes.py"), "stuck", "0", *train_line(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output = process.communicate(timeout=280)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 2, output
    assert SAID in output
    assert "Traceback" not in output
    check_what_was_kept(tmp_path)
