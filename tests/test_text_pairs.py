"""Pairs of texts on disk and their splits; dates."""

from __future__ import annotations

import datetime
import gzip
import itertools
import re

import pytest

pytest.importorskip("tokenizers", reason="needs the extra [train]")

from fastrnn.text import TranslateConfig, UserError
from fastrnn.text.data.dates import MONTHS, date_pairs, expressions, ordinal
from fastrnn.text.data.pairs import load_pairs
from fastrnn.text.data.series import load_series


def test_parallel_files(tmp_path):
    for split, n in (("train", 4), ("val", 2), ("test_2016_flickr", 3)):
        for language in ("de", "en"):
            text = "".join(f"{split} {language} {i}\n" for i in range(n))
            if split == "val":
                (tmp_path / f"{split}.{language}").write_text(text)
            else:
                (tmp_path / f"{split}.{language}.gz").write_bytes(gzip.compress(text.encode()))
    _, splits = load_pairs(TranslateConfig(source="de", target="en"), str(tmp_path))
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 4, "valid": 2, "test": 3}
    assert splits["test"][1] == ("test_2016_flickr de 1", "test_2016_flickr en 1")
    (tmp_path / "val.de").write_text("one\n")
    with pytest.raises(UserError, match=r"val.de has 1 lines, .*val.en 2: parallel files need a line for each line"):
        load_pairs(TranslateConfig(source="de", target="en"), str(tmp_path))
    (tmp_path / "val.de").unlink()
    with pytest.raises(UserError, match="the valid split has no file in de"):
        load_pairs(TranslateConfig(source="de", target="en"), str(tmp_path))
    with pytest.raises(UserError, match=r"no files named like train.fr and train.it"):
        load_pairs(TranslateConfig(source="fr", target="it"), str(tmp_path))


def test_a_folder_of_test_data_alone_is_not_trained_on(tmp_path):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "test.tsv").write_text("a\tb\n" * 9)
    with pytest.raises(UserError, match="no training pairs, only test"):
        load_pairs(TranslateConfig(), str(tmp_path / "pairs"))
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "Gun_TEST.tsv").write_text("1\t2\n2\t3\n")
    with pytest.raises(UserError, match="there is test, but no training split"):
        load_series(str(tmp_path / "series"))


def test_no_target_is_in_two_splits(tmp_path):
    (tmp_path / "a.tsv").write_text("".join(f"{'En' if i % 2 else 'en'} {i % 37}\tzh {i}\tCC\n" for i in range(300)))
    config = TranslateConfig(source_column=2, target_column=1, held_out=0.2)
    _, splits = load_pairs(config, str(tmp_path / "a.tsv"))
    targets = {split: {t.lower() for _, t in pairs} for split, pairs in splits.items()}
    for a, b in itertools.combinations(targets.values(), 2):
        assert not a & b
    assert sum(map(len, splits.values())) == 300
    assert all(s.startswith("zh") for pairs in splits.values() for s, _ in pairs)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("a\tb\nc\n", {}, "line 2 has no tab-separated column 2"),
        ("", {}, "the train split has no pairs"),
        ("a\tb\nc\tb\n", {}, r"a\.tsv: 2 pairs are too few to hold some out"),
        ("a\tb\n", {"source": "de", "target": "en"}, "need a folder of parallel files"),
    ],
)
def test_bad_pairs(tmp_path, content, options, message):
    (tmp_path / "a.tsv").write_text(content)
    with pytest.raises(UserError, match=message):
        load_pairs(TranslateConfig(**options), str(tmp_path / "a.tsv"))


def test_dates_are_right_and_the_same_every_time():
    pairs = date_pairs(500)
    assert pairs == date_pairs(500)
    for written, iso in pairs:
        date = datetime.date.fromisoformat(iso)
        assert written in expressions(date)
        assert str(date.year) in written
        numbers = [int(n) for n in re.findall(r"\d+", written)]
        named = any(month[:3].lower() in written.lower() for month in MONTHS)
        assert sorted(numbers) == sorted([date.year, date.day] if named else [date.year, date.month, date.day])
    assert [ordinal(d) for d in (1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 31)] == (
        ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "23rd", "31st"]
    )
