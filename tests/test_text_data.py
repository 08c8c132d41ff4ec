"""Reading, splitting, tokenizing and batching text."""

from __future__ import annotations

import gzip
import tarfile

import pytest
import torch

pytest.importorskip("tokenizers", reason="needs the extra [train]")

from fastrnn.text import UserError, Vocabulary, load_corpus
from fastrnn.text.data.corpus import builtin_text, load_text
from fastrnn.text.data.stream import IGNORE, BpttLoader

TEXT = "the cat sat\non the mat\n\nnaïve ☃ 漢字 — the end\n"


def test_folder_with_named_splits(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"ptb.{split}.txt").write_text(f"the {split} text\n")
    (tmp_path / "README").write_text("not data")
    corpus = load_corpus(str(tmp_path))
    assert (corpus.train, corpus.valid, corpus.test) == ("the train text\n", "the valid text\n", "the test text\n")
    assert load_text(str(tmp_path)) == "the test text\n"
    assert load_text(str(tmp_path), "valid") == "the valid text\n"
    with pytest.raises(UserError, match=r"no split dev; there are: test, train, valid"):
        load_text(str(tmp_path), "dev")


def test_folder_without_named_splits_is_read_in_order_of_names(tmp_path):
    (tmp_path / "b.txt").write_text("bb\n" * 10)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"aa\n" * 10))
    corpus = load_corpus(str(tmp_path))
    assert corpus.train + corpus.valid == "aa\n" * 10 + "\n" + "bb\n" * 10
    assert corpus.test is None


def test_only_names_below_the_folder_hide_files(tmp_path, monkeypatch):
    folder = tmp_path / ".cache" / "texts"
    (folder / ".git").mkdir(parents=True)
    for name in ("a.txt", ".swap", ".git/b.txt"):
        (folder / name).write_text(f"{name}\n" * 10)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for data in (str(folder), "../.cache/texts"):
        corpus = load_corpus(data)
        assert corpus.train + corpus.valid == "a.txt\n" * 10


