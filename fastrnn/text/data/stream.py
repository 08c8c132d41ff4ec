"""A long token stream as batches for truncated back-propagation through time.

a b c d e f g h i j k l m      N = 13 tokens, 12 targets, batch_size 3: three columns of 4 steps

input  a e i    target  b f j
       b f j            c g k     cut into windows of `bptt` steps, in order: column b of one window goes on
       c g k            d h l     where column b of the window before it stopped, so the state carries over
       d h l            e i m
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import UserError

IGNORE = -100  # the target of padding; torch's cross_entropy skips it


def batchify(ids: torch.Tensor, batch_size: int, pad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, each (steps, batch_size) int64, of the stream `ids` (N,).

    With `pad`, every one of the N - 1 targets occurs once and the rest of the last column has target IGNORE (for
    evaluation: the figure then covers all the text); without, up to batch_size - 1 tokens at the end are left out.
    """
    inputs, targets = ids[:-1], ids[1:]
    steps = -(-len(inputs) // batch_size) if pad else len(inputs) // batch_size
    size = steps * batch_size
    if pad:
        fill = size - len(inputs)
        inputs = torch.cat([inputs, inputs.new_zeros(fill)])
        targets = torch.cat([targets, targets.new_full((fill,), IGNORE)])
    shape = (batch_size, steps)
    return inputs[:size].reshape(shape).t().contiguous(), targets[:size].reshape(shape).t().contiguous()


class BpttLoader:
    """Iterates the windows of a stream in order: pairs (input, target), each (T <= bptt, batch_size) int64.

    It remembers how many windows it gave in this pass, and `state_dict` / `load_state_dict` (which Lightning saves
    and restores) continue a pass at that window.
    """

    def __init__(self, ids: torch.Tensor, batch_size: int, bptt: int, pad: bool = False) -> None:
        self.inputs, self.targets = batchify(ids, batch_size, pad)
        self.batch_size, self.bptt = batch_size, bptt
        self.position = 0
        if len(self.inputs) == 0:
            raise UserError(
                f"the text has {len(ids)} tokens, too few for one step of {batch_size} columns: "
                f"give more text or a smaller --batch-size"
            )

    def __len__(self) -> int:
        return (len(self.inputs) + self.bptt - 1) // self.bptt

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for window in range(self.position % len(self), len(self)):
            rows = slice(window * self.bptt, (window + 1) * self.bptt)
            self.position = window + 1
            yield self.inputs[rows], self.targets[rows]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
