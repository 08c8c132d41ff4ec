"""Data sets of the Hugging Face hub, read by its library `datasets` (extra [hub]), which keeps what it has fetched."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import split_of

HUB = "hf:"


def on_hub(data: str | None) -> bool:
    return data is not None and data.startswith(HUB)


def hub_splits(data: str) -> dict[str, Any]:
    """The rows of `data`, "hf:NAME" or "hf:NAME:CONFIG", by split: a datasets.Dataset each.

    NAME may also be a folder that datasets has saved (save_to_disk). Splits that are named otherwise than train,
    validation or test, such as IMDB's "unsupervised", are left out. Raises UserError for what cannot be had.
    """
    try:
        import datasets
        from datasets import concatenate_datasets, load_dataset, load_from_disk
    except ImportError:
        raise UserError(f"--data {data} needs datasets: pip install 'fastrnn[hub]'") from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    name, _, config = data.removeprefix(HUB).partition(":")
    saved = any((Path(name) / file).exists() for file in ("dataset_dict.json", "state.json"))
    try:
        found = load_from_disk(name) if saved else load_dataset(name, config or None)
    except Exception as error:  # of the network, the hub, the files, and of names that are none
        raise UserError(
            f"{data}: cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())}): check the name "
            "(hf:NAME or hf:NAME:CONFIG) and the network; offline there are those data sets that were loaded before, "
            "and folders written by datasets' save_to_disk"
        ) from None
    if isinstance(found, datasets.Dataset):
        return {"train": found}
    parts: dict[str, list[Any]] = {}
    for own, rows in found.items():
        split = "train" if len(found) == 1 else split_of(Path(own))
        if split is not None:
            parts.setdefault(split, []).append(rows)
    if not parts:
        raise UserError(f"{data}: no split named train, validation or test; there are: {', '.join(found)}")
    return {split: concatenate_datasets(rows) if len(rows) > 1 else rows[0] for split, rows in parts.items()}


def hub_column(data: str, rows: Any, name: str) -> list[str]:
    """A column of texts; of a ClassLabel the names of its classes, and "" where there is none (-1 or None)."""
    feature = rows.features[name]
    names = getattr(feature, "names", None)
    values = list(rows[name])
    if names is not None:
        return ["" if value is None or value < 0 else names[value] for value in values]
    if any(isinstance(value, (dict, list)) for value in values[:1]):
        raise UserError(f"{data}: the column '{name}' holds neither texts nor numbers but {feature}")
    return ["" if value is None else str(value) for value in values]
