"""What every training task shares: optimisers, averaging, accumulation, stopping early, figures, the report."""

from __future__ import annotations

import dataclasses
import os
import pkgutil
import re
import signal
import sys

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra [train]")

from text_support import assert_identical, at_step, config, final_state, one_thread, quiet

import fastrnn
from fastrnn.text import Interrupted, LmConfig, TranslateConfig, UserError, train_lm, train_translate
from fastrnn.text import checkpoint as checkpoints
from fastrnn.text.data import segment
from fastrnn.text.optim import averaged, averaging, make_optimizer, nonmonotonic, stale_epochs, start_averaging
from fastrnn.text.plots import read_metrics
from fastrnn.text.report import table
from fastrnn.text.tasks.lm import LmTask

__all__ = ["config", "one_thread"]  # fixtures


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "asgd"])
def test_every_optimizer_takes_its_options_and_learns(config, optimizer):
    sgd = optimizer in ("sgd", "asgd")
    config = dataclasses.replace(config, optimizer=optimizer, lr=0.5 if sgd else 0.01, momentum=0.5, beta2=0.9)
    made = make_optimizer(config, [{"params": [torch.nn.Parameter(torch.ones(3))]}])
    assert type(made).__name__.lower() == optimizer
    group = made.param_groups[0]
    assert group.get("momentum", 0.5) == 0.5
    assert group.get("betas", (0.9, 0.9)) == (0.9, 0.9)
    history = train_lm(dataclasses.replace(config, epochs=2), echo=quiet).history
    assert history[1]["valid_loss"] < history[0]["valid_loss"]


def test_averages_are_those_of_the_weights_since_the_trigger():
    weight = torch.nn.Parameter(torch.randn(7, dtype=torch.float64))
    optimizer = make_optimizer(LmConfig(optimizer="asgd", lr=0.3), [{"params": [weight]}])
    seen = []
    for step in range(9):
        if step == 4:
            assert not averaging(optimizer)
            start_averaging(optimizer)
        weight.grad = torch.randn(7, dtype=torch.float64)
        before = weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(weight.detach(), before - 0.3 * weight.grad, rtol=0, atol=1e-6)
        seen.append(weight.detach().clone())
    last = weight.detach().clone()
    with averaged(optimizer):
        torch.testing.assert_close(weight.detach(), torch.stack(seen[4:]).mean(0), rtol=0, atol=1e-6)
    assert torch.equal(weight, last)


def test_asgd_takes_the_rate_of_its_own_step():
    weight = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = make_optimizer(LmConfig(optimizer="asgd", lr=0.3), [{"params": [weight]}])
    for lr in (0.1, 0.7, 0.2):
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = torch.randn(5, dtype=torch.float64)
        expected = weight.detach() - lr * weight.grad
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-6)


def test_the_trigger_of_averaging_and_stale_epochs():
    assert not nonmonotonic([5, 4, 3, 2, 1], 2)
    assert nonmonotonic([5, 3, 4, 4, 3.5], 2)
    assert not nonmonotonic([5, 3, 4, 4], 2), "3 is among the 2 before the last"
    assert not nonmonotonic([5, 3, 4, 4, 2.9], 2)
    assert not nonmonotonic([5, 6, 7], 2), "needs more than n epochs before the last"
    assert nonmonotonic([5, 6, 7, 8], 2)
    assert not nonmonotonic([5], 2)
    assert [stale_epochs(losses) for losses in ([], [3], [3, 2], [2, 3, 4], [2, 2])] == [0, 0, 0, 2, 1]


def test_asgd_scores_and_saves_its_averages(config, tmp_path, monkeypatch):
    """The weights of best.ckpt are the averages that were validated; last.ckpt goes on from the weights themselves."""
    monkeypatch.setattr("fastrnn.text.task.nonmonotonic", lambda losses, n: len(losses) == 1)
    config = dataclasses.replace(config, optimizer="asgd", lr=2.0, epochs=3, dropout=0.0, schedule="constant")
    result = train_lm(config, echo=quiet)
    assert result.valid.loss == pytest.approx(min(row["valid_loss"] for row in result.history), abs=1e-5)
    last = checkpoints.load(tmp_path / "run" / "last.ckpt")
    best = checkpoints.load(tmp_path / "run" / "best.ckpt")
    assert last["global_step"] == best["global_step"], "averages improve"
    averages = [s["ax"] for s in last["optimizer_states"][0]["state"].values()]
    for ax, (name, weight) in zip(averages, best["state_dict"].items(), strict=True):
        assert torch.equal(ax, weight), name
        assert not torch.equal(ax, last["state_dict"][name]), name


