"""What the project promises on a CPU, as data, and how a run is held against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastrnn.bench.measure import geomean
from fastrnn.bench.shapes import CASES, CELLS, MODES, Case

NOISE = 0.95  # a ratio from here to 1 is equality within noise
Record = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """torch.nn / fastrnn over a group of measurements: each of them, or their geometric mean, at least this."""

    text: str
    cells: tuple[str, ...]
    modes: tuple[str, ...]
    member: Callable[[Case], bool]
    at_least: float
    mean: bool = False
    noise: float | None = None

    def group(self) -> list[tuple[str, str, str]]:
        """(case, cell, mode) of every measurement that it is about."""
        return [
            (case.name, cell, mode)
            for case in CASES
            if self.member(case)
            for cell in self.cells
            if cell in case.cells
            for mode in self.modes
            if mode in case.modes
        ]


def _named(*names: str) -> Callable[[Case], bool]:
    return lambda case: case.name in names


def _everything(case: Case) -> bool:
    return True


def _listed(case: Case) -> bool:
    return case.listed


def _large_batch(case: Case) -> bool:
    return case.B >= 16 and case.form == "dense"


def _ragged(case: Case) -> bool:
    return bool(case.lengths)


_T100 = ("T100-B1-H128", "T100-B1-H256", "T100-B1-H512")
_LSTM, _GRU, _RNN = (("LSTM",), ("GRU",), ("RNN",))
_INFERENCE, _TRAINING = (("inference",), ("training",))

TARGETS: tuple[Target, ...] = (
    Target("every cell, shape and mode", CELLS, MODES, _everything, 1.0, noise=NOISE),
    Target("LSTM T=1 B=1 H=128 inference, against nn.LSTM", _LSTM, _INFERENCE, _named("T1-B1-H128"), 4.0),
    Target("LSTM T=1 B=1 H=512 inference, against nn.LSTM", _LSTM, _INFERENCE, _named("T1-B1-H512"), 15.0),
    *(
        Target(
            f"{what} T=1 B=1 H={H} inference, against nn.LSTMCell", _LSTM, _INFERENCE, _named(f"{form}-T1-B1-H{H}"), 1.2
        )
        for what, form in (("LSTM", "step"), ("LSTMCell", "cell"))
        for H in (128, 512)
        for name in [f"{form}-T1-B1-H{H}"]
    ),
    *(
        Target(f"LSTM T=100 B=1 H={name.rpartition('H')[2]} {mode}", _LSTM, (mode,), _named(name), value)
        for mode, values in (("inference", (1.3, 1.4, 1.5)), ("training", (1.3, 1.4, 1.6)))
        for name, value in zip(_T100, values, strict=True)
    ),
    Target("GRU T=100 B=1 training, each", _GRU, _TRAINING, _named(*_T100), 4.0),
    Target("RNN T=100 B=1 training, each", _RNN, _TRAINING, _named(*_T100), 2.0),
    Target("GRU B>=16 inference, each", _GRU, _INFERENCE, _large_batch, 1.1),
    Target("GRU B>=16 inference, geometric mean", _GRU, _INFERENCE, _large_batch, 1.3, mean=True),
    Target("GRU B>=16 training, each", _GRU, _TRAINING, _large_batch, 1.1),
    Target("GRU B>=16 training, geometric mean", _GRU, _TRAINING, _large_batch, 1.5, mean=True),
    Target("LSTM packed or lengths, training, each", _LSTM, _TRAINING, _ragged, 8.0),
    Target("GRU packed or lengths, training, each", _GRU, _TRAINING, _ragged, 4.0),
    *(Target(f"{cell} packed or lengths, inference, each", (cell,), _INFERENCE, _ragged, 2.0) for cell in CELLS),
    Target("all shapes, cells and modes, geometric mean", CELLS, MODES, _listed, 2.0, mean=True),
)


@dataclass(frozen=True)
class Verdict:
    """What a run reached of a target."""

    target: Target
    threads: int
    measured: int
    of: int
    value: float | None
    where: str  # the measurement with the smallest ratio, when the target is about each of them

    @property
    def status(self) -> str:
        if self.value is None:
            return "not measured"
        part = f" on {self.measured} of {self.of}" if self.measured < self.of else ""
        if self.value >= self.target.at_least:
            return ("met" if not part else "met so far") + part
        if self.target.noise is not None and self.value >= self.target.noise:
            return "met within noise" + part
        return "MISSED" + part


def judge(target: Target, records: list[Record], threads: int) -> Verdict:
    """Hold the measurements made with `threads` against `target`."""
    ratios = {(r["case"], r["cell"], r["mode"]): r["ratio"]["p50"] for r in single(measurements(records, threads))}
    group = target.group()
    found = [(ratios[key], key) for key in group if key in ratios]
    if not found:
        return Verdict(target, threads, 0, len(group), None, "")
    if target.mean:
        return Verdict(target, threads, len(found), len(group), geomean([r for r, _ in found]), "")
    value, key = min(found)
    where = " ".join(key) if len(group) > 1 else ""
    return Verdict(target, threads, len(found), len(group), value, where)


def single(records: list[Record]) -> list[Record]:
    """Those in fp32, which the targets and the README's table are about."""
    return [r for r in records if r.get("dtype", "float32") == "float32"]


def measurements(records: list[Record], threads: int | None = None) -> list[Record]:
    """The timings among `records`, those with `threads` only when it is given."""
    return [r for r in records if r["kind"] == "measurement" and threads in (None, r["threads"])]
