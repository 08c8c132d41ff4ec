"""Labelled examples on disk: folders and tar archives of one file each, CSV, TSV and JSON lines; and their splits."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UserError
from .docstrings import docstrings
from .files import ARCHIVES, archive_files, decode_text, folder_files, read_bytes, split_of
from .hub import hub_column, hub_splits, on_hub

TABLES = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": ""}
TEXT_COLUMNS = ("text", "sentence", "review", "content", "document", "comment", "message", "title", "description")
LABEL_COLUMNS = ("label", "labels", "class", "category", "sentiment", "target", "rating", "stars", "score", "intent")
UNLABELLED = "unsup"  # IMDB's folder of reviews without a label


@dataclasses.dataclass
class Example:
    """`content` is text, or what `read` of `read_examples` made of a file; `label` is as written."""

    content: Any
    label: str


Splits = dict[str, list[Example]]
Read = Callable[[bytes, str], Any]  # of a file's bytes, and the name for error messages


def load_examples(
    data: str | None, text_column: str | None = None, label_column: str | None = None, valid_share: float = 0.1
) -> tuple[str, Splits]:
    """The name of the data, and examples by split: "train" and "valid", and "test" where the data has one.

    `data` is a table (.csv, .tsv, .jsonl, also .gz), a folder of tables named *train*, *valid*, *test*, or a folder
    or tar archive of SPLIT/LABEL/FILE (or LABEL/FILE), or a data set of the hub (hf:NAME). Without a validation split,
    `valid_share` of the training examples is held out, chosen by their content, so that equal texts are never in both.
    Raises UserError for what is missing, empty, not UTF-8 or without labels.
    """
    name, splits = read_examples(data, text_column, label_column)
    if data is None:
        hold_out(name, splits, "test", valid_share)
    return name, complete(name, splits, valid_share)


def read_examples(
    data: str | None, text_column: str | None = None, label_column: str | None = None,
    read: Read | None = None, suffixes: tuple[str, ...] = (".txt",),
) -> tuple[str, Splits]:  # fmt: skip
    """As `load_examples`, by the splits that the data itself has; what names none is "train"."""
    if data is None:
        name = "docstrings of Python's standard library, by package"
        splits: Splits = {"train": [Example(text, label) for text, label in docstrings()]}
    elif on_hub(data):
        name, splits = data, hub_examples(data, text_column, label_column)
    else:
        path, name, read = Path(data), data, read or decode_text
        if not path.exists():
            raise UserError(f"{data}: no such file or folder")
        if path.name.endswith(ARCHIVES):
            splits = by_folder(data, archive_files(path), read, suffixes)
        elif path.is_dir():
            tables = sorted(p for p in path.iterdir() if table_kind(p))
            files = folder_files(path)
            splits = read_tables(tables, text_column, label_column) if tables else by_folder(
                data, files, read, suffixes
            )  # fmt: skip
        elif table_kind(path):
            splits = {"train": read_table(path, text_column, label_column)}
        else:
            known = ", ".join([*TABLES, *ARCHIVES])
            raise UserError(f"{data}: neither a folder nor one of {known}")
    check(name, splits)
    return name, splits


def check(name: str, splits: Splits) -> None:
    for split, examples in splits.items():
        if not examples:
            raise UserError(f"{name}: the {split} split is empty")


def complete(name: str, splits: Splits, valid_share: float) -> Splits:
    """`splits` for training: with "train", which there must be, and with "valid", held out if need be."""
    if "train" not in splits:
        raise UserError(f"{name}: there is {', '.join(sorted(splits)) or 'nothing'}, but no training split")
    if "valid" not in splits:
        hold_out(name, splits, "valid", valid_share)
    return splits


def hold_out(data: str, splits: Splits, name: str, share: float) -> None:
    """Moves about `share` of the training examples into the split `name`: those whose content hashes lowest."""
    examples = splits["train"]
    hashes = [zlib.crc32(repr(e.content).encode()) for e in examples]
    limit = sorted(hashes)[max(int(len(hashes) * share) - 1, 0)]
    splits[name] = [e for e, h in zip(examples, hashes, strict=True) if h <= limit]
    splits["train"] = [e for e, h in zip(examples, hashes, strict=True) if h > limit]
    if not splits["train"]:
        raise UserError(
            f"{data}: {len(examples)} training examples, {len(set(hashes))} of them different, are too few to hold "
            f"some out for {name}: give a {name} split"
        )


# --- folders and archives -----------------------------------------------------------------------------------------


def by_folder(
    name: str, files: Iterable[tuple[PurePosixPath, Callable[[], bytes]]], read: Read, suffixes: tuple[str, ...]
) -> Splits:
    """Examples from SPLIT/LABEL/FILE below any folder; all is "train" where no folder is named like a split."""
    splits: Splits = {}
    for path, content in files:
        parts = path.parts
        if path.suffix not in suffixes or len(parts) < 2 or parts[-2] == UNLABELLED or parts[-1].startswith("."):
            continue
        split = split_of(Path(parts[-3])) if len(parts) > 2 else None
        splits.setdefault(split or "train", []).append(Example(read(content(), f"{name}/{path}"), parts[-2]))
    if not splits:
        raise UserError(f"{name}: no files SPLIT/LABEL/*{suffixes[0]}, and no table ({', '.join(TABLES)}) either")
    return splits


# --- tables -------------------------------------------------------------------------------------------------------


def table_kind(path: Path) -> str:
    """The suffix that tells a table's format, less .gz; empty for anything else."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in TABLES else ""


