"""Data sets of the Hugging Face hub, read by its library `datasets` (extra [hub]), which keeps what it has fetched."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import SPLITS, split_of

HUB = "hf:"
NO_TEXT = ("binary", "large_binary")  # types of a value


def on_hub(data: str | None) -> bool:
    return data is not None and data.startswith(HUB)


def hub_splits(data: str) -> dict[str, Any]:
    """The rows of `data`, "hf:NAME" or "hf:NAME:CONFIG", by split: a datasets.Dataset each.

    NAME may also be a folder that datasets has saved (save_to_disk). Splits of other names than those of `SPLITS`,
    such as IMDB's "unsupervised", are left out. Raises UserError for what cannot be had, and for what could be meant
    in two ways.
    """
    try:
        import datasets
        from datasets import load_dataset, load_from_disk
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
    if len(found) == 1:
        return {"train": next(iter(found.values()))}
    return {split: found[own] for split, own in name_splits(data, list(found)).items()}


def name_splits(data: str, names: list[str]) -> dict[str, str]:
    """Which of a data set's splits is "train", "valid" and "test": those named so, and never two as one.

    A name that only contains the word (validation_matched, train_small) is not taken for the split, nor passed over in
    silence where nothing else is: UserError.
    """
    chosen = {}
    for split in dict.fromkeys(SPLITS.values()):
        own = [name for name in names if SPLITS.get(name.lower()) == split]
        like = own or [name for name in names if split_of(Path(name)) == split]
        if len(own) == 1:
            chosen[split] = own[0]
        elif like:
            wanted = " or ".join(name for name, meant in SPLITS.items() if meant == split)
            raise UserError(
                f"{data}: expected one split named {wanted}, got {', '.join(like)}: keep the one that is meant under "
                "such a name, by datasets' save_to_disk, and give --data hf:FOLDER"
            )
    if not chosen:
        raise UserError(f"{data}: no split named train, validation or test; there are: {', '.join(names)}")
    return chosen


def hub_column(data: str, rows: Any, name: str) -> list[str]:
    """A column of texts; of a ClassLabel the names of its classes, and "" where there is none (-1 or None)."""
    feature = rows.features[name]
    names = getattr(feature, "names", None)
    if names is None and (getattr(feature, "dtype", None) in NO_TEXT or type(feature).__name__ != "Value"):
        raise UserError(f"{data}: the column '{name}' holds neither texts nor numbers but {feature}")
    values = list(rows[name])
    if names is not None:
        return ["" if value is None or value < 0 else names[value] for value in values]
    return ["" if value is None else str(value) for value in values]
