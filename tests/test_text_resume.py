"""A run that was stopped, killed or cut short goes on as if it had never stopped, bit for bit."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra [train]")

from text_processes import STOP_AT, configs, write_data
from text_support import TEXT, assert_identical, at_step, config, final_state, one_thread, quiet

from fastrnn.text import Interrupted, LmConfig, UserError, train_lm
from fastrnn.text import checkpoint as checkpoints
from fastrnn.text.tasks.lm import LmTask

__all__ = ["config", "one_thread"]  # fixtures


ROOT = Path(__file__).parent.parent
STEPS = 50  # an epoch of `config`; test_resume_equals_uninterrupted checks it


@pytest.mark.parametrize(
    ("step", "signum"),
    [(20, signal.SIGTERM), *[(s, signal.SIGINT) for s in (0, 20, STEPS - 1, STEPS, STEPS + 30, 2 * STEPS - 2)]],
)
def test_resume_equals_uninterrupted(config, tmp_path, monkeypatch, step, signum):
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    train_lm(whole, echo=quiet)
    expected = final_state(tmp_path / "whole")
    assert expected["step"] == 2 * STEPS
    handler = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in a shell's background
    at_step(monkeypatch, LmTask, step, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(Interrupted, match="continue with --resume") as stopped:
        train_lm(config, echo=quiet)
    assert stopped.value.signum == signum
    assert checkpoints.load(tmp_path / "run" / "last.ckpt")["global_step"] == step + 1
    train_lm(LmConfig(), resume=str(tmp_path / "run"), echo=quiet)
    assert_identical(final_state(tmp_path / "run"), expected)
    assert signal.getsignal(signal.SIGINT) is handler


def test_resume_after_a_crash_goes_on_from_the_last_saved_step(config, tmp_path, monkeypatch):
    train_lm(dataclasses.replace(config, out=str(tmp_path / "whole")), echo=quiet)

    def crash():
        raise RuntimeError("power cut")

    at_step(monkeypatch, LmTask, STEPS + 17, crash)
    config = dataclasses.replace(config, save_every=10)
    with pytest.raises(RuntimeError, match="power cut"):
        train_lm(config, echo=quiet)
    assert checkpoints.load(tmp_path / "run" / "last.ckpt")["global_step"] == (STEPS + 17) // 10 * 10
    train_lm(config, resume="auto", given={"out": config.out}, echo=quiet)
    assert_identical(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["lm", "classify", "translate"])
def test_resume_after_sigkill(tmp_path, name):
    """The process ends within a step, with no chance to save or clean up."""
    write_data(tmp_path)
    config, train = configs(tmp_path, devices=1, dropout=0.2, save_every=4, out=str(tmp_path / "run"))[name]
    train(dataclasses.replace(config, out=str(tmp_path / "whole")), echo=quiet)
    code = f"""
import os, signal, torch
from fastrnn.text import {type(config).__name__}, {train.__name__}
from fastrnn.text.tasks import find_task
torch.set_num_threads(1)
kind = find_task({name!r})
plain = kind.training_step
def training_step(self, batch, batch_idx):
    if self.trainer.global_step == {STOP_AT[name]}:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, batch, batch_idx)
kind.training_step = training_step
{train.__name__}({config!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    saved = checkpoints.load(tmp_path / "run" / "last.ckpt")["global_step"]
    assert saved == STOP_AT[name] // 4 * 4, "the step before was saved within the epoch"
    train(config, resume=config.out, echo=quiet)
    assert_identical(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))


@pytest.mark.parametrize("rule", ["constant", "plateau"])
def test_a_finished_run_can_be_lengthened(config, tmp_path, rule):
    config = dataclasses.replace(config, schedule=rule, lr=0.2, optimizer="sgd")
    train_lm(dataclasses.replace(config, out=str(tmp_path / "whole"), epochs=4), echo=quiet)
    train_lm(config, echo=quiet)
    train_lm(config, resume=config.out, given={"epochs": 4}, echo=quiet)
    assert_identical(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))


