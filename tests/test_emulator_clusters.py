"""Each kernel of K1 on the emulator: every variant, cell and type, the largest clusters, three streams."""

from __future__ import annotations

import itertools

import pytest
from emulator_support import EMULATOR, NUMBERS, emulated, needs_emulator
from engine_support import Case
from test_emulator_kernels import assert_parity, make

from fastrnn.cells import CELLS

__all__ = ["emulated"]
pytestmark = [needs_emulator, pytest.mark.usefixtures("poisoned")]

# Every kernel that is compiled, at a size where it has work in all its blocks and weights in shared memory, too.
FORWARD: list[tuple[int, int, int]] = [  # (variant, blocks, H)
    (0, 1, 128),
    (1, 1, 88),
    *((v, b, h) for v in (2, 3) for b, h in ((2, 72), (3, 136))),
    *((v, b, h) for v in (4, 5) for b, h in ((2, 40), (4, 104))),
]
BACKWARD = [
    *((v, 1, 48) for v in (0, 1)),
    *((v, b, h) for v in (2, 3) for b, h in ((2, 40), (4, 104))),
    *((v, b, h) for v in (4, 5) for b, h in ((2, 56), (3, 136))),
    *((v, 4, 120) for v in (6, 7)),
    (8, 6, 192),
]
FAMILIES = [(False, *v) for v in FORWARD] + [(True, *v) for v in BACKWARD]


def of_kernel(kernel: int, backward: bool) -> set[int]:
    """The variants of K1 or K2, which are all compiled for the LSTM in fp32."""
    limits, count = EMULATOR.limits(0), EMULATOR.backward_variants if backward else EMULATOR.forward_variants
    fp32 = list(NUMBERS).index("fp32")
    plans = [EMULATOR.plan(0, fp32, backward, 1, 8, 40, limits, variant=v, kernel=kernel) for v in range(count)]
    return {v for v, plan in enumerate(plans) if not plan.error}


def test_every_variant_is_in_the_list():
    assert {v[0] for v in FORWARD} == of_kernel(1, False)
    assert {v[0] for v in BACKWARD} == of_kernel(1, True)


@pytest.mark.parametrize("number", ["bf16", "fp32"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(("backward", "variant", "blocks", "hidden"), FAMILIES)
def test_every_kernel(emulated, cell, number, backward, variant, blocks, hidden):
    backend = emulated(number)
    backend.forced[backward] = (blocks, variant)
    code = list(NUMBERS).index(number)
    if not EMULATOR.exists(EMULATOR.cells.index(cell), code, backward, variant):
        assert "no kernel keeps" in backend.plan(cell, code, backward, 1, 11, hidden).error
        return
    assert_parity(backend, make(Case(cell, T=5, B=11, I=3, H=hidden), number), number)


def test_every_kernel_that_is_compiled_is_what_some_call_gets():
    """By cell, size of numbers and direction: the types of one size share what is compiled."""
    devices = [(90, 227, 16, 132), (120, 99, 8, 170), (80, 163, 1, 108), (86, 99, 1, 84)]
    limits = [EMULATOR.Limits(a, kib << 10, cluster, count) for a, kib, cluster, count in devices]
    for code, cell in enumerate(EMULATOR.cells):
        for (first, second), unit in (((0, 1), 8), ((2, 3), 4)):
            for backward in (False, True):
                count = EMULATOR.backward_variants if backward else EMULATOR.forward_variants
                left = {v for v in range(count) if EMULATOR.exists(code, first, backward, v)}
                calls = itertools.product((first, second), (1, 2), (1, 8, 12, 16, 24, 32, 64, 96, 192, 384), limits)
                for number, S, B, device in calls:
                    if not left:
                        break
                    for hidden in (*range(unit, 1025, unit), *range(1088, 4417, 64)):  # the larger ones: K2
                        left.discard(EMULATOR.plan(code, number, backward, S, B, hidden, device).variant)
                assert not left, (cell, first, "backward" if backward else "forward")


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_and_type_in_clusters(emulated, cell, number):
    backend = emulated(number)
    backend.forced = {False: (2, 2), True: (2, 4)}
    case = Case(cell, T=5, B=11, I=3, H=40, lengths=True, resets=True, reverse=(False, True))
    assert_parity(backend, make(case, number), number)


# (backward, variant, blocks, H): what an LSTM of 256 to 512 units gets on a GPU has as many blocks.
LARGE = [(False, 4, 8, 120), (False, 2, 16, 248), (True, 4, 8, 120), (True, 4, 16, 248)]


@pytest.mark.parametrize(("backward", "variant", "blocks", "hidden"), LARGE)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_large_clusters(emulated, cell, backward, variant, blocks, hidden):
    backend = emulated("bf16")
    backend.forced[backward] = (blocks, variant)
    plan = backend.plan(cell, 0, backward, 2, 9, hidden)
    assert (plan.kernel, plan.blocks) == (1, blocks)
    case = Case(cell, T=3, B=9, I=3, H=hidden, lengths=True, reverse=(False, True))
    assert_parity(backend, make(case, "bf16"), "bf16")


@pytest.mark.parametrize("kernel", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_three_streams(emulated, cell, kernel):
    """Streams are not only the directions of a layer: as many as there are, each with its own weights and way."""
    backend = emulated("bf16")
    backend.asked = {"kernel": kernel}
    case = Case(cell, T=4, B=9, I=3, H=40, lengths=True, resets=True, reverse=(False, True, False))
    assert_parity(backend, make(case, "bf16"), "bf16")


@pytest.mark.parametrize("cell", CELLS)
def test_sizes_that_a_launch_does_not_have_are_refused(cell):
    """With the limit and the way out, before an index could overflow."""
    code, limits = EMULATOR.cells.index(cell), EMULATOR.limits(0)
    for sizes, message in {
        (1, 1, 1 << 15): "H is 16384 at most; use a smaller H",
        (2, 1 << 26, 64): "directions times B are 2^26 at most; use a smaller B",
    }.items():
        for backward in (False, True):
            assert message in EMULATOR.plan(code, 0, backward, *sizes, limits).error