def test_folders_and_archives_of_texts_by_split(tmp_path):
    """IMDB's layout as text for a language model: the training reviews, those without a label too."""
    for split in ("train", "test"):
        for label in ("pos", "unsup"):
            (tmp_path / "a" / split / label).mkdir(parents=True)
            (tmp_path / "a" / split / label / "0_7.txt").write_text(f"{split} {label} " * 20 + "\n")
    (tmp_path / "a" / "train" / "bow.feat").write_text("not text")
    (tmp_path / "a" / "README").write_text("not data")
    with tarfile.open(tmp_path / "a.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "a", "aclImdb")
    for name in ("a", "a.tar.xz"):
        corpus = load_corpus(str(tmp_path / name))
        assert sorted((corpus.train + corpus.valid).split()) == sorted(["train", "pos", "train", "unsup"] * 20)
        assert corpus.test.split()[:2] == ["test", "pos"]
        assert load_text(str(tmp_path / name), "test") == corpus.test
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        archive.add(tmp_path / "a" / "README", "README")
    with pytest.raises(UserError, match=r"holds no \.txt file"):
        load_corpus(str(tmp_path / "b.tar"))


def test_file_is_cut_at_a_line_with_a_tenth_for_validation(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    corpus = load_corpus(str(tmp_path / "x.txt"))
    assert corpus.train + corpus.valid == text
    assert corpus.train.endswith("\n")
    assert 0.09 < len(corpus.valid) / len(text) < 0.11


def test_text_without_lines_is_cut_too(tmp_path):
    (tmp_path / "x.txt").write_text("ab" * 50)
    corpus = load_corpus(str(tmp_path / "x.txt"))
    assert (len(corpus.train), len(corpus.valid)) == (90, 10)


def test_default_text_is_large_and_english():
    text = builtin_text()
    assert len(text) > 300_000
    assert text.count(" the ") > 3_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the train text is empty"),
        (b" \n\n", "the train text is empty"),
        (b"fine\nbad \xff byte", r"not UTF-8 at byte 9 \(line 2\)"),
    ],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_corpus(str(tmp_path / "x.txt"))


def test_missing_file_broken_gzip_empty_folder_and_no_training_file(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        load_corpus(str(tmp_path / "nothing"))
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"a" * 999)[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        load_corpus(str(tmp_path / "x.gz"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file"):
        load_corpus(str(tmp_path / "empty"))
    (tmp_path / "empty" / "test.txt").write_text("text")
    with pytest.raises(UserError, match=r"none named \*train\*"):
        load_corpus(str(tmp_path / "empty"))


@pytest.mark.parametrize("level", ["char", "bpe"])
def test_round_trip_is_exact(level):
    text = TEXT * 900  # longer than the pieces in which text is tokenized
    vocabulary = Vocabulary.build(text, level, 300 if level == "bpe" else None)
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert ids.dtype == torch.int64
    assert int(ids.max()) < len(vocabulary)
    if level == "char":
        assert len(ids) == len(text)


def test_word_level_keeps_words_and_line_ends():
    text = TEXT * 900
    vocabulary = Vocabulary.build(text, "word")
    ids = vocabulary.encode(text)
    assert len(ids) == len(text.split()) + text.count("\n")
    assert [line.split() for line in vocabulary.decode(ids).split("\n")] == [line.split() for line in text.split("\n")]


def test_unknown_tokens():
    char = Vocabulary.build("abc\n", "char")
    assert char.decode(char.encode("aéb漢")) == "a<unk>b<unk>"
    word = Vocabulary.build("a b c\n", "word")
    assert word.encode("a zzz b").tolist()[1] == word.unknown
    bpe = Vocabulary.build("plain ascii text " * 20, "bpe", 270)
    assert bpe.unknown is None
    assert bpe.decode(bpe.encode("é漢 ☃")) == "é漢 ☃"


def test_vocabulary_keeps_the_most_frequent():
    vocabulary = Vocabulary.build("a a a b b c\n", "word", 4)  # <unk>, <eos>, a, b
    assert len(vocabulary) == 4
    assert vocabulary.decode(vocabulary.encode("a b c")) == "a b <unk>"


@pytest.mark.parametrize("level", ["char", "word", "bpe"])
def test_vocabulary_survives_its_state(level):
    vocabulary = Vocabulary.build(TEXT * 9, level, 300)
    again = Vocabulary.from_state(vocabulary.state())
    assert len(again) == len(vocabulary)
    assert again.encode(TEXT + "zzz").tolist() == vocabulary.encode(TEXT + "zzz").tolist()
    assert again.start() == vocabulary.start()


def test_bpe_too_small():
    with pytest.raises(UserError, match="at least 257"):
        Vocabulary.build(TEXT, "bpe", 100)


@pytest.mark.parametrize(("n", "batch_size"), [(13, 3), (14, 3), (2, 1), (29, 7), (5, 8)])
def test_padded_batches_hold_every_target_once(n, batch_size):
    ids = torch.arange(100, 100 + n)
    (window,) = BpttLoader(ids, batch_size, 1000, pad=True)
    inputs, targets = window
    real = targets.t().flatten() != IGNORE
    assert torch.equal(targets.t().flatten()[real], ids[1:])
    assert torch.equal(inputs.t().flatten()[real], ids[:-1])
    assert inputs.shape == targets.shape == (-(-(n - 1) // batch_size), batch_size)


def test_training_batches_follow_one_another_down_the_columns():
    ids = torch.arange(1000)
    loader = BpttLoader(ids, batch_size=7, bptt=10)
    windows = list(loader)
    assert len(windows) == len(loader) == 15  # 142 steps a column
    assert [len(x) for x, _ in windows] == [10] * 14 + [2]
    inputs, targets = (torch.cat(part) for part in zip(*windows, strict=True))
    assert torch.equal(inputs.t().flatten(), ids[: 7 * 142])
    assert torch.equal(targets, inputs + 1)


def test_loader_goes_on_where_its_state_was_saved():
    ids = torch.arange(200)
    whole = [x for x, _ in BpttLoader(ids, 3, 5)]
    first = BpttLoader(ids, 3, 5)
    iterator = iter(first)
    seen = [next(iterator)[0] for _ in range(4)]
    second = BpttLoader(ids, 3, 5)
    second.load_state_dict(first.state_dict())
    seen += [x for x, _ in second]
    assert torch.equal(torch.cat(seen), torch.cat(whole))
    assert torch.equal(torch.cat([x for x, _ in second]), torch.cat(whole)), "the next pass starts from the beginning"


def test_too_short_a_text():
    with pytest.raises(UserError, match="5 tokens, too few for one step of 16 columns"):
        BpttLoader(torch.arange(5), 16, 10)
