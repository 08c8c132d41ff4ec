"""Token files for a text larger than memory: tokenized once, in parallel, then read where the training is.

A prepared folder holds train.bin, valid.bin (and test.bin), ids of 16 or 32 bits; tokenizer.json; meta.json.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import multiprocessing
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .corpus import text_files
from .files import ARCHIVES, decode_text, split_of
from .segment import Segmenter
from .tokens import Vocabulary

BLOCK = 1 << 22  # bytes of text that one worker tokenizes at a time
META, TOKENIZER, FORMAT = "meta.json", "tokenizer.json", 1


@dataclasses.dataclass
class Prepared:
    """A prepared folder: memory-mapped ids by split, the number of characters they were, and the tokenizer."""

    name: str
    ids: dict[str, Any]
    chars: dict[str, int]
    vocabulary: Vocabulary
    mark: str


def is_prepared(data: str | None) -> bool:
    return data is not None and (Path(data) / META).exists()


def load_prepared(data: str) -> Prepared:
    """Opens a folder that `prepare` made; raises UserError where it is not whole."""
    folder = Path(data)
    try:
        meta = json.loads((folder / META).read_text())
        vocabulary = Vocabulary.from_state(json.loads((folder / TOKENIZER).read_text()))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: not a folder of fastrnn prepare ({error}): prepare it again") from None
    if meta.get("format") != FORMAT:
        raise UserError(f"{folder}: prepared by another version of fastrnn: prepare it again")
    ids = {}
    for split, facts in meta["splits"].items():
        path = folder / f"{split}.bin"
        expected = facts["tokens"] * np.dtype(meta["dtype"]).itemsize
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise UserError(f"{path}: {found} bytes, not the {expected} that {META} tells: prepare it again")
        ids[split] = np.memmap(path, dtype=meta["dtype"], mode="r")
    facts = meta["splits"]["train"]
    mark = f"{facts['tokens']} tokens, crc32 {facts['crc32']:08x}"
    return Prepared(data, ids, {split: f["chars"] for split, f in meta["splits"].items()}, vocabulary, mark)


def prepare(
    data: str, out: str, level: str = "bpe", vocab_size: int | None = None, segmenter: Segmenter | None = None,
    workers: int = 1, valid_share: float = 0.1, progress: bool = False, echo: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Tokenizes the text at `data` (a file or folder, as for training) into the new folder `out`.

    The vocabulary is that of the training files. Without a validation file, about the last `valid_share` of the text
    is validation. The folder appears when it is whole. Raises UserError for bad data and an `out` that exists.
    """
    folder, part = Path(out), Path(out).with_name(f".{Path(out).name}.part")
    if folder.exists():
        raise UserError(f"{out} exists: name another --out")
    sources = split_sources(data)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        vocabulary = build_vocabulary(sources, level, vocab_size, segmenter, workers, valid_share, progress)
        dtype = "uint16" if len(vocabulary) <= 1 << 16 else "uint32"
        facts = tokenize(sources, vocabulary, part, dtype, workers, valid_share, progress)
        (part / TOKENIZER).write_text(json.dumps(vocabulary.state()))
        (part / META).write_text(json.dumps({"format": FORMAT, "source": data, "dtype": dtype, "splits": facts}))
        part.rename(folder)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for split, fact in facts.items():
        echo(f"{split}: {fact['tokens']:,} tokens of {fact['chars']:,} characters")
    echo(f"{len(vocabulary):,} different tokens ({level} level) in {folder}; train with --data {folder}")
    return folder


def split_sources(data: str) -> list[tuple[str, Path]]:
    """(split, file) in order; "" is text of which the end is to become validation."""
    files = text_files(data)
    for path in files:
        if path.name.endswith(ARCHIVES):
            raise UserError(f"{path}: token files are made of texts, not of archives: unpack it, and give the folder")
    named = [(split, path) for path in files if (split := split_of(path))]
    if not named:
        return [("", path) for path in files]
    splits = {split for split, _ in named}
    if "train" not in splits:
        raise UserError(f"{data}: there is a file named *{min(splits)}* but none named *train*")
    return [("" if split == "train" and "valid" not in splits else split, path) for split, path in named]


def blocks(sources: list[tuple[str, Path]], valid_share: float) -> Iterator[tuple[str, str]]:
    """(split, text) of about BLOCK bytes each, cut at the ends of lines, never a whole file in memory."""
    total = sum(path.stat().st_size for split, path in sources if split == "")
    seen = 0
    for split, path in sources:
        before, size = seen, path.stat().st_size
        for text, at in file_blocks(path):
            late = split == "" and before + at > (1 - valid_share) * total
            yield split or ("valid" if late else "train"), text
        seen += size if split == "" else 0


