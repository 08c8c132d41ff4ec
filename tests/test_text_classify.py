"""The classifier: layers and pooling, learning, scores, regression, series, exact resuming, prediction."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra [train]")

from text_support import assert_identical, at_step, final_state, one_thread, quiet

from fastrnn.text import ClassifyConfig, Interrupted, UserError, load_classifier, predict, train_classify
from fastrnn.text.models.classifier import Classifier, Pooling
from fastrnn.text.prediction import predict_lines
from fastrnn.text.scores import class_scores, number_scores
from fastrnn.text.tasks.classify import ClassifyTask

__all__ = ["one_thread"]  # a fixture

ROOT = Path(__file__).parent.parent
SMALL = {
    "emb_size": 8, "hidden_size": 6, "batch_size": 7, "device": "cpu", "compare": 0, "report": False, "progress": False,
    "lr": 0.02, "epochs": 2,
}  # fmt: skip
WORDS = {"pets": ["cat", "dog", "rabbit", "fur", "paw"], "sea": ["wave", "ship", "salt", "tide", "fish"]}


@pytest.fixture
def config(tmp_path):
    """A run of two epochs of 10 steps on texts of 3 to 12 words that tell their class by their words."""
    torch.manual_seed(3)
    lines = ["text,label"]
    for i in range(76):
        label = sorted(WORDS)[i % 2]
        words = [(WORDS[label] + ["the", "a"])[j] for j in torch.randint(7, (3 + i % 10,)).tolist()]
        lines.append(f"{' '.join(words)} {i},{label}")
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")
    return ClassifyConfig(**SMALL, data=str(tmp_path / "data.csv"), out=str(tmp_path / "run"))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("pooling", ["last", "mean", "max", "attention", "concat"])
def test_layers_and_ways_of_batching_agree_and_padding_does_not_matter(cell, pooling):
    base = ClassifyConfig(cell=cell, pooling=pooling, emb_size=5, hidden_size=19, layers=2, dropout=0.0)
    models = {}
    for layer, batches in (("fastrnn", "lengths"), ("fastrnn", "packed"), ("torch", "packed")):
        torch.manual_seed(0)
        config = dataclasses.replace(base, layer=layer, batches=batches)
        models[layer, batches] = Classifier(config, 11, 3).double()
    x, lengths = torch.randint(11, (7, 5)), torch.tensor([7, 1, 4, 3, 7])
    expected = models["torch", "packed"](x, lengths)
    for name, model in models.items():
        torch.testing.assert_close(model(x, lengths), expected, rtol=0, atol=1e-10, msg=str(name))
        alone = torch.cat([model(x[:n, i : i + 1], n[None]) for i, n in enumerate(lengths)])
        torch.testing.assert_close(alone, expected, rtol=0, atol=1e-10, msg=f"{name}, one by one")


def test_pooling_by_hand():
    y = torch.randn(7, 5, 4, dtype=torch.float64)
    lengths = torch.tensor([7, 1, 4, 3, 7])
    for i, n in enumerate(lengths.tolist()):
        y[n:, i] = 0.0
        part = y[:n, i]
        h = torch.randn(4, 5, 2, dtype=torch.float64)
        expected = {"mean": part.mean(0), "max": part.amax(0), "last": torch.cat([h[2, i], h[3, i]])}
        expected["concat"] = torch.cat([expected["last"], expected["max"], expected["mean"]])
        for kind, value in expected.items():
            torch.testing.assert_close(Pooling(kind, 4)(y, (h, h), lengths)[i], value, msg=kind)
        attention = Pooling("attention", 4).double()
        weights = torch.softmax(attention.score(part), 0)
        torch.testing.assert_close(attention(y, h, lengths)[i], (weights * part).sum(0))


def test_scores_are_those_of_torchmetrics():
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

    truth, found = torch.randint(4, (203,)), torch.randint(4, (203,))
    truth[truth == 3] = 0  # class 3 is predicted but never true
    confusion = torch.bincount(truth * 5 + found, minlength=25).reshape(5, 5)  # class 4 does not occur at all
    scores = class_scores(0.5, confusion)
    assert scores.accuracy == pytest.approx(multiclass_accuracy(found, truth, 5, average="micro").item())
    assert scores.macro_f1 == pytest.approx(multiclass_f1_score(found, truth, 5, average="macro").item())
    values, y = torch.randn(50).double(), torch.randn(50).double()
    sums = {"absolute": (values - y).abs().sum().item(), "squared": (values - y).square().sum().item(),
            "truth": y.sum().item(), "truth_squared": y.square().sum().item()}  # fmt: skip
    scores = number_scores(0.5, 50, sums, 3.0)
    assert scores.r2 == pytest.approx(1 - ((values - y) ** 2).mean().item() / y.var(correction=0).item())
    assert scores.mae == pytest.approx(3 * (values - y).abs().mean().item())


@pytest.mark.parametrize("options", [
    {"pooling": "last", "layer": "torch"}, {"pooling": "mean", "level": "char"}, {"level": "bpe", "vocab_size": 300},
    {"pooling": "attention", "batches": "packed", "stem": "english", "stop_words": "english", "cell": "gru"},
])  # fmt: skip
def test_it_learns_and_predicts(config, options):
    config = dataclasses.replace(config, epochs=8, dropout=0.0, report="level" not in options, **options)
    lines = []
    result = train_classify(config, echo=lines.append)
    assert result.valid.accuracy == 1.0
    assert result.valid.confusion.sum() == result.valid.count == 7
    assert max(row["valid_macro_f1"] for row in result.history) == 1.0
    model, encoder, saved = load_classifier(result.folder / "best.ckpt")
    found = predict(model, encoder, ["dog paw fur rabbit", "salt tide wave ship"], saved)
    assert [next(iter(p)) for p in found] == ["pets", "sea"]
    assert all(sum(p.values()) == pytest.approx(1) for p in found)
    if config.report:
        assert (result.folder / "confusion-matrix.png").read_bytes().startswith(b"\x89PNG")
        assert (result.folder / "report.html").read_text().count("data:image/png;base64,") == 2


def test_regression(config, tmp_path):
    torch.manual_seed(0)
    rows = [(torch.randint(0, 2, (5 + i % 9,)).tolist(), i) for i in range(150)]
    text = "".join(f"{' '.join(['low', 'high'][b] for b in bits)},{100 + 10 * sum(bits)}\n" for bits, _ in rows)
    (tmp_path / "data.csv").write_text("text,stars\n" + text)
    config = dataclasses.replace(config, target="number", epochs=12, pooling="mean", dropout=0.0, compare=1)
    result = train_classify(config, echo=quiet)
    assert result.valid.r2 > 0.5
    assert 0 < result.valid.mae <= result.valid.rmse < 25
    (value,) = predict(result.model, result.encoder, ["high high high high high low low"], config)
    assert 110 < value["value"] < 190
    (tmp_path / "data.csv").write_text("text,stars\na,1\nb,many\nc,2\n")
    with pytest.raises(UserError, match=r"data\.csv: the label 'many' is not a finite number"):
        train_classify(config, echo=quiet, overwrite=True)


def test_series(config, tmp_path):
    random = np.random.default_rng(0)
    for i in range(80):
        label = ("rising", "falling")[i % 2]
        steps = 5 + i % 11
        values = 50 + (1 - 2 * (i % 2)) * np.linspace(0, 9, steps) + random.normal(size=steps)
        folder = tmp_path / "series" / ("test" if i % 8 > 5 else "train") / label
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{i}.npy", np.stack([values, random.normal(size=steps)], 1))
    config = dataclasses.replace(config, data=str(tmp_path / "series"), input="series", epochs=6, dropout=0.0)
    result = train_classify(config, echo=quiet)
    assert result.test.accuracy > 0.9
    assert (result.encoder.features, result.encoder.vocabulary) == (2, None)
    path = str(result.folder / "best.ckpt")
    np.save(tmp_path / "one.npy", np.zeros((4, 3)))
    lines = ClassifyTask.evaluate(path, str(tmp_path / "series"), "test", 10, None)
    assert f"accuracy {result.test.accuracy:.2%}" in lines[0]
    with pytest.raises(UserError, match="3 features in a step, where training had 2"):
        predict(result.model, result.encoder, [torch.zeros(4, 3)], config)
    with pytest.raises(UserError, match=r"one\.npy: 3 features in a step, where training had 2"):
        predict_lines(path, None, str(tmp_path / "one.npy"), 1, 1, None)


@pytest.mark.parametrize(("step", "accumulate"), [(0, 1), (6, 1), (9, 1), (10, 1), (15, 1), (7, 3)])
def test_resume_equals_uninterrupted(config, tmp_path, monkeypatch, step, accumulate):
    config = dataclasses.replace(config, accumulate=accumulate)
    train_classify(dataclasses.replace(config, out=str(tmp_path / "whole")), echo=quiet)
    expected = final_state(tmp_path / "whole")
    assert expected["step"] == 20 if accumulate == 1 else 8
    at_step(monkeypatch, ClassifyTask, min(step, expected["step"] - 2), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        train_classify(config, echo=quiet)
    train_classify(ClassifyConfig(), resume=str(tmp_path / "run"), echo=quiet)
    assert_identical(final_state(tmp_path / "run"), expected)


def test_the_loss_is_the_mean_over_examples_by_the_plain_loop(config):
    """One epoch as a few lines of torch: the same batches, the same updates."""
    config = dataclasses.replace(
        config, epochs=1, dropout=0.0, optimizer="sgd", lr=0.5, clip=0.0, schedule="constant", layer="torch"
    )
    result = train_classify(config, echo=quiet)
    data = ClassifyTask.load(config, None)
    torch.manual_seed(config.seed)
    model = ClassifyTask(config, data).model
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.5), []
    for batch in data.train:
        loss = torch.nn.functional.cross_entropy(model(batch.x, batch.lengths), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() * batch.total)
    assert result.history[0]["train_loss"] == pytest.approx(sum(losses) / 69)
    for (name, a), b in zip(model.named_parameters(), result.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


def test_long_texts_are_cut_with_a_count_or_refused(config):
    lines = []
    config = dataclasses.replace(config, max_length=6, epochs=1)
    train_classify(config, echo=lines.append)
    assert any("sequences longer than 6 were cut" in line for line in lines)
    with pytest.raises(UserError, match=r"sequences are longer than --max-length 6, example .* the first"):
        train_classify(dataclasses.replace(config, too_long="refuse"), echo=quiet, overwrite=True)


def test_one_class_and_unknown_labels(config, tmp_path):
    result = train_classify(dataclasses.replace(config, epochs=1), echo=quiet)
    (tmp_path / "other.csv").write_text("text,label\nx,land\ny,sea\n")
    with pytest.raises(UserError, match="the label 'land' is not among those trained: pets, sea"):
        ClassifyTask.evaluate(str(result.folder / "best.ckpt"), str(tmp_path / "other.csv"), None, 10, None)
    with pytest.raises(UserError, match="no split test; there are: train, valid"):
        ClassifyTask.evaluate(str(result.folder / "best.ckpt"), str(tmp_path / "data.csv"), "test", 10, None)
    (tmp_path / "data.csv").write_text("text,label\nx,sea\ny,sea\nz,sea\n")
    with pytest.raises(UserError, match=r"data\.csv: all training examples have the label 'sea'"):
        train_classify(config, echo=quiet, overwrite=True)
    (tmp_path / "data.csv").write_text("text,label\nx,sea\ny,pets\nz,sea\n")
    with pytest.raises(UserError, match="the training data is not what"):
        train_classify(config, resume=config.out, echo=quiet)


def test_the_classic_model_runs_unchanged_with_either_library(tmp_path):
    """examples/lstm_classifier.py with fastrnn.LSTM and with nn.LSTM: the same losses and accuracies."""
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "lstm_classifier.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rows = [f"{' '.join(WORDS[sorted(WORDS)[i % 2]][j % 5] for j in range(i % 6 + 2))},{i % 2}" for i in range(64)]
    (tmp_path / "d").mkdir()
    for split in ("train", "test"):
        (tmp_path / "d" / f"{split}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    data, vocab_size, classes = example.load(str(tmp_path / "d"))
    reports = {}
    for library in (example.fastrnn, torch.nn):
        torch.manual_seed(1)
        model = example.LSTMClassifier(vocab_size, classes, library, dropout=0.0)  # masks are drawn in another order
        assert (model.embedding.embedding_dim, model.rnn.hidden_size, model.rnn.num_layers) == (100, 256, 2)
        lines: list[str] = []
        accuracies = example.train(model, data, epochs=2, batch_size=16, report=lines.append)
        reports[library] = [line.partition("%")[0] for line in lines], accuracies  # less the rate
    assert reports[example.fastrnn] == reports[torch.nn]
    assert reports[torch.nn][1][-1] > 0.9
