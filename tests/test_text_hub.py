"""Data sets of the Hugging Face hub, without a network: folders that `datasets` has saved, and what cannot be had."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning", reason="needs the extra [train]")

from text_support import SMALL, one_thread, quiet

from fastrnn.text import ClassifyConfig, LmConfig, TranslateConfig, UserError, train_classify, train_lm
from fastrnn.text.data.corpus import load_corpus, load_text, text_files
from fastrnn.text.data.hub import name_splits
from fastrnn.text.data.pairs import load_pairs
from fastrnn.text.data.records import load_examples
from fastrnn.text.evaluate import evaluate_checkpoint
from fastrnn.text.tasks.classify import ClassifyTask

__all__ = ["one_thread"]  # a fixture

ROOT = Path(__file__).parent.parent
WORDS = ["cat", "dog", "fur", "sea", "salt", "tide"]


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The library, its cache in the test's folder."""
    library = pytest.importorskip("datasets", reason="needs the extra [hub]")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return library


@pytest.fixture
def saved(datasets, tmp_path):
    """Writes a data set of columns by split, and returns what names it."""

    def write(label_names=None, **splits):
        found = datasets.DatasetDict({name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()})
        if label_names:
            found = found.cast_column("label", datasets.ClassLabel(names=label_names))
        found.save_to_disk(tmp_path / "saved")
        return f"hf:{tmp_path / 'saved'}"

    return write


def test_text_for_a_language_model(saved, tmp_path):
    data = saved(train={"text": ["one\n", "", "two"]}, validation={"text": ["three"]}, test={"text": ["four"]})
    corpus = load_corpus(data)
    assert (corpus.train, corpus.valid, corpus.test) == ("one\n\ntwo\n", "three\n", "four\n")
    assert [load_text(data), load_text(data, "train")] == ["four\n", "one\n\ntwo\n"]
    with pytest.raises(UserError, match="no column 'body'; there are: text"):
        load_corpus(data, column="body")
    with pytest.raises(UserError, match="token files are made of files; train lm --data hf:"):
        text_files(data)
    rows = [" ".join(WORDS[(i * j) % 6] for j in range(9)) for i in range(80)]
    data = saved(train={"text": rows, "body": [row.upper() for row in rows]})
    config = LmConfig(**SMALL, data=data, text_column="body", out=str(tmp_path / "run"), epochs=1, max_steps=3)
    checkpoint = train_lm(config, echo=quiet).folder / "best.ckpt"
    (line,) = evaluate_checkpoint(str(checkpoint), data, None, 2, None)[:1]
    assert line.startswith("perplexity")


def test_classes_by_name_and_examples_without_one(saved, tmp_path):
    rows = [" ".join([*(WORDS[(i * j) % 3 + 3 * (i % 2)] for j in range(5)), str(i)]) for i in range(80)]
    data = saved(
        ["wild", "tame"],
        train={"content": rows[:60], "label": [i % 2 for i in range(60)]},
        test={"content": rows[60:], "label": [-1, *[i % 2 for i in range(61, 80)]]},
        unsupervised={"content": ["x"], "label": [-1]},
    )
    name, splits = load_examples(data)
    assert name == data
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 54, "valid": 6, "test": 19}
    assert (splits["test"][0].content, splits["test"][0].label) == (rows[61], "tame")
    config = ClassifyConfig(data=data, out=str(tmp_path / "run"), device="cpu", progress=False, compare=0, report=False,
                            hidden_size=8, emb_size=8, epochs=3, lr=0.02)  # fmt: skip
    result = train_classify(config, echo=quiet)
    assert (result.encoder.labels, result.test.count) == (["tame", "wild"], 19)
    (line, *_) = ClassifyTask.evaluate(str(result.folder / "best.ckpt"), data, None, 10, None)
    assert "(19 examples)" in line
    with pytest.raises(UserError, match="--input series reads files"):
        train_classify(ClassifyConfig(data=data, input="series"), echo=quiet)


def test_only_test_labels_are_hidden(saved):
    columns = {"text": ["a", "b"], "label": [0, 1]}
    data = saved(["x", "y"], train=columns, test={"text": ["c"], "label": [-1]})
    assert sorted(load_examples(data, valid_share=0.5)[1]) == ["train", "valid"]