def read_tables(paths: list[Path], text: str | None, label: str | None) -> Splits:
    """The tables of a folder; a single one may have any name."""
    splits: Splits = {}
    for path in paths:
        split = split_of(path) or ("train" if len(paths) == 1 else None)
        if split is None:
            raise UserError(f"{path}: several tables need names with train, valid and test")
        splits.setdefault(split, []).extend(read_table(path, text, label))
    return splits


def read_table(path: Path, text: str | None, label: str | None) -> list[Example]:
    """The examples of one table; the columns are found by their usual names where none are given."""
    rows = list(table_rows(path))
    if not rows:
        raise UserError(f"{path}: no rows")
    text = find_column(path, rows[0], text, TEXT_COLUMNS, "--text-column")
    label = find_column(path, rows[0], label, LABEL_COLUMNS, "--label-column")
    examples = []
    for number, row in enumerate(rows, 2 if TABLES[table_kind(path)] else 1):
        if row.get(text) is None or row.get(label) is None:
            missing = text if row.get(text) is None else label
            raise UserError(f"{path}: line {number} has no column '{missing}'")
        examples.append(Example(cell(path, number, row, text), cell(path, number, row, label).strip()))
        if not examples[-1].label:
            raise UserError(f"{path}: line {number} has an empty label in column '{label}': leave out such lines")
    return examples


def cell(path: Path, number: int, row: dict[str, Any], name: str) -> str:
    """A column of a row as text; JSON may hold other things than texts and numbers there."""
    if isinstance(row[name], (list, dict)):
        kind = type(row[name]).__name__
        raise UserError(f"{path}: line {number}: column '{name}' holds a {kind}, not a text or number")
    return str(row[name])


def table_rows(path: Path) -> Iterator[dict[str, Any]]:
    content = decode_text(read_bytes(path), str(path))
    csv.field_size_limit(1 << 30)  # its 128 KiB are less than a long text
    delimiter = TABLES[table_kind(path)]
    if delimiter:
        try:
            yield from csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
        except csv.Error as error:
            raise UserError(f"{path}: not a table with {delimiter!r} between columns: {error}") from None
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number} is not a JSON object")
            yield row


def find_column(path: Path | str, row: Iterable[Any], given: str | None, usual: tuple[str, ...], flag: str) -> str:
    names = [name for name in row if name is not None]
    wanted = [given] if given else [name for u in usual for name in names if name.lower() == u]
    found = next((name for name in wanted if name in names), None)
    if found is None:
        what = f"no column '{given}'" if given else f"no column that {flag} could mean"
        raise UserError(f"{path}: {what}; there are: {', '.join(names)}")
    return found


# --- the hub ------------------------------------------------------------------------------------------------------


def hub_examples(data: str, text: str | None, label: str | None) -> Splits:
    """The examples of a hub data set; those without a label, as in test splits of competitions, are left out."""
    splits: Splits = {}
    for split, rows in hub_splits(data).items():
        text = find_column(data, rows.column_names, text, TEXT_COLUMNS, "--text-column")
        label = find_column(data, rows.column_names, label, LABEL_COLUMNS, "--label-column")
        pairs = zip(hub_column(data, rows, text), hub_column(data, rows, label), strict=True)
        examples = [Example(content, name.strip()) for content, name in pairs if name]
        if examples or split == "train":
            splits[split] = examples
    return splits
