"""Labelled examples on disk, their splits, words, batches and series."""

from __future__ import annotations

import gzip
import json
import tarfile

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers", reason="needs the extra [train]")

from fastrnn.text import UserError, Vocabulary
from fastrnn.text.data.batches import BucketLoader, pad
from fastrnn.text.data.corpus import load_corpus
from fastrnn.text.data.docstrings import docstrings
from fastrnn.text.data.records import load_examples
from fastrnn.text.data.segment import Segmenter, stop_set
from fastrnn.text.data.series import load_series


def imdb(folder):
    """IMDB's layout: 10 reviews of each kind in train and test, and some without a label."""
    for split in ("train", "test"):
        for label in ("pos", "neg", "unsup"):
            (folder / split / label).mkdir(parents=True)
            for i in range(10):
                (folder / split / label / f"{i}_7.txt").write_text(f"{split} {label} {i}")
    (folder / "README").write_text("not data")
    (folder / "train" / "labeledBow.feat").write_text("not data")
    return folder


def contents(splits):
    return {split: sorted((e.content, e.label) for e in examples) for split, examples in splits.items()}


def test_folder_and_archive_give_the_same_examples(tmp_path):
    imdb(tmp_path / "aclImdb")
    for suffix, mode in ((".tar.gz", "w:gz"), (".tar.xz", "w:xz"), (".tar", "w")):
        with tarfile.open(tmp_path / f"a{suffix}", mode) as archive:
            archive.add(tmp_path / "aclImdb", "aclImdb")
    _, expected = load_examples(str(tmp_path / "aclImdb"))
    assert {split: len(e) for split, e in expected.items()} == {"train": 18, "test": 20, "valid": 2}
    assert {e.label for e in expected["train"]} == {"pos", "neg"}
    assert all(e.content.split()[:2] == ["test", e.label] for e in expected["test"])
    for suffix in (".tar.gz", ".tar.xz", ".tar"):
        assert contents(load_examples(str(tmp_path / f"a{suffix}"))[1]) == contents(expected)


def test_tables(tmp_path):
    rows = [("good, really\nfine", "pos"), ("bad", "neg"), ("so so", "mid"), ("dull", "neg")]
    text = "id,Review,label\n" + "".join(f'{i},"{t}",{y}\n' for i, (t, y) in enumerate(rows))
    (tmp_path / "a.csv").write_text(text)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.tsv").write_text("stars\tsentence\n" + "".join(f"{y}\t{t!r}\n" for t, y in rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows))
    for name in ("a.csv", "a.csv.gz", "a.jsonl"):
        _, splits = load_examples(str(tmp_path / name), valid_share=0.3)
        assert sorted((e.content, e.label) for e in splits["train"] + splits["valid"]) == sorted(rows), name
        assert len(splits["valid"]) == 1
    _, splits = load_examples(str(tmp_path / "a.tsv"))
    assert sorted(e.label for e in splits["train"] + splits["valid"]) == ["mid", "neg", "neg", "pos"]
    _, splits = load_examples(str(tmp_path / "a.csv"), text_column="id", label_column="Review")
    assert {e.content for e in splits["train"] + splits["valid"]} == {"0", "1", "2", "3"}
    (tmp_path / "f").mkdir()
    for split in ("train", "test"):
        (tmp_path / "f" / f"{split}.csv").write_text(text.replace("good", split))
    _, splits = load_examples(str(tmp_path / "f"))
    assert splits["test"][0].content == "test, really\nfine"
    assert len(splits["train"]) + len(splits["valid"]) == 4


