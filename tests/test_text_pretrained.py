"""A classifier that starts from a language model: what it takes over, in which order it is trained, exact resuming."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra [train]")

from text_support import assert_identical, at_step, final_state, one_thread, quiet

from fastrnn.text import (
    ClassifyConfig,
    Interrupted,
    LmConfig,
    UserError,
    load_classifier,
    load_model,
    train_classify,
    train_lm,
)
from fastrnn.text.models.classifier import Classifier
from fastrnn.text.pretrained import adopt, layer_groups
from fastrnn.text.tasks.classify import ClassifyTask

__all__ = ["one_thread"]  # a fixture

SHARED = {"device": "cpu", "progress": False, "compare": 0, "report": False}
PLAIN = {"layers": 2, "emb_size": 8, "hidden_size": 8}
STACKED = {**PLAIN, "tied": True, "variational": True, "weight_drop": 0.3, "cell": "gru"}
LINES = [f"{'cat dog fur' if i % 2 else 'sea salt tide'} {i % 7}" for i in range(80)]


@pytest.fixture(scope="module", params=["plain", "stacked"])
def lm(request, tmp_path_factory):
    """The checkpoint of a short run, with its layers in one module, and one by one."""
    folder = tmp_path_factory.mktemp("lm")
    (folder / "text.txt").write_text("\n".join(LINES) + "\n")
    options = {"plain": PLAIN, "stacked": STACKED}[request.param]
    config = LmConfig(**SHARED, **options, data=str(folder / "text.txt"), out=str(folder / "lm"), level="word",
                      words="split", lower=True, batch_size=4, bptt=10, epochs=1, sample=0)  # fmt: skip
    return str(train_lm(config, echo=quiet).folder / "best.ckpt")


@pytest.fixture
def config(tmp_path, lm):
    """Four epochs of 9 steps."""
    rows = "\n".join(f"{line},{i % 2}" for i, line in enumerate(LINES))
    (tmp_path / "data.csv").write_text(f"text,label\n{rows}\n")
    return ClassifyConfig(**SHARED, data=str(tmp_path / "data.csv"), out=str(tmp_path / "run"), pretrained=lm,
                          pooling="concat", batch_size=8, lr=0.05, epochs=4, seed=5)  # fmt: skip


def test_weights_words_and_network_are_those_of_the_language_model(config, lm):
    adopted = adopt(config, lm)
    model, vocabulary, saved = load_model(lm)
    task = ClassifyTask(adopted, ClassifyTask.load(adopted, None))
    assert task.data.encoder.vocabulary.state() == vocabulary.state()
    assert (adopted.cell, adopted.layers, adopted.hidden_size, adopted.bidirectional) == (saved.cell, 2, 8, False)
    tokens, lengths = torch.randint(len(vocabulary), (7, 5)), torch.full((5,), 7)
    y, _, _ = model.hidden(tokens, None)
    task.eval()
    found, _ = task.model.rnn(task.model.embedding(tokens), lengths=lengths)
    torch.testing.assert_close(found, y, rtol=0, atol=1e-6)


def test_layers_are_unfrozen_from_the_output_down(config, monkeypatch):
    """The weights of a layer change from its epoch on, and not before; its learning rate is that of its depth."""
    seen = []
    plain = ClassifyTask.on_train_epoch_start

    def on_train_epoch_start(self):
        seen.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        plain(self)

    monkeypatch.setattr(ClassifyTask, "on_train_epoch_start", on_train_epoch_start)
    result = train_classify(dataclasses.replace(config, layer_decay=2.0, schedule="constant"), echo=quiet)
    seen.append(dict(load_classifier(result.folder / "last.ckpt")[0].named_parameters()))
    names = {"output.weight": 0, "rnn.weight_hh_l1": 1, "rnn.weight_ih_l0": 2, "embedding.weight": 3}
    for name, depth in names.items():
        changed = [not torch.equal(seen[e][name], seen[e + 1][name]) for e in range(4)]
        assert changed == [epoch >= depth for epoch in range(4)], name
    groups = torch.load(result.folder / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0.05, 0.025, 0.0125, 0.00625])
    assert result.history[-1]["valid_loss"] < result.history[0]["valid_loss"]


def test_no_gradient_is_carried_through_frozen_layers_and_the_numbers_are_the_same(config, tmp_path, monkeypatch):
    """The reference computes all gradients, of which those of frozen layers meet a learning rate of 0."""
    config = dataclasses.replace(config, optimizer="sgd", lr=0.5, clip=0.0, dropout=0.3)
    carried = []
    plain = ClassifyTask.configure_gradient_clipping

    def configure_gradient_clipping(self, *args, **kwargs):
        carried.append(
            (self.trainer.current_epoch, {n for n, p in self.model.named_parameters() if p.grad is not None})
        )
        plain(self, *args, **kwargs)

    monkeypatch.setattr(ClassifyTask, "configure_gradient_clipping", configure_gradient_clipping)
    model = train_classify(config, echo=quiet).model
    depth = {id(p): group["depth"] for group in layer_groups(model) for p in group["params"]}
    steps = carried.copy()
    carried.clear()
    assert {epoch for epoch, _ in steps} == set(range(4))
    for epoch, names in steps:
        assert names == {name for name, p in model.named_parameters() if depth[id(p)] <= epoch}, epoch
    monkeypatch.setattr(torch.nn.Parameter, "requires_grad_", lambda parameter, needed=True: parameter)
    train_classify(dataclasses.replace(config, out=str(tmp_path / "all")), echo=quiet)
    assert all(names == {name for name, _ in model.named_parameters()} for _, names in carried)
    assert_identical(final_state(tmp_path / "run"), final_state(tmp_path / "all"))


def test_averages_of_layers_that_are_still_frozen(config, monkeypatch):
    """Averaging begins after the first epoch, in which only the output had moved."""
    monkeypatch.setattr("fastrnn.text.task.nonmonotonic", lambda losses, n: len(losses) == 1)
    config = dataclasses.replace(config, optimizer="asgd", lr=0.5, schedule="constant")
    result = train_classify(config, echo=quiet)
    last = torch.load(result.folder / "last.ckpt", weights_only=True)
    names = [name for group in layer_groups(result.model) for name in named(result.model, group["params"])]
    weights, states = {n.removeprefix("model."): w for n, w in last["state_dict"].items()}, last["optimizer_states"][0]
    for i, name in enumerate(names):
        assert not torch.equal(states["state"][i]["ax"], weights[name]), name
    assert result.valid.loss == pytest.approx(min(row["valid_loss"] for row in result.history), abs=1e-5)


def named(model, parameters):
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in parameters]


def test_every_parameter_is_in_one_group():
    model = Classifier(ClassifyConfig(layers=3, pooling="attention"), 11, 2)
    groups = layer_groups(model)
    assert [group["depth"] for group in groups] == [0, 1, 2, 3, 4]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("step", [4, 8, 20])
def test_resume_needs_no_language_model_and_is_exact(config, tmp_path, monkeypatch, step):
    train_classify(dataclasses.replace(config, out=str(tmp_path / "whole")), echo=quiet)
    at_step(monkeypatch, ClassifyTask, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        train_classify(config, echo=quiet)
    monkeypatch.setattr("fastrnn.text.tasks.classify.start_from", None)
    train_classify(ClassifyConfig(), resume=str(tmp_path / "run"), echo=quiet)
    assert_identical(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))


def test_models_that_do_not_fit(config, lm, tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        train_classify(dataclasses.replace(config, pretrained=str(tmp_path / "none.ckpt")), echo=quiet)
    with pytest.raises(UserError, match="--pretrained needs --input text"):
        train_classify(dataclasses.replace(config, input="series"), echo=quiet)
    (tmp_path / "text.txt").write_text("\n".join(LINES) + "\n")
    uneven = LmConfig(**SHARED, **{**STACKED, "hidden_size": 12}, data=str(tmp_path / "text.txt"), bptt=10,
                      batch_size=4, out=str(tmp_path / "lm"), epochs=1, max_steps=2, sample=0)  # fmt: skip
    checkpoint = train_lm(uneven, echo=quiet).folder / "best.ckpt"
    with pytest.raises(UserError, match="its last layer has 8 units and the others 12"):
        train_classify(dataclasses.replace(config, pretrained=str(checkpoint)), echo=quiet)
