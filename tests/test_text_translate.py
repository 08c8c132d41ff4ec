"""The translator: pairs on disk, attention by hand, beam search against exhaustive search, BLEU, exact resuming."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra [train]")
pytest.importorskip("sacrebleu", reason="needs the extra [train]")

from text_support import assert_identical, at_step, final_state, one_thread, quiet

from fastrnn.text import Interrupted, TranslateConfig, UserError, load_translator, train_translate, translate
from fastrnn.text.beam import beam_search
from fastrnn.text.data.batches import pad
from fastrnn.text.data.pairs import load_pairs
from fastrnn.text.data.parallel import Sides, encode
from fastrnn.text.data.stream import IGNORE
from fastrnn.text.evaluate import evaluate_checkpoint
from fastrnn.text.models.seq2seq import Seq2Seq
from fastrnn.text.plots import read_metrics
from fastrnn.text.prediction import predict_lines
from fastrnn.text.tasks.translate import TranslateTask

__all__ = ["one_thread"]  # a fixture

SMALL = {
    "emb_size": 8, "hidden_size": 12, "batch_size": 8, "device": "cpu", "compare": 0, "report": False,
    "progress": False, "lr": 0.02, "epochs": 2, "examples": 2, "beam": 2,
}  # fmt: skip
WORDS = {"eins": "one", "zwei": "two", "drei": "three", "vier": "four", "fünf": "five"}


@pytest.fixture
def config(tmp_path):
    """A run of two epochs of 11 steps on numbers, translated word by word and reversed."""
    torch.manual_seed(3)
    lines = []
    for i in range(100):
        words = [list(WORDS)[j] for j in torch.randint(5, (1 + i % 6,)).tolist()]
        lines.append(f"{' '.join(words)}\t{' '.join(WORDS[w] for w in reversed(words))} {i}.")
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    return TranslateConfig(**SMALL, data=str(tmp_path / "pairs.tsv"), out=str(tmp_path / "run"), held_out=0.1)


@pytest.mark.parametrize("attention", ["bahdanau", "luong"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_libraries_agree_padding_does_not_matter_and_steps_equal_one_call(attention, cell):
    models = {}
    base = TranslateConfig(emb_size=5, hidden_size=14, layers=2, cell=cell, attention=attention, dropout=0.0)
    for layer in ("fastrnn", "torch"):
        torch.manual_seed(0)
        models[layer] = Seq2Seq(dataclasses.replace(base, layer=layer), 11, 9).double()
    source, lengths = torch.randint(11, (7, 5)), torch.tensor([7, 1, 4, 3, 7])
    inputs = torch.randint(11, (6, 5))
    expected = models["torch"](source, lengths, inputs)
    assert expected.shape == (6, 5, 10)
    for name, model in models.items():
        torch.testing.assert_close(model(source, lengths, inputs), expected, rtol=0, atol=1e-10, msg=name)
        for i, n in enumerate(lengths.tolist()):
            alone = model(source[:n, i : i + 1], lengths[i : i + 1], inputs[:, i : i + 1])
            torch.testing.assert_close(alone[:, 0], expected[:, i], rtol=0, atol=1e-10, msg=f"{name}, alone")
        memory, state = model.encode(source, lengths)
        steps = []
        for x in inputs:
            logits, state, weights = model.decode(x.unsqueeze(0), state, memory)
            torch.testing.assert_close(weights.sum(2), torch.ones(1, 5, dtype=torch.float64))
            assert all(bool((weights[0, i, n:] == 0).all()) for i, n in enumerate(lengths.tolist()))
            steps.append(logits)
        torch.testing.assert_close(torch.cat(steps), expected, rtol=0, atol=1e-10, msg=f"{name}, step by step")


@pytest.mark.parametrize("attention", ["bahdanau", "luong"])
def test_attention_by_hand(attention):
    model = Seq2Seq(TranslateConfig(emb_size=5, hidden_size=8, attention=attention, dropout=0.0), 11, 9).double()
    source, inputs = torch.randint(11, (4, 1)), torch.randint(11, (1, 1))
    memory, (h0, c0) = model.encode(source, torch.tensor([4]))
    _, _, weights = model.decode(inputs, (h0, c0), memory)
    values = memory.values[0]  # (S, E)
    if attention == "bahdanau":
        scores = model.score(torch.tanh(model.query(h0[-1]) + model.key(values))).squeeze(1)
    else:
        y, _ = model.decoder(model.target(inputs), (h0, c0))
        scores = model.key(values) @ y[0, 0]
    torch.testing.assert_close(weights[0, 0], scores.softmax(0))


def exhaustive(model, source, lengths, limit, penalty):
    """The best score over all target sequences of up to `limit` tokens."""
    memory, state = model.encode(source, lengths)
    best = {}
    for n in range(limit + 1):
        for tokens in itertools.product(range(model.end), repeat=n):
            inputs = torch.tensor([model.begin, *tokens]).unsqueeze(1)
            logits, _, _ = model.decode(inputs, state, memory)
            logp = logits[:, 0].log_softmax(1)
            score = sum(logp[t, token] for t, token in enumerate([*tokens, model.end])).item()
            best[tokens] = score / (n + 1) ** penalty
    return max(best.items(), key=lambda item: item[1])


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("attention", ["bahdanau", "luong"])
def test_a_wide_beam_is_exhaustive_search(attention, penalty):
    torch.manual_seed(1)
    model = Seq2Seq(TranslateConfig(emb_size=5, hidden_size=8, attention=attention), 7, 3).double().eval()
    with torch.no_grad():
        model.output.weight.mul_(6)
    sources = [torch.randint(7, (n,)) for n in (4, 2, 5)]
    source, lengths = pad(sources)
    found = beam_search(model, source, lengths, 150, 4, penalty)
    for i, s in enumerate(sources):
        tokens, score = exhaustive(model, s.unsqueeze(1), lengths[i : i + 1], 4, penalty)
        assert (tuple(found[i].tokens), found[i].score) == (tokens, pytest.approx(score, abs=1e-5)), i


def test_beam_of_one_is_greedy_and_the_banned_token_never_comes():
    torch.manual_seed(2)
    model = Seq2Seq(TranslateConfig(emb_size=5, hidden_size=8), 7, 6).double().eval()
    with torch.no_grad():
        model.output.weight.mul_(6)
        model.output.bias[model.end] -= 2
    source, lengths = pad([torch.randint(7, (n,)) for n in (4, 2)])
    for banned in (None, 3):
        for i, hypothesis in enumerate(beam_search(model, source, lengths, 1, 9, 1.0, banned)):
            memory, state = model.encode(source[:, i : i + 1], lengths[i : i + 1])
            token, expected = model.begin, []
            while len(expected) < 9:
                logits, state, _ = model.decode(torch.tensor([[token]]), state, memory)
                if banned is not None:
                    logits[..., banned] = -torch.inf
                token = int(logits.argmax())
                if token == model.end:
                    break
                expected.append(token)
            assert hypothesis.tokens == expected


def test_batches_hold_begin_target_and_end(config):
    pairs = [("eins zwei", "two one"), ("drei", "three four five")]
    sides = Sides.build(config, pairs)
    found = encode(sides, pairs)
    batch = found.collate([0, 1], [0, 1, 1])
    assert batch.inputs.shape == batch.targets.shape == (4, 2)
    assert batch.total == 3 + 4 + 4
    one, two = (sides.target.encode(word).item() for word in ("one", "two"))
    end, begin = len(sides.target), len(sides.target) + 1
    assert batch.inputs[:3, 0].tolist() == [begin, two, one]
    assert batch.targets[:, 0].tolist() == [two, one, end, IGNORE]
    assert batch.lengths.tolist() == [2, 1]


@pytest.mark.parametrize(("attention", "level"), [("bahdanau", "word"), ("luong", "bpe")])
def test_it_learns_and_translates(config, attention, level):
    options = {"attention": attention, "level": level, "vocab_size": 300, "report": attention == "bahdanau"}
    config = dataclasses.replace(config, **options, epochs=4, hidden_size=32, compare=1, label_smoothing=0.1)
    lines = []
    result = train_translate(config, echo=lines.append)
    losses = [row["valid_loss"] for row in result.history]
    assert losses[-1] < losses[0] * 0.9
    assert result.valid.count == len(load_pairs(config, config.data)[1]["valid"])
    assert any("BLEU" in line and "sacrebleu nrefs:1" in line for line in lines)
    assert len(result.examples) == 2
    model, sides, _ = load_translator(result.folder / "best.ckpt")
    source = result.examples[0][0]
    assert translate(model, sides, [source], config.beam) == [result.examples[0][2]]
    assert list(predict_lines(str(result.folder / "best.ckpt"), source, None, 1, 2, "torch")) == [result.examples[0][2]]
    if config.report:
        assert (result.folder / "report.html").read_text().count("data:image/png;base64,") == 3
        assert (result.folder / "attention-1.png").read_bytes().startswith(b"\x89PNG")
    (line,) = TranslateTask.evaluate(str(result.folder / "best.ckpt"), config.data, "valid", 10, None)
    assert f"BLEU {result.valid.bleu:.2f}" in line
    whole, alone = Path(config.data).parent / "other.tsv", Path(config.data).parent / "only" / "test.tsv"
    alone.parent.mkdir()
    for path in (whole, alone):  # pairs to be scored need no training pairs beside them, and none is held out
        path.write_text("".join(f"{s}\t{t}\n" for s, t, _ in result.examples))
    for data in (whole, alone):
        (line,) = TranslateTask.evaluate(str(result.folder / "best.ckpt"), str(data), None, 10, None)
        assert "(2 pairs;" in line
    with pytest.raises(UserError, match="no split dev; there are: "):
        TranslateTask.evaluate(str(result.folder / "best.ckpt"), config.data, "dev", 10, None)


def test_bleu_between_epochs_is_that_of_the_end(config):
    lines = []
    config = dataclasses.replace(config, epochs=4, bleu_every=2, report=True, hidden_size=32, vocab_size=300, lr=0.03)
    result = train_translate(config, echo=lines.append)
    assert ["valid_bleu" in row for row in result.history] == [False, True, False, True]
    losses = [row["valid_loss"] for row in result.history]
    assert losses.index(min(losses)) == 3
    assert result.valid.bleu > 0
    assert result.history[3]["valid_bleu"] == pytest.approx(result.valid.bleu, abs=1e-9)
    told = [line.split("BLEU ")[1].split(",")[0] for line in lines if line.startswith("epoch") and "BLEU" in line]
    assert told == [f"{result.history[i]['valid_bleu']:.2f}" for i in (1, 3)]
    assert "<th>valid_bleu</th>" in (result.folder / "report.html").read_text()
    assert {row["step"] for row in read_metrics(result.folder) if "valid_bleu" in row} == {21, 43}
    with pytest.raises(UserError, match="--bleu-every needs the whole model in each process"):
        dataclasses.replace(config, strategy="fsdp")


def test_evaluation_on_what_was_trained_on(config):
    result = train_translate(dataclasses.replace(config, epochs=1), echo=quiet)
    checkpoint = str(result.folder / "best.ckpt")
    for split, scored in ((None, result.test), ("valid", result.valid)):
        (line,) = evaluate_checkpoint(checkpoint, None, split, 10, None)
        assert line == f"{config.data} ({split or 'test'}): {scored.describe()}"
    with pytest.raises(UserError, match="no split dev; there are: test, train, valid"):
        evaluate_checkpoint(checkpoint, None, "dev", 10, None)
    Path(config.data).unlink()
    with pytest.raises(UserError, match=r"pairs\.tsv, which .*best\.ckpt was trained on, is not there: .*--data"):
        evaluate_checkpoint(checkpoint, None, None, 10, None)


def test_the_loss_is_the_mean_over_target_tokens_by_the_plain_loop(config):
    config = dataclasses.replace(config, epochs=1, dropout=0.0, optimizer="sgd", lr=0.5, clip=0.0, schedule="constant")
    result = train_translate(config, echo=quiet)
    data = TranslateTask.load(config, None)
    torch.manual_seed(config.seed)
    model = TranslateTask(config, data).model
    optimizer, total, count = torch.optim.SGD(model.parameters(), 0.5), 0.0, 0
    for batch in data.train:
        logits = model(batch.source, batch.lengths, batch.inputs)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, count = total + loss.item() * batch.total, count + batch.total
    assert result.history[0]["train_loss"] == pytest.approx(total / count, rel=1e-5)
    for (name, a), b in zip(model.named_parameters(), result.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("step", [0, 10, 11, 16])
def test_resume_equals_uninterrupted(config, tmp_path, monkeypatch, step):
    train_translate(dataclasses.replace(config, out=str(tmp_path / "whole")), echo=quiet)
    expected = final_state(tmp_path / "whole")
    assert expected["step"] == 22
    at_step(monkeypatch, TranslateTask, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        train_translate(config, echo=quiet)
    train_translate(TranslateConfig(), resume=str(tmp_path / "run"), echo=quiet)
    assert_identical(final_state(tmp_path / "run"), expected)


def test_long_pairs_are_dropped_with_a_count_or_refused(config):
    lines = []
    config = dataclasses.replace(config, max_length=5, epochs=1)
    train_translate(config, echo=lines.append)
    assert any("training pairs longer than 5 were left out" in line for line in lines)
    with pytest.raises(UserError, match=r"pairs are longer than --max-length 5, pair \d+ with \d the first"):
        train_translate(dataclasses.replace(config, too_long="refuse"), echo=quiet, overwrite=True)


@pytest.mark.parametrize(
    "side", [{"source_level": "char"}, {"source_level": "bpe", "vocab_size": 300}, {"source_words": "jieba"}]
)
def test_chinese(config, tmp_path, side):
    if "source_words" in side:
        pytest.importorskip("jieba", reason="needs the extra [zh]")
    lines = [
        f"I have {n} books {i}.\t我有{c}本书{i}。"
        for i, (n, c) in enumerate(zip("2345" * 10, "二三四五" * 10, strict=True))
    ]
    (tmp_path / "cmn.tsv").write_text("\n".join(lines) + "\n")
    config = dataclasses.replace(
        config, data=str(tmp_path / "cmn.tsv"), source_column=2, target_column=1, epochs=1, report=True, **side
    )
    result = train_translate(config, echo=quiet)
    assert result.sides.source.encode("我有二本书").tolist()
    assert "tok:13a" in result.valid.signature
    back = dataclasses.replace(config, source_column=1, target_column=2, source_level=None, source_words=None,
                               target_level="char", out=str(tmp_path / "back"), epochs=2, report=False)  # fmt: skip
    if "source_words" in side:
        assert "tok:zh" in train_translate(back, echo=quiet).valid.signature


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_size": 7}, "--hidden-size must be even"),
        ({"source": "de"}, "--source and --target go together"),
        ({"held_out": 0.6}, "--held-out must lie in"),
        ({"beam": 0}, "--beam must be at least 1"),
        ({"attention": "self"}, "--attention must be one of bahdanau, luong"),
    ],
)
def test_options_out_of_range(wrong, message):
    with pytest.raises(UserError, match=message):
        TranslateConfig(**wrong)