def test_equal_texts_are_never_in_two_splits(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"t{i % 7}", "label": "a"}) + "\n" for i in range(70))
    )
    for share in (0.1, 0.3, 0.5):
        _, splits = load_examples(str(tmp_path / "a.jsonl"), valid_share=share)
        assert not {e.content for e in splits["train"]} & {e.content for e in splits["valid"]}
        assert splits["valid"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "body,kind\nx,y\n", "no column that --text-column could mean; there are: body, kind"),
        ("a.csv", "text,kind\nx,y\n", "no column that --label-column could mean; there are: text, kind"),
        ("a.csv", "text,label\nx\n", "line 2 has no column 'label'"),
        ("a.csv", "text,label\nx,a\ny, \n", "line 3 has an empty label in column 'label': leave out such lines"),
        ("a.csv", 'text,label\n"x,a\n', r"a\.csv: not a table with ',' between columns"),
        ("a.jsonl", '{"text": ["x"], "label": 1}\n', "line 1: column 'text' holds a list, not a text or number"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text"\n', "line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("a.csv", b"text,label\ncaf\xe9,a\n", r"not UTF-8 at byte 14 \(line 2\)"),
        ("a.csv", "text,label\nx,y\nx,y\n", r"a\.csv: 2 training examples, 1 of them different, .*give a valid split"),
        ("a.txt", "words", "neither a folder nor one of"),
        ("a.tar.gz", "not an archive", "cannot be read"),
        ("d/README", "no layout", r"no files SPLIT/LABEL/\*\.txt"),
    ],
)
def test_bad_examples(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load_examples(str(tmp_path / name.split("/")[0]))


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".tar.bz2"])
def test_a_truncated_or_damaged_archive(tmp_path, suffix):
    """Its first bytes are whole, so that what is wrong is found while its files are read."""
    noise = np.random.default_rng(3)
    for i in range(8):
        path = tmp_path / "texts" / "train" / "ab"[i % 2] / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(noise.bytes(30_000).hex())
    whole = tmp_path / f"whole{suffix}"
    with tarfile.open(whole, f"w:{suffix[5:]}") as archive:
        archive.add(tmp_path / "texts", "texts")
    content = whole.read_bytes()
    bad = bytearray(content)
    bad[len(bad) // 2 : len(bad) // 2 + 64] = bytes(64)
    cases = {"cut": content[: len(content) * 3 // 5]} | ({} if suffix == ".tar" else {"bad": bytes(bad)})
    for name, held in cases.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(held)
        for read in (load_examples, load_corpus):
            with pytest.raises(UserError, match=rf"{name}{suffix}: cannot be read: "):
                read(str(path))


def test_missing_data_and_column(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        load_examples(str(tmp_path / "nothing"))
    (tmp_path / "a.csv").write_text("text,label\nx,y\n")
    with pytest.raises(UserError, match="no column 'body'; there are: text, label"):
        load_examples(str(tmp_path / "a.csv"), text_column="body")


def test_default_examples_are_docstrings_by_package():
    found = list(docstrings())
    assert len(found) > 1000
    assert len({text for text, _ in found}) == len(found)
    assert {"asyncio", "email", "unittest"} <= {label for _, label in found}


def test_docstrings_of_a_python_below_a_folder_called_test(tmp_path, monkeypatch):
    for name in ("unittest/a.py", "unittest/test/b.py"):
        path = tmp_path / "test" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""The documentation of the file {name}, long enough."""\n')
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "test")})
    assert list(docstrings()) == [("The documentation of the file unittest/a.py, long enough.", "unittest")]


def test_words():
    split = Segmenter("split")
    assert split("Don't stop; <unk> (now)!\nOK.") == "Don't stop ; <unk> ( now ) ! OK ."
    assert split.join(split("Stop, now (please)!")) == "Stop, now (please)!"
    assert Segmenter()("as it  stands\nhere") == "as it  stands\nhere"
    assert Segmenter("split", lower=True, stop_words=("the", "of"))("The end OF it") == "end it"
    assert Segmenter("split", stem="english")("running houses") == "run hous"
    assert stop_set(("a",)) == {"a"}
    made = Segmenter("split", True, ("x",), "german")
    assert Segmenter.from_state(json.loads(json.dumps(made.state()))) == made


def test_chinese_words():
    pytest.importorskip("jieba", reason="needs the extra [zh]")
    zh = Segmenter("jieba")
    assert zh("我来到北京清华大学。").split() == ["我", "来到", "北京", "清华大学", "。"]
    assert zh.join("我 来到 北京 清华大学 。") == "我来到北京清华大学。"


def test_options_of_words(tmp_path):
    class Options:
        words, lower, stop_words, stem = "split", False, None, None

    options = Options()
    options.stop_words = "english"
    assert "the" in Segmenter.from_options(options).stop_words
    (tmp_path / "stop.txt").write_text("One\ntwo\n")
    options.stop_words = str(tmp_path / "stop.txt")
    assert Segmenter.from_options(options).stop_words == ("one", "two")
    options.stop_words = "klingon"
    with pytest.raises(UserError, match="neither 'english' nor a file"):
        Segmenter.from_options(options)
    options.stop_words, options.stem = None, "klingon"
    with pytest.raises(UserError, match=r"--stem klingon: there are: .*english"):
        Segmenter.from_options(options)


def test_a_text_without_tokens_is_one_unknown_token():
    vocabulary = Vocabulary.build("a b c", "word", segmenter=Segmenter("split", stop_words=("a",)))
    ids = vocabulary.encode_all(["b", "", "a", "c b"])
    assert [i.tolist() for i in ids] == [[2], [0], [0], [3, 2]]


def test_buckets_hold_every_example_once_with_little_padding():
    lengths = torch.randint(1, 200, (997,)).tolist()
    loader = BucketLoader(lengths, 16, lambda own, whole: (own, len(whole)))
    first, second = list(loader), list(loader)
    assert len(first) == len(loader) == 63
    for batches in (first, second):
        assert sorted(i for batch, _ in batches for i in batch) == list(range(997))
    assert first != second, "another order in each pass"
    padded = sum(max(lengths[i] for i in batch) * total for batch, total in first)
    assert padded < 1.2 * sum(lengths)
    ordered = list(BucketLoader(lengths, 16, lambda own, whole: own, shuffle=False))
    assert [lengths[i] for batch in ordered for i in batch] == sorted(lengths)


def test_bucket_loader_goes_on_where_its_state_was_saved():
    def make():
        return BucketLoader([5, 3, 9, 1, 7, 2, 2], 2, lambda own, whole: own, seed=3)

    whole = make()
    expected = [list(whole), list(whole)]
    first = make()
    list(first)
    iterator = iter(first)
    seen = [next(iterator), next(iterator)]
    second = make()
    second.load_state_dict(first.state_dict())
    assert seen + list(second) == expected[1]


def test_padding():
    x, lengths = pad([torch.tensor([1, 2, 3]), torch.tensor([4])])
    assert x.tolist() == [[1, 4], [2, 0], [3, 0]]
    assert lengths.tolist() == [3, 1]


def test_series_of_every_layout(tmp_path):
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("a", "b"):
            folder = tmp_path / "folder" / split / label
            folder.mkdir(parents=True)
            for i in range(5):
                values = random.normal(size=(3 + i, 2))
                np.save(folder / f"{i}.npy", values)
                np.savetxt(folder / f"{i}-too.csv", values, delimiter=",")
    _, splits = load_series(str(tmp_path / "folder"))
    assert len(splits["train"]) + len(splits["valid"]) == 20
    shapes = sorted(tuple(e.content.shape) for e in splits["test"])
    assert shapes == sorted([(3 + i, 2) for i in range(5)] * 4)
    (tmp_path / "ucr").mkdir()
    (tmp_path / "ucr" / "Gun_TRAIN.tsv").write_text("1\t0.5\t1\t2\n2\t3\t4\tNaN\n1\t1\t1\t1\n")
    (tmp_path / "ucr" / "Gun_TEST.tsv").write_text("2\t7\t8\t9\n")
    _, splits = load_series(str(tmp_path / "ucr"))
    assert [e.content.flatten().tolist() for e in splits["test"]] == [[7, 8, 9]]
    found = {tuple(e.content.flatten().tolist()): e.label for e in splits["train"] + splits["valid"]}
    assert found == {(0.5, 1, 2): "1", (3, 4): "2", (1, 1, 1): "1"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"1,2,x\n", "line 1: could not convert string to float"),
        ("a.csv", b"1,2,inf\n", "expected LABEL and finite numbers"),
        ("a.csv", b"1\n", "expected LABEL and finite numbers"),
        ("d/train/a/x.npy", b"not numpy", "not a sequence of numbers"),
        ("d/train/a/x.csv", b"1,2\n3\n", "not a sequence of numbers"),
    ],
)
def test_bad_series(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_series(str(tmp_path / name.split("/")[0]))
