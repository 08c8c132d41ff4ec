"""Pairs of texts on disk: parallel files by language, or tables of two columns; and their splits."""

from __future__ import annotations

import zlib
from pathlib import Path

from ..config import TranslateConfig
from ..errors import UserError
from .dates import date_pairs
from .files import read_text, split_of
from .hub import hub_column, hub_splits, on_hub

Pairs = list[tuple[str, str]]
TABLES = (".tsv", ".tab", ".tsv.gz", ".tab.gz")


def load_pairs(config: TranslateConfig, data: str | None) -> tuple[str, dict[str, Pairs]]:
    """The name of the data, and pairs (source, target) by split, "train", "valid" and "test".

    Where the data has no validation or test pairs, a share of the training pairs is held out by the hash of the
    target, so that no target sentence is in two splits. Raises UserError for what is missing, empty or not parallel.
    """
    name, splits = read_pairs(config, data)
    if "train" not in splits:
        raise UserError(f"{name}: no training pairs, only {', '.join(sorted(splits))}")
    for split in ("valid", "test"):
        if split not in splits:
            hold_out(name, splits, split, config.held_out)
    return name, splits


def read_pairs(config: TranslateConfig, data: str | None) -> tuple[str, dict[str, Pairs]]:
    """The name of the data, and its pairs by split, as they are on disk (a single table is "train")."""
    if data is None:
        name, splits = "dates as people write them, to ISO dates", {"train": date_pairs()}
    elif on_hub(data):
        name, splits = data, hub_pairs(data, config)
    else:
        path, name = Path(data), data
        if not path.exists():
            raise UserError(f"{data}: no such file or folder")
        splits = parallel_files(path, config) if config.source is not None else tables(path, config)
    for split, pairs in splits.items():
        if not pairs:
            raise UserError(f"{name}: the {split} split has no pairs")
    return name, splits


def hold_out(data: str, splits: dict[str, Pairs], name: str, share: float) -> None:
    """Moves about `share` of the training pairs into the split `name`: those whose target hashes lowest, upper
    and lower case alike."""
    hashes = [zlib.crc32(target.lower().encode()) for _, target in splits["train"]]
    limit = sorted(hashes)[max(int(len(hashes) * share) - 1, 0)]
    pairs = list(zip(splits["train"], hashes, strict=True))
    splits[name] = [pair for pair, h in pairs if h <= limit]
    splits["train"] = [pair for pair, h in pairs if h > limit]
    if not splits["train"]:
        raise UserError(f"{data}: {len(hashes)} pairs are too few to hold some out for {name}: give {name} pairs")


def parallel_files(folder: Path, config: TranslateConfig) -> dict[str, Pairs]:
    """Pairs of lines of SPLIT*.SOURCE and SPLIT*.TARGET."""
    if not folder.is_dir():
        raise UserError(f"{folder}: --source and --target need a folder of parallel files")
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        parts = path.name.removesuffix(".gz").rpartition(".")
        split = split_of(Path(parts[0]))
        if parts[2] in (config.source, config.target) and split:
            if parts[2] in found.setdefault(split, {}):
                raise UserError(f"{path} and {found[split][parts[2]]}: two {split} files of one language")
            found[split][parts[2]] = path
    splits = {}
    for split, files in found.items():
        missing = {config.source, config.target} - set(files)
        if missing:
            raise UserError(f"{folder}: the {split} split has no file in {', '.join(map(str, missing))}")
        source, target = (lines(files[str(name)]) for name in (config.source, config.target))
        if len(source) != len(target):
            names = f"{files[str(config.source)]} has {len(source)} lines, {files[str(config.target)]} {len(target)}"
            raise UserError(f"{names}: parallel files need a line for each line")
        splits[split] = [(s, t) for s, t in zip(source, target, strict=True) if s.strip() and t.strip()]
    if not splits:
        raise UserError(f"{folder}: no files named like train.{config.source} and train.{config.target}")
    return splits


def tables(path: Path, config: TranslateConfig) -> dict[str, Pairs]:
    """Pairs of two columns of a table, or of the tables of a folder named *train*, *valid*, *test*."""
    paths = sorted(p for p in path.iterdir() if p.name.endswith(TABLES)) if path.is_dir() else [path]
    if not paths:
        raise UserError(f"{path}: no tables (.tsv); parallel files need --source and --target, their suffixes")
    splits: dict[str, Pairs] = {}
    for table in paths:
        split = (split_of(table) if path.is_dir() else None) or ("train" if len(paths) == 1 else None)
        if split is None:
            raise UserError(f"{table}: several tables need names with train, valid and test")
        splits.setdefault(split, []).extend(read_table(table, config.source_column - 1, config.target_column - 1))
    return splits


def read_table(path: Path, source: int, target: int) -> Pairs:
    pairs = []
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) <= max(source, target):
            missing = max(source, target) + 1
            raise UserError(
                f"{path}: line {number} has no tab-separated column {missing}: see --source-column and --target-column"
            )
        if cells[source].strip() and cells[target].strip():
            pairs.append((cells[source].strip(), cells[target].strip()))
    return pairs


def lines(path: Path) -> list[str]:
    """Lines by \\n alone: other signs that Unicode calls line ends may stand within a sentence."""
    return read_text(path).removesuffix("\n").split("\n")


def hub_pairs(data: str, config: TranslateConfig) -> dict[str, Pairs]:
    """Pairs of the columns --source and --target of a hub data set, or of the languages in its column "translation"."""
    splits = {}
    for split, rows in hub_splits(data).items():
        if "translation" in rows.column_names:
            rows = rows.flatten()
        names = {name.removeprefix("translation."): name for name in rows.column_names}
        wanted = [config.source, config.target]
        if any(name not in names for name in wanted):
            given = "--source and --target name its columns" if None in wanted else f"no columns {' and '.join(wanted)}"  # type: ignore[arg-type]
            raise UserError(f"{data}: {given}; there are: {', '.join(names)}")
        sides = [[one_line(text) for text in hub_column(data, rows, names[str(name)])] for name in wanted]
        splits[split] = [(s, t) for s, t in zip(*sides, strict=True) if s and t]
    return splits


def one_line(text: str) -> str:
    return " ".join(text.split("\n")).strip()
