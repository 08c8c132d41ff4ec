"""Batches of examples of like length, in an order that seed and pass determine, from which a run can go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import distributed

POOL = 50  # batches within whose examples those of like length are put together


class BucketLoader:
    """Iterates `collate(own, whole)`: the indices of a batch that fall to this process, and all of the batch's.

    Args:
        lengths: of the examples; a batch holds examples of like length, so that little is padded.
        least: a last batch of fewer examples is left out; training needs one for each process.
        shuffle: a new order in each pass, drawn from `seed` and the number of the pass; else sorted by length.

    `state_dict` / `load_state_dict` continue a pass where it was (see BpttLoader).
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, collate: Callable[[list[int], list[int]], Any],
        shuffle: bool = True, seed: int = 0, least: int = 1,
    ) -> None:  # fmt: skip
        self.lengths, self.batch_size, self.collate = list(lengths), batch_size, collate
        self.shuffle, self.seed, self.least = shuffle, seed, least
        self.given, self.passes = 0, 0

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.batch_size)
        return full + (rest >= self.least)

    def __iter__(self) -> Iterator[Any]:
        if self.given >= len(self):
            self.given = 0
            self.passes += 1
        batches = self.order()
        for number in range(self.given, len(self)):
            self.given = number + 1
            batch = batches[number]
            own = batch[distributed.share(len(batch))]
            if own:
                yield self.collate(own, batch)

    def order(self) -> list[list[int]]:
        """The batches of this pass."""
        if not self.shuffle:
            return self.cut(sorted(range(len(self.lengths)), key=lambda i: self.lengths[i]))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.passes)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = POOL * self.batch_size
        pools = [sorted(order[i : i + size], key=lambda i: self.lengths[i]) for i in range(0, len(order), size)]
        batches = self.cut([i for pool in pools for i in pool])
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def cut(self, order: list[int]) -> list[list[int]]:
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return [batch for batch in batches if len(batch) >= self.least]

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given, "passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given, self.passes = state["given"], state["passes"]


def pad(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(T, B, ...) zero-padded at the end, and the lengths (B,) int64."""
    lengths = torch.tensor([len(s) for s in sequences])
    return torch.nn.utils.rnn.pad_sequence(list(sequences)), lengths
