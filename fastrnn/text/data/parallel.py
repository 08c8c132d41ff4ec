"""Pairs of texts as tensors: a vocabulary for each side, long training pairs dropped or refused."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import TranslateConfig
from ..errors import UserError
from .batches import BucketLoader, pad
from .pairs import Pairs
from .segment import Segmenter
from .stream import IGNORE
from .tokens import Vocabulary


class PairBatch(NamedTuple):
    """`source` (S, B) and `lengths` (B,); `inputs` (T, B), begin and the target, and `targets` (T, B), the target and
    end, IGNORE beyond; `total`, the target tokens of this step over all processes."""

    source: Tensor
    lengths: Tensor
    inputs: Tensor
    targets: Tensor
    total: int


@dataclasses.dataclass
class Sides:
    """The vocabularies of both sides."""

    source: Vocabulary
    target: Vocabulary

    @classmethod
    def build(cls, config: TranslateConfig, train: Pairs) -> Sides:
        c = config
        level = c.level or ("char" if c.data is None else "word")
        made = []
        for side, (its_level, words) in enumerate([(c.source_level, c.source_words), (c.target_level, c.target_words)]):
            its_level = its_level or level
            segmenter = Segmenter(words or c.words, c.lower) if its_level == "word" else Segmenter("blanks", c.lower)
            size = None if its_level == "char" else c.vocab_size
            made.append(Vocabulary.build("\n".join(pair[side] for pair in train), its_level, size, segmenter))
        return cls(*made)

    def state(self) -> dict[str, Any]:
        return {"source": self.source.state(), "target": self.target.state()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Sides:
        return cls(Vocabulary.from_state(state["source"]), Vocabulary.from_state(state["target"]))

    def text(self, ids: list[int]) -> str:
        """The target text of token ids, as people write it."""
        return self.target.segmenter.join(self.target.decode(ids))

    def describe(self) -> str:
        both = [(self.source, "source"), (self.target, "target")]
        return ", ".join(f"{len(v):,} {name} tokens ({v.level} level)" for v, name in both)


@dataclasses.dataclass
class Translations:
    """The pairs of one split as tensors, and how many were dropped for their length."""

    pairs: Pairs
    source: list[Tensor]
    target: list[Tensor]
    dropped: int
    end: int  # ids beyond the target's vocabulary
    begin: int

    def loader(self, config: TranslateConfig, shuffle: bool) -> BucketLoader:
        least = config.world if shuffle else 1
        if shuffle and len(self.pairs) < least:
            raise UserError(f"{len(self.pairs)} training pairs are too few for {least} processes")
        lengths = [len(s) + len(t) for s, t in zip(self.source, self.target, strict=True)]
        return BucketLoader(lengths, config.batch_size, self.collate, shuffle, config.seed, least)

    def collate(self, own: list[int], whole: list[int]) -> PairBatch:
        source, lengths = pad([self.source[i] for i in own])
        begin, end = torch.tensor([self.begin]), torch.tensor([self.end])
        inputs, _ = pad([torch.cat([begin, self.target[i]]) for i in own])
        targets = [torch.cat([self.target[i], end]) for i in own]
        padded = torch.nn.utils.rnn.pad_sequence(targets, padding_value=IGNORE)
        return PairBatch(source, lengths, inputs, padded, sum(len(self.target[i]) + 1 for i in whole))

    def mark(self) -> str:
        """Tells whether two runs see the same pairs."""
        crc = 0
        for x in [*self.source, *self.target]:
            crc = zlib.crc32(x.numpy().tobytes(), crc)
        return f"{len(self.pairs)} pairs, crc32 {crc:08x}"


def encode(sides: Sides, pairs: Pairs, limit: int = 0, too_long: str = "drop", name: str = "") -> Translations:
    """The pairs as ids; those of which a side is longer than `limit` are dropped, or refused with a UserError."""
    source, target = sides.source.encode_all(s for s, _ in pairs), sides.target.encode_all(t for _, t in pairs)
    longest = [max(len(s), len(t)) for s, t in zip(source, target, strict=True)]
    kept = [i for i, length in enumerate(longest) if not limit or length <= limit]
    dropped = len(pairs) - len(kept)
    if dropped and too_long == "refuse":
        first = next(i for i, length in enumerate(longest) if length > limit)
        raise UserError(
            f"{name}: {dropped} pairs are longer than --max-length {limit}, pair {first + 1} with {longest[first]} the "
            "first: --too-long drop, or a larger --max-length"
        )
    if not kept:
        raise UserError(f"{name}: every pair is longer than --max-length {limit}")
    size = len(sides.target)
    found = [pairs[i] for i in kept], [source[i] for i in kept], [target[i] for i in kept]
    return Translations(*found, dropped, size, size + 1)