@pytest.mark.parametrize("limit", [30, STEPS, STEPS + 30])
def test_max_steps_ends_with_a_validation_and_the_run_can_be_lengthened(config, tmp_path, limit):
    config = dataclasses.replace(config, schedule="constant")
    train_lm(dataclasses.replace(config, out=str(tmp_path / "whole")), echo=quiet)
    short = train_lm(dataclasses.replace(config, max_steps=limit), echo=quiet)
    assert short.history[-1]["step"] == limit
    assert len(short.history) == math.ceil(limit / STEPS)
    again = train_lm(config, resume=config.out, echo=quiet)
    assert checkpoints.load(tmp_path / "run" / "last.ckpt")["global_step"] == limit, "the limit holds when resumed"
    assert again.valid.loss == short.valid.loss
    train_lm(config, resume=config.out, given={"max_steps": -1}, echo=quiet)
    assert_identical(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))


def test_resume_refuses_another_text(config, tmp_path):
    train_lm(dataclasses.replace(config, epochs=1), echo=quiet)
    (tmp_path / "text.txt").write_text(TEXT.replace("fox", "cat"))
    with pytest.raises(UserError, match="the training data is not what"):
        train_lm(config, resume=config.out, echo=quiet)


def test_a_run_goes_on_in_another_folder_but_not_over_another_run(config, tmp_path):
    train_lm(dataclasses.replace(config, epochs=1), echo=quiet)
    train_lm(dataclasses.replace(config, epochs=1, out=str(tmp_path / "other")), echo=quiet)
    before = (tmp_path / "other" / "last.ckpt").read_bytes()
    with pytest.raises(UserError, match="other holds a run already"):
        train_lm(config, resume=config.out, given={"epochs": 2, "out": str(tmp_path / "other")}, echo=quiet)
    assert (tmp_path / "other" / "last.ckpt").read_bytes() == before
    train_lm(config, resume=config.out, given={"epochs": 2, "out": str(tmp_path / "third")}, echo=quiet)
    assert checkpoints.load(tmp_path / "third" / "last.ckpt")["global_step"] == 2 * STEPS
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "other").rename(tmp_path / "run")  # where the run to go on with began
    train_lm(LmConfig(), resume=str(tmp_path / "moved"), given={"epochs": 2}, echo=quiet)
    assert checkpoints.load(tmp_path / "moved" / "last.ckpt")["global_step"] == 2 * STEPS
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before


def test_the_same_seed_gives_the_same_run_and_another_does_not(config, tmp_path):
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / name
        train_lm(dataclasses.replace(config, seed=seed, epochs=1, out=str(out)), echo=quiet)
        runs[name] = final_state(out)
    assert_identical(runs["a"], runs["b"])
    assert runs["a"]["history"] != runs["c"]["history"]


def test_resume_refuses_other_options_and_missing_runs(config, tmp_path):
    train_lm(dataclasses.replace(config, epochs=1), echo=quiet)
    with pytest.raises(UserError, match="--hidden-size 99 differs from the 12"):
        train_lm(config, resume=config.out, given={"hidden_size": 99}, echo=quiet)
    with pytest.raises(UserError, match="no checkpoint there"):
        train_lm(config, resume=str(tmp_path / "nowhere"), echo=quiet)
    with pytest.raises(UserError, match="holds a run already"):
        train_lm(config, echo=quiet)
    with pytest.raises(UserError, match="--resume needs the run"):
        train_lm(dataclasses.replace(config, out=None), resume="auto", echo=quiet)


def test_a_disk_full_amid_a_checkpoint(tmp_path):
    """torch.save then raises a RuntimeError of its own about the archive's end."""
    resource = pytest.importorskip("resource")
    checkpoints.save({"x": torch.zeros(3)}, tmp_path / "a.ckpt")
    before = (tmp_path / "a.ckpt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoints.save({"x": torch.zeros(1 << 20)}, tmp_path / "a.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a.ckpt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("name", ["lm", "classify", "translate"])
def test_a_full_disk_keeps_the_old_checkpoint_and_the_run_goes_on_later(tmp_path, monkeypatch, name):
    write_data(tmp_path)
    config, train = configs(tmp_path, devices=1, dropout=0.2, out=str(tmp_path / "run"))[name]
    train(dataclasses.replace(config, out=str(tmp_path / "whole")), echo=quiet)
    train(dataclasses.replace(config, epochs=1), echo=quiet)
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.ckpt")}
    assert len(before) == 2

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"last\.ckpt: cannot be written: .*No space left.*what was there is kept"):
            train(config, resume=config.out, given={"epochs": 2}, echo=quiet)
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("*.ckpt")} == before
    assert not list((tmp_path / "run").glob(".*"))
    train(config, resume=config.out, given={"epochs": 2}, echo=quiet)
    assert_identical(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))
