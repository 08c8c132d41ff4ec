"""Token files: the same ids as tokenizing in memory, any number of workers, mapped into memory, checked on opening."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import tarfile

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra [train]")

from text_support import config, one_thread, quiet

from fastrnn.cli import main
from fastrnn.text import UserError, Vocabulary, train_lm
from fastrnn.text.data import prepare as preparing
from fastrnn.text.data.prepare import load_prepared, pool, prepare
from fastrnn.text.data.segment import Segmenter
from fastrnn.text.tasks.lm import LmTask

__all__ = ["config", "one_thread"]  # fixtures

LINES = [f"line {i} says Naïve ☃ things, {i * 7 % 13} times" for i in range(900)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.train.txt").write_text("\n".join(LINES) + "\n")
    (tmp_path / "texts" / "b.train.txt.gz").write_bytes(gzip.compress(("\n".join(LINES[::2]) + "\n").encode()))
    (tmp_path / "texts" / "valid.txt").write_text("\n".join(LINES[:50]) + "\n")
    return tmp_path


@pytest.mark.parametrize("level", ["char", "word", "bpe"])
def test_the_ids_are_those_of_tokenizing_in_memory(folder, level, monkeypatch):
    monkeypatch.setattr(preparing, "BLOCK", 1500)
    segmenter = Segmenter("split", lower=True)
    out = prepare(str(folder / "texts"), str(folder / "out"), level, 300, segmenter, echo=quiet)
    found = load_prepared(str(out))
    train = "\n".join(LINES) + "\n" + "\n".join(LINES[::2]) + "\n"
    vocabulary = Vocabulary.build(train, level, 300, segmenter)
    assert found.vocabulary.state() == vocabulary.state()
    assert np.array_equal(found.ids["train"], vocabulary.encode(train))
    assert np.array_equal(found.ids["valid"], vocabulary.encode("\n".join(LINES[:50]) + "\n"))
    assert found.chars == {"train": len(train), "valid": len("\n".join(LINES[:50])) + 1}
    assert isinstance(found.ids["train"], np.memmap)
    assert found.ids["train"].dtype == np.uint16


def die(job):
    os._exit(1)


def test_a_worker_that_is_killed_ends_the_run():
    with pytest.raises(UserError, match=r"one of 2 worker processes was killed.*fewer --workers"), pool(2) as run:
        list(run(die, range(3)))


def test_workers_change_nothing(folder, monkeypatch):
    monkeypatch.setattr(preparing, "BLOCK", 5000)
    for workers in (1, 2):
        prepare(str(folder / "texts"), str(folder / f"w{workers}"), "word", workers=workers, echo=quiet)
    names = sorted(p.name for p in (folder / "w1").iterdir())
    assert names == ["meta.json", "tokenizer.json", "train.bin", "valid.bin"]
    for name in names:
        assert (folder / "w1" / name).read_bytes() == (folder / "w2" / name).read_bytes(), name


@pytest.mark.parametrize("end", ["\n", "\nthe last line, unfinished"])
def test_the_end_of_one_file_is_validation(tmp_path, end):
    (tmp_path / "x.txt").write_text("\n".join(LINES) + end)
    found = load_prepared(str(prepare(str(tmp_path / "x.txt"), str(tmp_path / "out"), "char", echo=quiet)))
    whole = np.concatenate([found.ids["train"], found.ids["valid"]])
    assert len(whole) == sum(found.chars.values()) == len("\n".join(LINES) + end), "a token for each character"
    assert found.vocabulary.decode(whole.tolist()[:40]) == "\n".join(LINES)[:40]
    assert 0.08 < len(found.ids["valid"]) / len(whole) < 0.13


def test_training_on_token_files_equals_training_on_the_text(config, tmp_path):
    """At equal splits; the files are read window by window."""
    texts = tmp_path / "texts"
    texts.mkdir()
    text = (tmp_path / "text.txt").read_text().splitlines(keepends=True)
    (texts / "train.txt").write_text("".join(text[:55]))
    (texts / "valid.txt").write_text("".join(text[55:]))
    prepare(str(texts), str(tmp_path / "tokens"), "char", echo=quiet)
    config = dataclasses.replace(config, epochs=1)
    results = {}
    for data in ("texts", "tokens"):
        run = dataclasses.replace(config, data=str(tmp_path / data), out=str(tmp_path / f"run-{data}"))
        results[data] = train_lm(run, echo=quiet)
    for row in (r.history[0] for r in results.values()):
        row.pop("tokens_per_s")
    assert results["texts"].history == results["tokens"].history
    assert results["texts"].valid.loss == results["tokens"].valid.loss
    path = str(tmp_path / "run-texts" / "best.ckpt")
    by_text, by_tokens = (LmTask.evaluate(path, str(tmp_path / d), "valid", 10, None) for d in ("texts", "tokens"))
    assert by_text == by_tokens
    prepare(str(texts), str(tmp_path / "words"), "word", echo=quiet)
    with pytest.raises(UserError, match="prepared with another vocabulary than the model's"):
        LmTask.evaluate(path, str(tmp_path / "words"), None, 10, None)
    resumed = train_lm(config, resume=str(tmp_path / "run-tokens"), given={"epochs": 2}, echo=quiet)
    assert len(resumed.history) == 2


def test_damaged_folders(folder):
    out = prepare(str(folder / "texts"), str(folder / "out"), "word", echo=quiet)
    with pytest.raises(UserError, match="exists: name another --out"):
        prepare(str(folder / "texts"), str(out), "word", echo=quiet)
    whole = (out / "train.bin").read_bytes()
    (out / "train.bin").write_bytes(whole[:-2])
    with pytest.raises(UserError, match=rf"train.bin: {len(whole) - 2} bytes, not the {len(whole)}"):
        load_prepared(str(out))
    (out / "train.bin").write_bytes(whole)
    (out / "meta.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="prepared by another version"):
        load_prepared(str(out))
    (out / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a folder of fastrnn prepare"):
        load_prepared(str(out))


def test_bad_text_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_bytes(b"fine line\n" * 300 + b"caf\xe9\n")
    with pytest.raises(UserError, match=r"x.txt: not UTF-8 at byte 3003 \(line \d+ of a later part\)"):
        prepare(str(tmp_path / "x.txt"), str(tmp_path / "out"), "char", echo=quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UserError, match="the train text is empty"):
        prepare(str(tmp_path / "x.txt"), str(tmp_path / "out"), "word", echo=quiet)


def test_archives_and_small_packed_texts_are_refused(tmp_path):
    """An archive's own bytes are no text; what a small .gz file holds was all validation."""
    (tmp_path / "x.txt").write_text("a line of text\n" * 200)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "x.txt", "train/x.txt")
    with pytest.raises(UserError, match=r"x.tar.gz: token files are made of texts, not of archives: unpack it"):
        prepare(str(tmp_path / "x.tar.gz"), str(tmp_path / "out"), echo=quiet)
    (tmp_path / "x.gz").write_bytes(gzip.compress((tmp_path / "x.txt").read_bytes()))
    with pytest.raises(UserError, match=r"x.gz: too little text to keep some for validation"):
        prepare(str(tmp_path / "x.gz"), str(tmp_path / "out"), "bpe", 300, echo=quiet)
    assert not (tmp_path / "out").exists()


def test_the_command(folder, capsys):
    line = f"prepare --data {folder}/texts --out {folder}/cli --level word --vocab-size 40 --lower"
    assert main(line.split()) == 0
    assert "40 different tokens (word level)" in capsys.readouterr().out
    train = f"train lm --data {folder}/cli --out {folder}/run --hidden-size 8 --emb-size 8 --max-steps 3 --compare 0"
    threads = torch.get_num_threads()
    assert main([*train.split(), "--sample", "0", "--device", "cpu", "--report", "false"]) == 0
    torch.set_num_threads(threads)
    assert "(word level)" in capsys.readouterr().out
    assert main([*line.split(), "--workers", "0"]) == 2
    assert "--workers" in capsys.readouterr().err
