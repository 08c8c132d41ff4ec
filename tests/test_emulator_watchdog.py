"""K2 on the emulator where a wait is in vain, at any place: NaN, the error flag, an end, and no harm to later calls."""

from __future__ import annotations

import random

import pytest
import torch
from emulator_support import EMULATOR, emulated, needs_emulator, needs_races
from engine_support import Case
from test_emulator_grid import K2
from test_emulator_kernels import BOTH, make

from fastrnn.backends import meeting
from fastrnn.backends.base import GATES
from fastrnn.cells import CELLS

__all__ = ["emulated"]
pytestmark = [needs_emulator, pytest.mark.usefixtures("poisoned")]


def results(backend, call, backward):
    """What one launch puts out: of the forward, or of the backward after a forward that nothing disturbs."""
    with torch.no_grad():
        right = backend.forward(call, GATES)
        if not backward:
            return lambda: (lambda r: (r.y, *r.finals))(backend.forward(call, GATES))
        arguments = (right.saved, right.y, right.y, right.finals, (True,) * 20, False)
        return lambda: (lambda g: (g.dgates, *g.dstates))(backend.backward(call, *arguments))


def raised() -> bool:
    """Has a launch given up? The flag is lowered."""
    flag = meeting.watchdog.flag(torch.device("cpu"))
    found = bool(flag[0])
    flag.zero_()
    return found


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backward", [False, True])
def test_a_wait_in_vain_at_any_place(emulated, cell, backward):
    """One of all the waits of a launch, of any block and exchange, by the schedule's seed: its peer is merely late."""
    backend = emulated("fp32")
    backend.asked = {**K2, "groups": 1, "warps": 1}
    call = make(Case(cell, T=4, B=11, I=3, H=40, lengths=True, reverse=BOTH), "fp32")
    launch = results(backend, call, backward)
    right = launch()
    waits = EMULATOR.stats()["waits"]
    assert waits >= 3 * 3  # of three blocks for each other, more than once
    random_place = random.Random(cell + str(backward))
    for seed in range(8):
        place = random_place.randrange(waits)
        EMULATOR.schedule(seed=seed, in_vain=place)
        spoilt = launch()
        assert any(a.isnan().any() for a in spoilt), (seed, place)
        assert raised(), (seed, place)
        EMULATOR.schedule(seed=seed)
        again = launch()
        assert all(map(torch.equal, again, right)), (seed, place)
        assert not raised()


def test_a_wait_beyond_the_last_one_changes_nothing(emulated):
    backend = emulated("fp32")
    backend.asked = K2
    launch = results(backend, make(Case("gru", T=3, B=3, I=3, H=40), "fp32"), False)
    right = launch()
    EMULATOR.schedule(in_vain=EMULATOR.stats()["waits"])
    assert all(map(torch.equal, launch(), right))
    assert not raised()


@needs_races
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_threads_of_a_block_agree_without_a_race(emulated, cell):
    """Two of three blocks give up at the only exchange of a forward, after which nobody reads what was sent."""
    backend = emulated("fp32")
    backend.asked = K2
    backend.forced = {False: (3, 8)}
    launch = results(backend, make(Case(cell, T=2, B=5, I=3, H=40), "fp32"), False)
    for seed in range(6):
        EMULATOR.schedule(seed=seed, races=True, resident=1)
        assert any(a.isnan().any() for a in launch())
        EMULATOR.schedule()
        assert raised()
