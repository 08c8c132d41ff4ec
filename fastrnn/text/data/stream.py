"""A long token stream as batches for truncated back-propagation through time.

a b c d e f g h i j k l m      N = 13 tokens, 12 targets, batch_size 3: three columns of 4 steps

input  a e i    target  b f j
       b f j            c g k     cut into windows of `bptt` steps, in order: column b of one window goes on
       c g k            d h l     where column b of the window before it stopped, so the state carries over
       d h l            e i m

Each of several processes takes its own columns. The stream may be a memory-mapped file: a window reads what it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import distributed
from ..errors import UserError

IGNORE = -100  # the target of padding; torch's cross_entropy skips it


class BpttLoader:
    """Iterates the windows of a stream in order: pairs (input, target), each (T, columns) int64.

    Args:
        ids: the stream (N,), a tensor or an array of integers of any width.
        pad: every one of the N - 1 targets occurs once, and the rest of the last column has target IGNORE (for
            evaluation: the figure then covers all the text); without, up to batch_size - 1 tokens are left out.
        varied: lengths of windows drawn anew in each pass, as by Merity, Keskar, Socher (2017).

    It remembers how many windows it gave in this pass, and `state_dict` / `load_state_dict` (which Lightning saves
    and restores) continue a pass at that window.
    """

    def __init__(
        self, ids: Any, batch_size: int, bptt: int, pad: bool = False, varied: bool = False, seed: int = 0
    ) -> None:
        self.ids: np.ndarray[Any, Any] = ids.numpy() if isinstance(ids, Tensor) else ids
        self.batch_size, self.bptt, self.pad = batch_size, bptt, pad
        self.varied, self.seed = varied, seed
        self.windows_given, self.passes = 0, 0
        targets = max(len(ids) - 1, 0)
        self.steps = -(-targets // batch_size) if pad else targets // batch_size
        if self.steps == 0:
            raise UserError(
                f"the text has {len(ids)} tokens, too few for one step of {batch_size} columns: "
                f"give more text or a smaller --batch-size"
            )

    def __len__(self) -> int:
        return -(-self.steps // self.bptt)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.windows_given >= len(self):
            self.windows_given = 0
            self.passes += 1
        bounds = self.bounds()
        columns = range(self.batch_size)[distributed.share(self.batch_size)]
        for window in range(self.windows_given, len(self)):
            self.windows_given = window + 1
            yield self.window(bounds[window], bounds[window + 1], columns)

    def window(self, start: int, stop: int, columns: range) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the steps start .. stop - 1 of `columns`."""
        rows = np.zeros((len(columns), stop - start + 1), dtype=np.int64)
        given = np.zeros_like(rows, dtype=bool)
        for row, column in enumerate(columns):
            at = column * self.steps
            part = self.ids[at + start : at + stop + 1]
            rows[row, : len(part)] = part
            given[row, : len(part)] = True
        inputs, targets = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])
        if self.pad:
            targets = targets.masked_fill(torch.from_numpy(~given[:, 1:]), IGNORE)
        return inputs.t().contiguous(), targets.t().contiguous()

    def bounds(self) -> list[int]:
        """Where the windows of this pass begin, and where the last one ends."""
        count = len(self)
        if not self.varied:
            return [*range(0, self.steps, self.bptt), self.steps]
        # Normal around bptt, in one of twenty cases around bptt / 2; then stretched, as the number of windows is fixed.
        random = np.random.default_rng([self.seed, self.passes])
        mean = np.where(random.random(count) < 0.95, self.bptt, self.bptt / 2)
        ends = np.maximum(random.normal(mean, 5), min(5, self.bptt)).cumsum()
        inner = np.rint(ends[:-1] * (self.steps / ends[-1])).astype(int).tolist()
        return [0, *inner, self.steps]

    def state_dict(self) -> dict[str, int]:
        return {"windows_given": self.windows_given, "passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.windows_given, self.passes = state["windows_given"], state["passes"]
