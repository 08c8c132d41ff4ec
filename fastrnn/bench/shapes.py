"""What is measured: the cells, the modes, and the shapes with the work in each of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
CELLS = tuple(GATES)
MODES = ("inference", "training")

# dense     x (T, B, I) to both
# packed    the same PackedSequence to both
# lengths   padded x: `lengths=` of fastrnn against pack_padded_sequence, torch.nn, pad_packed_sequence
# cell      fastrnn.LSTMCell against nn.LSTMCell, states given
# step      fastrnn.LSTM with T = 1 against nn.LSTMCell, states given
Form = Literal["dense", "packed", "lengths", "cell", "step"]


@dataclass(frozen=True)
class Case:
    """One row of the tables: a shape, the form of its input, and where it is measured."""

    name: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    layers: int = 1
    bidirectional: bool = False
    form: Form = "dense"
    lengths: tuple[int, ...] = ()
    cells: tuple[str, ...] = CELLS
    modes: tuple[str, ...] = MODES

    @property
    def listed(self) -> bool:
        """Whether it is one of the shapes over which the overall geometric mean is taken.

        The `lengths=` variant repeats the packed shapes and the single-cell comparisons have another
        peer; counting them would weigh the same shape twice.
        """
        return self.form in ("dense", "packed")

    @property
    def tokens(self) -> int:
        return sum(self.lengths) if self.lengths else self.T * self.B

    def flops(self, cell: str, mode: str) -> float:
        """Floating-point operations of the matrix products of one iteration; backward counts twice forward."""
        directions = 2 if self.bidirectional else 1
        total = 0
        for layer in range(self.layers):
            width = self.I if layer == 0 else directions * self.H
            total += 2 * self.tokens * directions * GATES[cell] * self.H * (width + self.H)
        return float(total * (3 if mode == "training" else 1))


def _dense(T: int, B: int, H: int) -> Case:
    return Case(f"T{T}-B{B}-H{H}", T, B, H, H)


def _ragged(form: Literal["packed", "lengths"], bidirectional: bool) -> Case:
    rng = random.Random(0)
    lengths = tuple(rng.randint(20, 300) for _ in range(32))
    name = f"{form}-B32-I100-H256" + ("-bi" if bidirectional else "")
    return Case(name, max(lengths), 32, 100, 256, bidirectional=bidirectional, form=form, lengths=lengths)


def _single(form: Literal["cell", "step"], H: int) -> Case:
    return Case(f"{form}-T1-B1-H{H}", 1, 1, H, H, form=form, cells=("LSTM",), modes=("inference",))


CASES: tuple[Case, ...] = (
    _dense(1, 1, 128),
    _dense(1, 1, 512),
    *(_single(form, H) for form in ("cell", "step") for H in (128, 512)),
    _dense(100, 1, 128),
    _dense(100, 1, 256),
    _dense(100, 1, 512),
    _dense(35, 20, 200),
    _dense(100, 16, 256),
    _dense(100, 64, 256),
    _dense(50, 64, 512),
    _dense(20, 64, 1024),
    _dense(200, 32, 128),
    _dense(100, 128, 64),
    _dense(400, 8, 300),
    Case("T100-B16-H128-2layers-bi", 100, 16, 128, 128, layers=2, bidirectional=True),
    *(_ragged(form, bi) for form in ("packed", "lengths") for bi in (False, True)),
)


def tiny(case: Case) -> Case:
    """The same form and options at a size that costs nothing: for warm-up and for tests."""
    lengths = (2, 4, 1) if case.lengths else ()
    steps, batch = (1, 1) if case.form in ("cell", "step") else (4, 3)
    return replace(case, T=steps, B=batch, I=5, H=7, lengths=lengths)


def matching(filters: Sequence[str], cases: Sequence[Case] = CASES) -> list[Case]:
    """Those of `cases` whose name contains one of `filters`; all of them when there is none."""
    return [c for c in cases if not filters or any(f in c.name for f in filters)]
