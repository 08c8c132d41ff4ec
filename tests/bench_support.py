"""A library in the place of fastrnn, and tiny cases, for the tests of the benchmark suite."""

import contextlib
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


QUICK = ["--threads", "1", "--sample", "0", "--rounds", "2", "--peers", "none", "--budget", "0"]
SAVED = [*QUICK, "--parts", "timing", "--cells", "GRU", "--modes", "inference"]