def file_blocks(path: Path) -> Iterator[tuple[str, int]]:
    """Text of whole lines, and where in the file (packed, for .gz) its reading had come to."""
    # A block is small enough that the last tenth of a small file is still one of its own.
    block = min(BLOCK, max(path.stat().st_size // 50, 1 << 10))
    try:
        with open(path, "rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            rest, start = b"", 0
            while chunk := file.read(block):
                cut = chunk.rfind(b"\n") + 1
                if cut == 0:
                    rest += chunk
                    continue
                yield decode_text(rest + chunk[:cut], str(path), start), raw.tell()
                start += len(rest) + cut
                rest = chunk[cut:]
            if rest:
                yield decode_text(rest, str(path), start), raw.tell()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def build_vocabulary(
    sources: list[tuple[str, Path]], level: str, size: int | None, segmenter: Segmenter | None, workers: int,
    valid_share: float, progress: bool,
) -> Vocabulary:  # fmt: skip
    texts = shown(blocks(sources, valid_share), sources, progress, "vocabulary")
    train = (text for split, text in texts if split == "train")
    if level == "bpe":
        return Vocabulary.train(train, size, segmenter)
    counts: Counter[str] = Counter()
    with pool(workers) as run:
        for more in run(count_tokens, zip(train, itertools.repeat((level, segmenter)), strict=False)):
            counts.update(more)
    if not counts:
        raise UserError(f"{sources[0][1]}: the train text is empty")
    return Vocabulary.from_counts(counts, level, size, segmenter)


def count_tokens(job: tuple[str, tuple[str, Segmenter | None]]) -> Counter[str]:
    text, (level, segmenter) = job
    return Vocabulary.count(text, level, segmenter)


def tokenize(
    sources: list[tuple[str, Path]], vocabulary: Vocabulary, folder: Path, dtype: str, workers: int,
    valid_share: float, progress: bool,
) -> dict[str, dict[str, int]]:  # fmt: skip
    """Writes the ids of each split; returns tokens, characters and checksum by split."""
    facts: dict[str, dict[str, int]] = {}
    state = vocabulary.state()
    jobs = shown(blocks(sources, valid_share), sources, progress, "tokens")
    with pool(workers, state) as run:
        for split, chars, ids in run(encode_block, ((split, text, dtype) for split, text in jobs)):
            fact = facts.setdefault(split, {"tokens": 0, "chars": 0, "crc32": 0})
            with open(folder / f"{split}.bin", "ab") as file:
                file.write(ids)
            fact["tokens"] += len(ids) // np.dtype(dtype).itemsize
            fact["chars"] += chars
            fact["crc32"] = zlib.crc32(ids, fact["crc32"])
    if not {"train", "valid"} <= facts.keys():  # a small .gz file is read at once
        raise UserError(f"{sources[0][1]}: too little text to keep some for validation: give a file named *valid*")
    return facts


_vocabulary: Vocabulary | None = None  # of a worker process


def start_worker(state: dict[str, Any] | None) -> None:
    global _vocabulary
    _vocabulary = None if state is None else Vocabulary.from_state(state)


def encode_block(job: tuple[str, str, str]) -> tuple[str, int, bytes]:
    split, text, dtype = job
    assert _vocabulary is not None
    return split, len(text), _vocabulary.encode(text).numpy().astype(dtype).tobytes()


@contextmanager
def pool(workers: int, state: dict[str, Any] | None = None) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` that keeps the order, over `workers` processes, a few jobs ahead of what was taken."""
    if workers <= 1:
        start_worker(state)
        yield map
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, start_worker, (state,)) as processes:

        def run(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
            waiting: list[Any] = []
            for job in jobs:
                waiting.append(processes.submit(function, job))
                if len(waiting) > 2 * workers:
                    yield waiting.pop(0).result()
            for result in waiting:
                yield result.result()

        try:
            yield run
        except BrokenProcessPool:
            raise UserError(
                f"one of {workers} worker processes was killed, as where memory is short: fewer --workers (a script "
                "needs `if __name__ == '__main__':` around what starts them)"
            ) from None


def shown(
    texts: Iterable[tuple[str, str]], sources: list[tuple[str, Path]], progress: bool, what: str
) -> Iterator[tuple[str, str]]:
    """`texts`, with a progress bar over the bytes of the sources."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    total = None if any(path.suffix == ".gz" for _, path in sources) else sum(p.stat().st_size for _, p in sources)
    with tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=not progress) as bar:
        for split, text in texts:
            yield split, text
            bar.update(len(text.encode()))
