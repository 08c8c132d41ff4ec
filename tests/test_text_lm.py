"""The language model: carried state, learning, exact resuming, checkpoints, sampling."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import zipfile

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra [train]")

from fastrnn.text import (
    Interrupted,
    LanguageModel,
    LmConfig,
    UserError,
    Vocabulary,
    evaluate_stream,
    generate,
    load_model,
    train_lm,
    unigram_perplexity,
)
from fastrnn.text import checkpoint as checkpoints
from fastrnn.text.models.lm import detach
from fastrnn.text.tasks.lm import LmTask
from fastrnn.text.training import schedule

TEXT = "".join(f"{i}: the quick brown fox jumps over the lazy dog, {i * 7 % 13} times.\n" for i in range(60))
SMALL = {
    "hidden_size": 12,
    "emb_size": 8,
    "batch_size": 4,
    "bptt": 16,
    "device": "cpu",
    "progress": False,
    "compare": 0,
    "sample": 0,
}


@pytest.fixture(autouse=True)
def _one_thread():
    """These models are too small to share: a second thread only waits, and dearly on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(tmp_path):
    """A run of two epochs of 50 steps, under a second, with dropout, whose masks resuming must continue."""
    (tmp_path / "text.txt").write_text(TEXT)
    return LmConfig(**SMALL, data=str(tmp_path / "text.txt"), out=str(tmp_path / "run"), epochs=2, dropout=0.2)


def quiet(line: str) -> None:
    pass


@pytest.mark.parametrize("layer", ["fastrnn", "torch"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_carried_state_equals_one_long_pass(cell, layer):
    model = LanguageModel(LmConfig(cell=cell, layer=layer, hidden_size=9, emb_size=5, layers=2), 11).double().eval()
    tokens = torch.randint(11, (23, 3))
    whole, _ = model(tokens)
    state, parts = None, []
    for window in tokens.split(7):
        logits, state = model(window, state)
        state = detach(state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)


def test_layers_of_both_libraries_give_the_same_model():
    torch.manual_seed(0)
    ours = LanguageModel(LmConfig(layer="fastrnn"), 20).eval()
    torch.manual_seed(0)
    theirs = LanguageModel(LmConfig(layer="torch"), 20).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    tokens = torch.randint(20, (9, 2))
    torch.testing.assert_close(ours(tokens)[0], theirs(tokens)[0], rtol=0, atol=1e-5)


def test_tied_weights_are_one_parameter_and_small_enough():
    model = LanguageModel(LmConfig(tied=True, emb_size=16, hidden_size=16), 50)
    assert model.output.weight is model.embedding.weight
    logits, _ = model(torch.randint(50, (9, 2)))
    assert float(logits.detach().abs().max()) < 3


def test_score_does_not_depend_on_the_windows_and_counts_every_token():
    model = LanguageModel(LmConfig(hidden_size=9, emb_size=5, dropout=0.5), 11).double()
    ids = torch.randint(11, (101,))
    scores = [evaluate_stream(model, ids, 1, bptt, chars=202) for bptt in (1, 7, 1000)]
    assert [s.tokens for s in scores] == [100] * 3
    assert max(s.loss for s in scores) - min(s.loss for s in scores) < 1e-12
    assert scores[0].bits_per_char == pytest.approx(scores[0].loss * 100 / math.log(2) / 202)
    assert evaluate_stream(model, ids, 8, 7, chars=202).tokens == 100
    assert model.training, "evaluation leaves the mode as it was"


def test_unigram_perplexity_by_hand():
    train, valid = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 0, 1])
    assert unigram_perplexity(train, valid, 2) == pytest.approx((3 / 2 * 3) ** 0.5)  # p(0) = 4/6, p(1) = 2/6


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_training_learns_and_reports_it(config, cell):
    lines: list[str] = []
    config = dataclasses.replace(config, cell=cell, epochs=3, lr=0.02, sample=20, compare=2, dropout=0.0)
    result = train_lm(config, echo=lines.append)
    losses = [row["valid_loss"] for row in result.history]
    assert losses == sorted(losses, reverse=True)
    assert result.valid.ppl < result.unigram_ppl / 1.5
    assert result.valid.loss == pytest.approx(min(losses), abs=1e-5), "the best epoch's model is the one scored"
    assert len(result.sample) == 20
    assert set(result.layer_ms) == {"fastrnn", "torch"}
    assert sum("valid ppl" in line and line.startswith("epoch") for line in lines) == 3
    rows = (result.folder / "metrics" / "version_0" / "metrics.csv").read_text().splitlines()
    assert {"epoch", "step", "train_loss", "valid_loss", "valid_ppl"} <= set(rows[0].split(","))


@pytest.mark.parametrize(("level", "size"), [("word", 50), ("bpe", 300)])
def test_other_levels_train_too(config, level, size):
    config = dataclasses.replace(config, level=level, vocab_size=size, epochs=1, sample=5)
    result = train_lm(config, echo=quiet)
    assert len(result.vocabulary) <= size
    assert result.valid.ppl < size
    assert isinstance(result.sample, str)


def final_state(folder) -> dict:
    """What must be equal bit for bit: weights, optimiser, RNG, carried state, and losses of every epoch."""
    saved = checkpoints.load(folder / "last.ckpt")
    run = saved["fastrnn"]["run"]
    history = [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in run["history"]]
    return {
        "weights": saved["state_dict"],
        "optimizer": saved["optimizer_states"],
        "rng": run["rng"],
        "extra": run["extra"],
        "history": history,
        "step": saved["global_step"],
    }


