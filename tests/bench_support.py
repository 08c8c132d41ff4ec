"""A library in the place of fastrnn, and tiny cases, for the tests of the benchmark suite."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastrnn.bench import measuring, page, roofline, run, shapes
from fastrnn.bench.grids import Job


class OtherLibrary(SimpleNamespace):
    """torch.nn under fastrnn's interface: `lengths=`, dtype, a backend context; optionally wrong by `error`."""

    def __init__(self, error=0.0):
        super().__init__(__name__="other")

        def layer(base):
            class Layer(base):
                def forward(self, x, hx=None, *, lengths=None):
                    if lengths is None:
                        y, states = super().forward(x, hx)
                    else:
                        y, states = super().forward(pack_padded_sequence(x, lengths, enforce_sorted=False))
                        y = pad_packed_sequence(y)[0]
                    return (y if not isinstance(y, torch.Tensor) else y * (1.0 + error)), states

            return Layer

        for cell in shapes.CELLS:
            setattr(self, cell, layer(getattr(nn, cell)))
        self.LSTMCell = nn.LSTMCell
        self.requested = []

    def backend(self, name):
        self.requested.append(name)
        self.chosen = name
        return contextlib.nullcontext()

    def explain(self, module, *arguments, **keywords):
        return SimpleNamespace(backend=SimpleNamespace(name=self.chosen))


TINY = [shapes.tiny(c) for c in shapes.CASES if c.name.startswith(("T1-B1-H128", "cell", "step", "packed", "lengths"))]
TINY.append(shapes.tiny(shapes.CASES[14]))
STEP = shapes.Case("T1-B1-H128", 1, 1, 5, 7)
COMBINATIONS = [
    pytest.param(case, cell, mode, id=f"{case.name}-{cell}-{mode}")
    for case in TINY
    for cell in case.cells
    for mode in case.modes
]


def job(case, cell="GRU", mode="inference", what="timing"):
    return Job(what, case, cell, mode, "float32", "cpu", 1)


def options(library, **changes):
    return measuring.Options(**{"library": library, "sample": 0.0, "rounds": 2, **changes})


def stand_in(monkeypatch):
    """`fastrnn bench` with a library in the place of fastrnn, and two tiny cases for a grid."""

    def install(error=0.0, cases=(TINY[0], TINY[-1])):
        library = OtherLibrary(error)
        monkeypatch.setattr(run, "import_module", lambda name: library)
        monkeypatch.setattr(run, "cases", lambda grid, *sizes: tuple(cases))
        monkeypatch.setattr(roofline, "cpu", lambda dtype: roofline.Machine(1e12, lambda size: 1e12, 1e12))
        monkeypatch.setattr(page, "write_all", lambda *_: [])
        return library

    return install


# Stand-ins for the library are known to this process alone, whose memory the other tests need.
QUICK = [
    "--no-apart",
    "--malloc",
    "system",
    "--threads",
    "1",
    "--sample",
    "0",
    "--rounds",
    "2",
    "--peers",
    "none",
    "--budget",
    "0",
]
SAVED = [*QUICK, "--parts", "timing", "--cells", "GRU", "--modes", "inference"]


def record(case, ratio, spread=0.01, **more):
    times = {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    ratios = {"p20": ratio * (1 - spread), "p50": ratio, "p80": ratio * (1 + spread)}
    key = {"kind": "measurement", "case": case, "cell": "GRU", "mode": "training", "threads": 1}
    same = {
        "rounds": 5,
        "baseline": times,
        "subject": {q: t / ratio for q, t in times.items()},
        "gemm": None,
        "chosen": "cpu",
        "flops": 1.0,
    }
    return {**key, **same, "ratio": ratios, **more}


def passes(case, *ratios, **more):
    """A record for each pass."""
    return [record(case, ratio, **{"pass": number}, **more) for number, ratio in enumerate(ratios)]


def write(path, records, **changes):
    facts = {"kind": "environment", "cpu": "Abacus", "flags": [], "cores": 1, "load": 0.0, "malloc": "keep"}
    facts |= dict.fromkeys(("torch", "fastrnn", "commit", "python", "date", "command", "info"), "")
    facts |= {"subject": "fastrnn", "variables": {}, "apart": True, **changes}
    path.write_text("".join(json.dumps(r) + "\n" for r in (facts, *records)))
    return str(path)