def test_accumulation_equals_the_gradient_of_both_batches(config, monkeypatch):
    """Two windows of one step: the mean of their gradients, as the plain loop over torch computes it."""
    config = dataclasses.replace(config, accumulate=2, dropout=0.0, optimizer="sgd", lr=0.1, clip=0.0, epochs=1)
    config = dataclasses.replace(config, schedule="constant", max_steps=3)
    result = train_lm(config, echo=quiet)
    torch.manual_seed(config.seed)
    data = LmTask.load(config, None)
    model = LmTask(config, data).model
    optimizer, state = torch.optim.SGD(model.parameters(), 0.1), None
    for i, (tokens, targets) in zip(range(6), data.train, strict=False):
        logits, state = model(tokens, state)
        state = tuple(s.detach() for s in state)
        (torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(model.named_parameters(), result.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


def test_a_signal_between_accumulated_batches_waits_for_the_step(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, accumulate=3)  # 50 batches, 17 steps an epoch, the last of two batches
    train_lm(dataclasses.replace(config, out=str(tmp_path / "whole")), echo=quiet)
    assert final_state(tmp_path / "whole")["step"] == 34
    at_step(monkeypatch, LmTask, 20, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        train_lm(config, echo=quiet)
    assert checkpoints.load(tmp_path / "run" / "last.ckpt")["global_step"] == 21
    train_lm(config, resume=config.out, echo=quiet)
    assert_identical(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))


def test_patience_stops_and_holds_when_resumed(config):
    lines = []
    config = dataclasses.replace(config, epochs=9, patience=2, lr=1e-9)
    config = dataclasses.replace(config, optimizer="sgd", schedule="constant", dropout=0.9)
    original = LmTask.scores
    try:
        LmTask.scores = lambda self, sums: {**original(self, sums), "valid_loss": 1.0 + self.trainer.current_epoch}
        train_lm(config, echo=lines.append)
        assert sum(line.startswith("epoch") for line in lines) == 3
        assert any("--patience" in line for line in lines)
        train_lm(config, resume=config.out, echo=(more := []).append)
        assert not any(line.startswith("epoch") for line in more)
        train_lm(config, resume=config.out, given={"patience": 3}, echo=(more := []).append)
        assert sum(line.startswith("epoch") for line in more) == 1
    finally:
        LmTask.scores = original


def test_bf16_is_autocast_and_fp16_needs_cuda(config, monkeypatch):
    seen = []
    plain = LmTask.training_step

    def training_step(self, batch, batch_idx):
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(LmTask, "training_step", training_step)
    config = dataclasses.replace(config, precision="bf16", epochs=1, max_steps=20, lr=0.02)
    result = train_lm(config, echo=quiet)
    assert set(seen) == {torch.bfloat16}
    assert result.valid.ppl < 42  # of 42 characters
    assert all(p.dtype == torch.float32 for p in result.model.parameters())
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--precision fp16 trains on CUDA devices only"):
            train_lm(dataclasses.replace(config, precision="fp16"), echo=quiet, overwrite=True)


def test_figures_report_and_curves(config, tmp_path):
    lines = []
    config = dataclasses.replace(config, report=True, log_every=5, clip=0.1, sample=20)
    result = train_lm(config, echo=lines.append)
    rows = read_metrics(result.folder)
    norms = [row["grad_norm"] for row in rows if "grad_norm" in row]
    assert len(norms) == 20
    assert max(norms) > 0.1, "the norm is that before clipping"
    assert all(row["tokens_per_s"] > 0 for row in rows if "tokens_per_s" in row)
    assert (result.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (result.folder / "report.html").read_text()
    assert lines[-1] == f"report: {result.folder / 'report.html'}"
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|<script|@import|url\(", page), "outside resources"
    assert page.count('src="data:image/png;base64,') == 1
    for text in ("valid_ppl", "hidden_size", torch.__version__, "epoch 2/2"):
        assert text in page


def test_metrics_of_a_resumed_run_follow_one_another(config):
    train_lm(dataclasses.replace(config, log_every=1, max_steps=60), echo=quiet)
    train_lm(config, resume=config.out, given={"max_steps": -1}, echo=quiet)
    steps = [row["step"] for row in read_metrics(config_folder(config)) if "train_loss" in row]
    assert steps == sorted(set(steps))
    assert steps[-1] == 99


def test_overwriting_leaves_nothing_of_the_run_before(config, tmp_path):
    """Its figures would be in the curves, its pictures in the report, its best.ckpt there if the new one is killed."""
    folder = tmp_path / "run"
    train_lm(dataclasses.replace(config, log_every=1, epochs=1, report=True, sample=5), echo=quiet)
    for name in ("confusion-matrix.png", "attention-1.png", "notes.txt"):
        (folder / name).write_bytes((folder / "curves.png").read_bytes())
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="holds a run already"):
        train_lm(config, echo=quiet)
    with pytest.raises(UserError, match="must lie below the 42 tokens"):  # known when the network is made
        train_lm(dataclasses.replace(config, cutoffs=[42], hidden_size=16), overwrite=True, echo=quiet)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    train_lm(dataclasses.replace(config, log_every=10, epochs=1, sample=0), overwrite=True, echo=quiet)
    assert [row["step"] for row in read_metrics(folder) if "train_loss" in row] == [9, 19, 29, 39, 49]
    found = {p.name for p in folder.iterdir()}
    assert found == {"best.ckpt", "last.ckpt", "config.yaml", "metrics", "notes.txt"}


def test_a_run_that_cannot_begin_takes_no_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="must lie below the 42 tokens"):
        train_lm(dataclasses.replace(config, out=None, cutoffs=[42], hidden_size=16), echo=quiet)
    assert not (tmp_path / "runs").exists()


def config_folder(config):
    from pathlib import Path

    return Path(config.out)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, optimizer="sgd", schedule="constant")
    train_lm(dataclasses.replace(config, epochs=1), echo=quiet)
    before = {p: p.read_bytes() for p in (tmp_path / "run").glob("*.ckpt")}

    def diverge(self, batch, group):
        self.model.output.bias.data.fill_(torch.nan)
        return 1.0

    monkeypatch.setattr(LmTask, "lr_factor", diverge)
    with pytest.raises(UserError, match="training loss is nan in epoch 2, step 50: try a lower --lr or --clip"):
        train_lm(config, resume=config.out, given={"epochs": 2}, echo=quiet)
    assert {p: p.read_bytes() for p in (tmp_path / "run").glob("*.ckpt")} == before


def test_text_in_the_report_is_escaped():
    assert "<td>&lt;unk&gt; &amp;</td>" in table(["token"], [["<unk> &"]])


@pytest.mark.parametrize(
    ("package", "train", "changed", "message"),
    [
        ("tensorboard", train_lm, {"tensorboard": True}, r"--tensorboard needs tensorboard: .*fastrnn\[tensorboard\]"),
        ("matplotlib", train_lm, {"report": True}, r"pictures need matplotlib: .*fastrnn\[train\].*--report false"),
        ("sacrebleu", train_translate, None, r"BLEU needs sacrebleu: .*fastrnn\[train\]"),
        ("jieba", train_lm, {"level": "word", "words": "jieba"}, r"fastrnn\[zh\]"),
    ],
)
def test_a_missing_package_is_told_before_training(config, tmp_path, monkeypatch, package, train, changed, message):
    config = TranslateConfig(report=False) if changed is None else dataclasses.replace(config, **changed)
    monkeypatch.setitem(sys.modules, package, None)
    segment.jieba.cache_clear()  # another test may have had it
    with pytest.raises(UserError, match=message):
        train(config, echo=pytest.fail)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_what_the_metrics_file_gets(config):
    pytest.importorskip("tensorboard", reason="needs the extra [tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train_lm(dataclasses.replace(config, tensorboard=True, log_every=10, epochs=1), echo=quiet)
    (version,) = (result.folder / "tensorboard").iterdir()
    events = EventAccumulator(str(version)).Reload()
    rows = read_metrics(result.folder)
    for name in ("train_loss", "grad_norm", "lr", "tokens_per_s", "valid_loss", "valid_ppl"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(row["step"], row[name]) for row in rows if name in row]
        assert expected, name
        assert [step for step, _ in logged] == [step for step, _ in expected], name
        assert [value for _, value in logged] == pytest.approx([value for _, value in expected], rel=1e-5), name


def test_choices_are_checked_in_python_too():
    with pytest.raises(UserError, match="--optimizer must be one of sgd, adam, adamw, asgd, got lion"):
        LmConfig(optimizer="lion")
    with pytest.raises(UserError, match="--batch-size 16 must be a multiple of the 3 processes"):
        LmConfig(devices=3)


def test_no_name_of_the_package_is_a_module_of_it():
    """Which would take the function's place once somebody has imported it."""
    assert not set(fastrnn.text.__all__) & {module.name for module in pkgutil.iter_modules(fastrnn.text.__path__)}