def test_pairs_by_column_and_by_language(saved):
    rows = {"de": [f"ein {i}\nsatz" for i in range(40)], "en": [f"a {i}" if i else "" for i in range(40)]}
    translation = [dict(zip(rows, pair, strict=True)) for pair in zip(*rows.values(), strict=True)]
    config = TranslateConfig(source="de", target="en")
    for columns in (rows, {"id": list(range(40)), "translation": translation}):
        name, splits = load_pairs(config, saved(train=columns, validation=columns))
        assert len(splits["valid"]) == 39, "a pair with an empty side is none"
        assert splits["valid"][0] == ("ein 1 satz", "a 1")
    for options, message in (
        ({}, "--source and --target name its columns"),
        ({"source": "fr", "target": "en"}, "no columns fr and en"),
    ):
        with pytest.raises(UserError, match=f"{message}; there are: id, de, en"):
            load_pairs(TranslateConfig(**options), name)


def test_a_data_set_of_files_and_one_that_is_a_single_split(datasets, tmp_path):
    """Loaded by load_dataset, as from the hub."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.csv").write_text("text,label\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(20)))
    assert sum(map(len, load_examples(f"hf:{folder}")[1].values())) == 20
    datasets.Dataset.from_dict({"text": ["one"] * 30}).save_to_disk(tmp_path / "single")
    assert load_corpus(f"hf:{tmp_path / 'single'}").train.startswith("one\none\n")


def test_what_is_not_to_be_had(saved):
    data = saved(first={"text": ["a"]}, second={"text": ["b"]})
    with pytest.raises(UserError, match="no split named train, validation or test; there are: first, second"):
        load_corpus(data)
    for values in ([["a", "b"]], [None, ["a", "b"]], [{"a": 1}], [None, b"ab"]):
        with pytest.raises(UserError, match=r"column 'text' holds neither texts nor numbers") as refused:
            load_corpus(saved(train={"text": values}))
        assert "\n" not in str(refused.value)
    assert load_corpus(saved(train={"text": [None, 7] * 20})).train.startswith("\n7\n\n7\n")
    with pytest.raises(UserError, match=r"no column that --label-column could mean; there are: text"):
        load_examples(saved(train={"text": ["a"]}))


def test_splits_by_their_names(saved):
    """The exact name before others that contain it; splits of which one must be meant are never joined."""
    data = saved(train={"text": ["a"]}, train_small={"body": [1]}, unsupervised_train={"text": ["b"]},
                 dev={"text": ["c"]}, Test={"text": ["d"]})  # fmt: skip
    corpus = load_corpus(data)
    assert (corpus.train, corpus.valid, corpus.test) == ("a\n", "c\n", "d\n")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train", "validation_matched", "validation_mismatched"],
         "one split named valid or validation or val or dev, got validation_matched, validation_mismatched: keep"),
        (["train", "validation", "dev", "test"],
         "one split named valid or validation or val or dev, got validation, dev: keep"),
        (["train", "validation", "adversarial_test"], "one split named test, got adversarial_test: keep"),
        (["train_small", "test"], "one split named train, got train_small: keep"),
        (["first", "second"], "no split named train, validation or test; there are: first, second"),
    ],
)  # fmt: skip
def test_splits_of_which_none_or_two_are_meant(names, message):
    with pytest.raises(UserError, match=message):
        name_splits("hf:x", names)


@pytest.mark.parametrize("task", ["lm", "classify", "translate"])
def test_offline_is_one_line(datasets, tmp_path, task):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "HF_HUB_OFFLINE": "1"}
    environment["HF_HOME"] = str(tmp_path / "home")
    command = [sys.executable, "-m", "fastrnn.cli", "train", task, "--data", "hf:nobody/nothing"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    message = rf"fastrnn train {task}: error: hf:nobody/nothing: cannot be loaded .*check the name .*offline.*\n"
    assert re.fullmatch(message, done.stderr), done.stderr
    assert not (tmp_path / "runs").exists()


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"--data hf:imdb needs datasets: pip install 'fastrnn\[hub\]'"):
        load_examples("hf:imdb")
