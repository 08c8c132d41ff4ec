"""Real-valued sequences: a .npy or .csv file each, or a table with a label and one sequence in each row (as UCR's)."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .files import ARCHIVES, decode_text, read_bytes, split_of
from .records import Example, Splits, check, complete, read_examples

TABLES = (".csv", ".tsv", ".txt")


def load_series(data: str | None, valid_share: float = 0.1) -> tuple[str, Splits]:
    """As `load_examples`, with a float32 Tensor (T, F) as the content of each example.

    A folder or archive of SPLIT/LABEL/FILE.npy or .csv (rows are steps), or tables of rows LABEL,x1,x2,... where
    empty or NaN values at the end make a row shorter. Raises UserError for what is missing or not numbers.
    """
    name, splits = read_all_series(data)
    return name, complete(name, splits, valid_share)


def read_all_series(data: str | None) -> tuple[str, Splits]:
    """As `load_series`, by the splits that the data itself has; what names none is "train"."""
    if data is None:
        raise UserError("--input series needs --data")
    path = Path(data)
    if path.is_dir():
        tables = sorted(p for p in path.iterdir() if p.suffix in TABLES and split_of(p))
    else:
        tables = [path] if path.exists() and not path.name.endswith(ARCHIVES) else []
    if not tables:
        return read_examples(data, read=read_series, suffixes=(".npy", ".csv"))
    splits: Splits = {}
    for table in tables:
        split = (split_of(table) if path.is_dir() else None) or "train"
        splits.setdefault(split, []).extend(read_rows(table))
    check(data, splits)
    return data, splits


def read_series(raw: bytes, name: str) -> Tensor:
    """(T, F) float32 from the bytes of a .npy or .csv file; (T,) becomes (T, 1)."""
    try:
        if name.endswith(".npy"):
            values = np.load(io.BytesIO(raw), allow_pickle=False)
        else:
            text = decode_text(raw, name)
            values = np.loadtxt(io.StringIO(text), delimiter="," if "," in text else None, ndmin=2)
        values = np.asarray(values, dtype=np.float32)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{name}: not a sequence of numbers: {str(error).splitlines()[0]}") from None
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise UserError(f"{name}: expected finite numbers of shape (steps, features), got shape {values.shape}")
    return torch.from_numpy(values)


def read_rows(path: Path) -> list[Example]:
    examples = []
    text = decode_text(read_bytes(path), str(path))
    delimiter = "\t" if "\t" in text else "," if "," in text else None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        label, *values = [cell.strip() for cell in line.split(delimiter)]
        while values and values[-1].lower() in ("", "nan"):
            values.pop()
        try:
            series = torch.tensor([float(value) for value in values])
        except ValueError as error:
            raise UserError(f"{path}: line {number}: {error}; expected LABEL and numbers") from None
        if not len(series) or not bool(series.isfinite().all()):
            raise UserError(f"{path}: line {number}: expected LABEL and finite numbers")
        examples.append(Example(series[:, None], label))
    return examples