def assert_identical(a, b, where="checkpoint"):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def at_step(monkeypatch, step: int, action) -> None:
    """Calls `action` once, in the course of training step number `step` (from 0)."""
    plain, done = LmTask.training_step, []

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == step and not done:
            done.append(True)
            action()
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(LmTask, "training_step", training_step)


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
    at_step(monkeypatch, step, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(Interrupted, match="continue with --resume") as stopped:
        train_lm(config, echo=quiet)
    assert stopped.value.signum == signum
    assert checkpoints.load(tmp_path / "run" / "last.ckpt")["global_step"] == step + 1
    train_lm(LmConfig(), resume=str(tmp_path / "run"), echo=quiet)
    assert_identical(final_state(tmp_path / "run"), expected)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resume_after_a_crash_goes_on_from_the_last_saved_step(config, tmp_path, monkeypatch):
    train_lm(dataclasses.replace(config, out=str(tmp_path / "whole")), echo=quiet)

    def crash():
        raise RuntimeError("power cut")

    at_step(monkeypatch, STEPS + 17, crash)
    config = dataclasses.replace(config, save_every=10)
    with pytest.raises(RuntimeError, match="power cut"):
        train_lm(config, echo=quiet)
    assert checkpoints.load(tmp_path / "run" / "last.ckpt")["global_step"] == (STEPS + 17) // 10 * 10
    train_lm(config, resume="auto", given={"out": config.out}, echo=quiet)
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
    with pytest.raises(UserError, match="the training text is not the one"):
        train_lm(config, resume=config.out, echo=quiet)


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


def test_full_disk_keeps_the_old_checkpoint(config, tmp_path, monkeypatch):
    train_lm(dataclasses.replace(config, epochs=1), echo=quiet)
    before = (tmp_path / "run" / "last.ckpt").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"last\.ckpt: cannot be written: .*No space left.*what was there is kept"):
        train_lm(config, resume=config.out, given={"epochs": 2}, echo=quiet)
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of a short run."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    config = LmConfig(**SMALL, data=str(folder / "text.txt"), out=str(folder / "run"), epochs=1)
    return train_lm(config, echo=quiet).folder / "best.ckpt"


def test_checkpoint_is_data_and_holds_what_is_needed(trained):
    saved = torch.load(trained, weights_only=True)["fastrnn"]
    assert saved["task"] == "lm"
    assert saved["config"]["hidden_size"] == 12
    assert {"fastrnn", "torch", "lightning", "tokenizers", "python"} == set(saved["versions"])
    assert Vocabulary.from_state(saved["tokenizer"]).decode([1, 2])
    model, vocabulary, config = load_model(trained, layer="torch")
    assert type(model.rnn) is torch.nn.LSTM
    assert (len(vocabulary), config.layer) == (model.output.out_features, "torch")


def test_damaged_and_foreign_checkpoints(trained, tmp_path):
    whole = trained.read_bytes()
    with zipfile.ZipFile(trained) as archive:
        record = max(archive.infolist(), key=lambda r: r.file_size)
    flipped = bytearray(whole)
    flipped[record.header_offset + record.file_size // 2 + 100] ^= 1
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pickled.ckpt")
    cases = {
        "truncated": (whole[: len(whole) // 2], "truncated, or not a checkpoint"),
        "flipped": (bytes(flipped), "damaged"),
        "text": (b"not a checkpoint", "truncated, or not a checkpoint"),
        "empty": (b"", "truncated, or not a checkpoint"),
        "foreign": (None, "not a checkpoint of fastrnn"),
        "pickled": (None, "not a checkpoint of fastrnn"),
        "missing": (None, "no such checkpoint"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.ckpt"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            load_model(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value), name
    with pytest.raises(UserError, match="of task lm, not translate"):
        checkpoints.load(trained, "translate")


def test_sampling_is_determined_by_its_seed(trained):
    model, vocabulary, _ = load_model(trained)
    texts = [generate(model, vocabulary, "the ", 60, seed=seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("the ") and len(text) == 64 for text in texts)
    greedy = generate(model, vocabulary, "the ", 30, temperature=0, seed=1)
    assert greedy == generate(model, vocabulary, "the ", 30, top_k=1, seed=2)
    assert greedy == generate(model, vocabulary, "the ", 30, top_p=1e-6, seed=3)
    assert generate(model, vocabulary, "the ", 0) == "the "
    with pytest.raises(UserError, match="--top-p"):
        generate(model, vocabulary, top_p=0.0)


def test_sampling_never_draws_unknown_and_follows_the_model(trained):
    model, vocabulary, _ = load_model(trained)
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.bias.zero_()
        model.output.bias[vocabulary.unknown] = 50.0
        model.output.bias[vocabulary.encode("q").item()] = 20.0
    assert generate(model, vocabulary, "", 50, seed=1) == "q" * 50


def test_schedules():
    config = LmConfig(schedule="step", decay=0.5, decay_start=4)
    assert [schedule(config, 0, epoch, 100) for epoch in range(7)] == [1, 1, 1, 1, 0.5, 0.25, 0.125]
    config = LmConfig(schedule="cosine", warmup=10)
    assert [schedule(config, step, 0, 100) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert schedule(config, 100, 0, 100) == pytest.approx(0.05)
    assert schedule(LmConfig(schedule="constant"), 77, 3, 100) == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": 0}, {"dropout": 1.0}, {"lr": -1.0}, {"lr": math.nan}, {"epochs": 0}, {"clip": -1.0},
        {"tied": True, "emb_size": 3}, {"vocab_size": 1}, {"max_steps": 0}, {"decay": 0.0}, {"device": "abacus"},
    ],
)  # fmt: skip
def test_options_out_of_range(config, wrong):
    with pytest.raises(UserError, match="--" + next(iter(wrong)).replace("_", "-")):
        train_lm(dataclasses.replace(config, **wrong), echo=quiet)
