"""Reading text: a file, a folder, or the English text that every CPython carries; and its split for training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..errors import UserError
from .files import ARCHIVES, archive_files, decode_text, read_text, split_of
from .hub import hub_column, hub_splits, on_hub
from .records import TEXT_COLUMNS, find_column


@dataclasses.dataclass
class Corpus:
    """Text by split. `test` is None where the data has no test file."""

    name: str
    train: str
    valid: str
    test: str | None = None


def load_corpus(data: str | None, valid_share: float = 0.1, column: str | None = None) -> Corpus:
    """The corpus at `data`: a text file (`.gz` too), folder or tar archive, the texts in `column` of a hub data set
    (hf:NAME), or None for Python's language reference.

    Files named *train*, *valid* and *test* are its splits, or .txt files in folders named so; where nothing is named
    so, all files are read in the order of their names. Without a validation file, the last `valid_share` of the text,
    from a line's start on, is validation. Raises UserError for missing, empty, unreadable or non-UTF-8 input.
    """
    if data is None:
        return Corpus("Python's language reference (pydoc_data.topics)", *cut(builtin_text(), valid_share))
    texts = hub_texts(data, column) if on_hub(data) else read_texts(existing(data))
    for split, text in texts.items():
        if not text.strip():
            raise UserError(f"{data}: the {split} text is empty")
    if "train" not in texts:
        raise UserError(f"{data}: there is a file named *{sorted(texts)[0]}* but none named *train*")
    if "valid" not in texts:
        texts["train"], texts["valid"] = cut(texts["train"], valid_share)
    return Corpus(data, texts["train"], texts["valid"], texts.get("test"))


def load_text(data: str, split: str | None = None, column: str | None = None) -> str:
    """The text to evaluate on: a file as it is; of a folder or hub data set the named split, else its test, valid or
    only text.

    Raises UserError as `load_corpus` does, and for a split that the folder lacks.
    """
    path = Path(data)
    if on_hub(data) or existing(data).is_dir() or path.name.endswith(ARCHIVES):
        texts = hub_texts(data, column) if on_hub(data) else read_texts(path)
        names = [split] if split else ["test", "valid", "train"]
        found = [texts[name] for name in names if name in texts]
        if not found:
            raise UserError(f"{data}: no split {split}; there are: {', '.join(sorted(texts))}")
        text = found[0]
    elif split:
        raise UserError(f"--split {split} needs a folder, and {data} is a file")
    else:
        text = read_text(path)
    if not text.strip():
        raise UserError(f"{data}: the text is empty")
    return text


def builtin_text() -> str:
    """The text of Python's help topics, about 460 kB of English about Python."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name].strip() for name in sorted(topics.topics)) + "\n"


def cut(text: str, share: float) -> tuple[str, str]:
    """`text` without its last `share`, and that share, cut after a line where there are lines."""
    at = int(len(text) * (1 - share))
    line_end = text.find("\n", at, len(text) - 1)
    at = at if line_end < 0 else line_end + 1
    return text[:at], text[at:]


def existing(data: str) -> Path:
    if not Path(data).exists():
        raise UserError(f"{data}: no such file or folder")
    return Path(data)


def text_files(data: str) -> list[Path]:
    """The file at `data`, or the files of that folder in the order of their names; none that begins with a dot."""
    if on_hub(data):
        raise UserError(f"{data}: token files are made of files; train lm --data {data} reads the hub itself")
    path = existing(data)
    if path.is_file():
        return [path]
    below = ((p, p.relative_to(path).parts) for p in path.rglob("*") if p.is_file())
    files = sorted(p for p, parts in below if not any(part.startswith(".") for part in parts))
    if not files:
        raise UserError(f"{data}: the folder holds no file")
    return files


def read_texts(path: Path) -> dict[str, str]:
    """The text of a file, or by split that of a folder's or archive's files."""
    if path.name.endswith(ARCHIVES):
        parts: dict[str, list[str]] = {}
        for name, content in archive_files(path):
            if name.suffix == ".txt":
                split = split_of(Path(name)) or folder_split(Path(name)) or "train"
                parts.setdefault(split, []).append(decode_text(content(), f"{path}/{name}"))
        if not parts:
            raise UserError(f"{path}: the archive holds no .txt file")
        return {split: "\n".join(texts) for split, texts in parts.items()}
    return read_folder(path) if path.is_dir() else {"train": read_text(path)}


def read_folder(folder: Path) -> dict[str, str]:
    """The text of a folder's files by split; everything is `train` where no name tells a split."""
    files = text_files(str(folder))
    named = [(path, split) for path in files if (split := split_of(path))]
    below = [(p, s) for p in files if p.suffix == ".txt" and (s := folder_split(p.relative_to(folder)))]
    parts: dict[str, list[str]] = {}
    for path, split in named or below or [(path, "train") for path in files]:
        parts.setdefault(split, []).append(read_text(path))
    return {split: "\n".join(texts) for split, texts in parts.items()}


def folder_split(path: Path) -> str | None:
    """The split that the name of one of a file's folders tells."""
    return next((split for parent in path.parents if (split := split_of(parent))), None)


def hub_texts(data: str, column: str | None) -> dict[str, str]:
    """The text of each split of a hub data set: its rows, each from a new line on."""
    texts = {}
    for split, rows in hub_splits(data).items():
        column = find_column(data, rows.column_names, column, TEXT_COLUMNS, "--text-column")
        texts[split] = "\n".join(row.removesuffix("\n") for row in hub_column(data, rows, column)) + "\n"
    return texts
