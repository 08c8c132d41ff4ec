"""The language model: carried state, learning, exact resuming, checkpoints, sampling."""

from __future__ import annotations

import dataclasses
import math
import zipfile

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra [train]")

from text_support import SMALL, TEXT, config, one_thread, quiet

from fastrnn.text import (
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
from fastrnn.text.optim import schedule

__all__ = ["config", "one_thread"]  # fixtures


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
    torch.save({"fastrnn": {"format": checkpoints.FORMAT, "task": "lm"}}, tmp_path / "hollow.ckpt")
    torch.save({"fastrnn": {**checkpoints.load(trained)["fastrnn"], "format": "x"}}, tmp_path / "format.ckpt")
    cases = {
        "truncated": (whole[: len(whole) // 2], "truncated, or not a checkpoint"),
        "flipped": (bytes(flipped), "damaged"),
        "text": (b"not a checkpoint", "truncated, or not a checkpoint"),
        "empty": (b"", "truncated, or not a checkpoint"),
        "foreign": (None, "not a checkpoint of fastrnn"),
        "pickled": (None, "not a checkpoint of fastrnn: it holds more than data, and is not read$"),
        "hollow": (None, "a PyTorch file, but not a checkpoint of fastrnn"),
        "format": (None, "a PyTorch file, but not a checkpoint of fastrnn"),
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
