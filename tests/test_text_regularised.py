"""AWD-LSTM's regularisers, windows of random length, the adaptive softmax: by hand, and resumed exactly."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra [train]")

from text_support import assert_identical, at_step, config, final_state, one_thread, quiet

from fastrnn.text import Interrupted, LanguageModel, LmConfig, UserError, train_lm
from fastrnn.text.data.stream import IGNORE, BpttLoader
from fastrnn.text.models.regularised import drop_rows, locked_dropout
from fastrnn.text.sampling import draw
from fastrnn.text.tasks.lm import LmTask

__all__ = ["config", "one_thread"]  # fixtures

AWD = {
    "variational": True, "dropout": 0.3, "dropout_in": 0.4, "dropout_hidden": 0.2, "dropout_emb": 0.1,
    "weight_drop": 0.5, "alpha": 2.0, "beta": 1.0, "tied": True, "layers": 3, "emb_size": 8, "hidden_size": 12,
}  # fmt: skip


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_both_libraries_give_the_same_losses_and_gradients_with_every_regulariser(cell):
    tokens, targets = torch.randint(23, (2, 7, 5))
    results = []
    for layer in ("fastrnn", "torch"):
        torch.manual_seed(0)
        model = LanguageModel(LmConfig(**AWD, cell=cell, layer=layer), 23).double()
        torch.manual_seed(1)  # the masks
        summed, penalty, state = model.loss(tokens, targets, None)
        summed2, penalty2, _ = model.loss(tokens, targets, state)
        torch.autograd.backward(summed + summed2 + penalty + penalty2)
        assert penalty > 0
        named = {name: p.grad for name, p in model.named_parameters()}
        results.append({"loss": summed, "penalty": penalty, "second": summed2, **named})
    assert len(results[0]) == 3 + 3 * 4 + 2  # weights and biases of three layers, the shared embedding, a bias
    assert any("weight_hh_l0_raw" in name for name in results[0])
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=0, atol=1e-10, msg=name)


def test_sizes_of_a_tied_stack_and_its_evaluation():
    model = LanguageModel(LmConfig(**AWD), 23).eval()
    assert [layer.hidden_size for layer in model.rnn.layers] == [12, 12, 8]
    assert model.output.weight is model.embedding.weight
    tokens = torch.randint(23, (9, 2))
    first, _ = model(tokens)
    assert torch.equal(first, model(tokens)[0]), "no dropout in eval mode"
    parts, state = [], None
    for window in tokens.split(4):
        logits, state = model(window, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts), first, rtol=0, atol=1e-5)


def test_masks():
    x = torch.ones(50, 7, 19)
    y = locked_dropout(x, 0.4, True)
    assert torch.equal(y, y[:1].expand_as(y)), "one mask for all steps"
    assert not torch.equal(y[:, 0], y[:, 1]), "another for each column"
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}
    assert locked_dropout(x, 0.4, False) is x
    w = drop_rows(torch.ones(200, 3), 0.25, True)
    assert torch.equal(w, w[:, :1].expand_as(w)), "whole words"
    assert 20 < int((w[:, 0] == 0).sum()) < 80


def test_dropped_weights_are_drawn_anew_and_the_raw_ones_trained():
    model = LanguageModel(LmConfig(layers=1, weight_drop=0.5, dropout=0.0, hidden_size=9, emb_size=5), 11)
    tokens = torch.randint(11, (7, 3))
    a, b = model(tokens)[0], model(tokens)[0]
    assert not torch.equal(a, b)
    raw = model.rnn.layers[0].weight_hh_l0_raw
    used = model.rnn.layers[0].weight_hh_l0
    assert 0.3 < (used == 0).double().mean() < 0.7
    torch.testing.assert_close(used[used != 0], 2 * raw[used != 0])
    assert [n for n, _ in model.named_parameters() if "weight_hh" in n] == ["rnn.layers.0.weight_hh_l0_raw"]


def test_penalties_by_hand():
    model = LanguageModel(LmConfig(alpha=2.0, beta=3.0, hidden_size=9, emb_size=5, dropout=0.5), 11)
    tokens = torch.randint(11, (7, 3))
    torch.manual_seed(4)
    y, dropped, _ = model.hidden(tokens, None)
    torch.manual_seed(4)
    _, penalty, _ = model.loss(tokens, tokens, None)
    expected = 2 * (dropped**2).mean() + 3 * ((y[1:] - y[:-1]) ** 2).mean()
    torch.testing.assert_close(penalty, expected)
    assert model.eval().loss(tokens, tokens, None)[1] == 0


def test_adaptive_softmax_is_a_distribution_and_its_loss_skips_padding():
    model = LanguageModel(LmConfig(cutoffs=[5, 20], hidden_size=16, emb_size=5), 60).double().eval()
    tokens, targets = torch.randint(60, (2, 7, 3))
    scores, _ = model(tokens)
    torch.testing.assert_close(scores.exp().sum(2), torch.ones(7, 3, dtype=torch.float64))
    targets[-2:, 1] = IGNORE
    expected = -sum(scores[t, b, targets[t, b]] for t in range(7) for b in range(3) if targets[t, b] != IGNORE)
    torch.testing.assert_close(model.loss(tokens, targets, None)[0], expected)


@pytest.mark.parametrize("bptt", [10, 33, 70])
def test_windows_of_random_length_cover_the_same_stream(bptt):
    ids = torch.arange(2000)
    loader = BpttLoader(ids, 3, bptt, varied=True, seed=1)
    passes = [list(loader) for _ in range(3)]
    lengths = [[len(x) for x, _ in windows] for windows in passes]
    for windows in passes:
        assert len(windows) == len(loader) == -(-666 // bptt)
        inputs, targets = (torch.cat(part) for part in zip(*windows, strict=True))
        assert torch.equal(inputs.t().flatten(), ids[: 3 * 666])
        assert torch.equal(targets, inputs + 1)
    assert min(min(row) for row in lengths) > 0
    assert lengths[0] != lengths[1] != lengths[2]
    again = BpttLoader(ids, 3, bptt, varied=True, seed=1)
    assert [[len(x) for x, _ in again] for _ in range(3)] == lengths, "the seed and the pass determine them"


@pytest.mark.parametrize("step", [0, 30, 49, 77])
def test_resume_with_everything_random(config, tmp_path, monkeypatch, step):
    """Every regulariser, random windows, averaging: the second sitting draws what one sitting would have drawn."""
    monkeypatch.setattr("fastrnn.text.task.nonmonotonic", lambda losses, n: len(losses) == 1)
    config = dataclasses.replace(config, **AWD, varied_bptt=True, optimizer="asgd", lr=1.0, schedule="constant")
    train_lm(dataclasses.replace(config, out=str(tmp_path / "whole")), echo=quiet)
    at_step(monkeypatch, LmTask, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        train_lm(config, echo=quiet)
    train_lm(LmConfig(), resume=str(tmp_path / "run"), echo=quiet)
    assert_identical(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))


def test_the_learning_rate_goes_with_the_window(config):
    task = LmTask(dataclasses.replace(config, varied_bptt=True), LmTask.load(config, None))
    assert task.lr_factor((torch.zeros(8, 4), torch.zeros(8, 4)), {}) == 0.5
    assert LmTask(config, task.data).lr_factor((torch.zeros(8, 4), torch.zeros(8, 4)), {}) == 1.0


def test_adaptive_softmax_trains(config):
    config = dataclasses.replace(config, cutoffs=[8], epochs=1, lr=0.02, sample=5)
    result = train_lm(config, echo=quiet)
    assert result.valid.ppl < 42
    assert len(result.sample) == 5
    with pytest.raises(UserError, match=r"--cutoffs \[42\] must lie below the 42 tokens"):
        train_lm(dataclasses.replace(config, cutoffs=[42]), echo=quiet, overwrite=True)


def test_sampling_keeps_to_the_likely():
    scores = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(**options):
        return {draw(scores, 1.0, options.get("k", 0), options.get("p", 1.0), generator) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(k=1) == drawn(p=0.4) == {0}
    assert drawn(p=0.95) == {0, 1, 2, 3}
    assert drawn(k=3) == drawn(p=0.89) == {0, 1, 2}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cutoffs": [9, 3]}, "--cutoffs must be rising positive numbers"),
        ({"cutoffs": [3, 9]}, "--cutoffs with 2 numbers needs --hidden-size of 16 or more"),
        ({"cutoffs": [3], "tied": True, "emb_size": 12}, "--tied and --cutoffs exclude each other"),
        ({"varied_bptt": True, "bptt": 9}, "--varied-bptt needs --bptt of at least 10"),
        ({"weight_drop": 1.0}, "--weight-drop must lie in"),
        ({"dropout_in": -0.1}, "--dropout-in must lie in"),
        ({"alpha": -1.0}, "--alpha must be at least 0"),
    ],
)
def test_options_out_of_range(wrong, message):
    with pytest.raises(UserError, match=message):
        LmConfig(**{"hidden_size": 12, **wrong})
