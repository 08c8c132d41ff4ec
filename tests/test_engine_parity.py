"""The C++ engine against the reference loop: outputs and every gradient, at sizes around its vectors and tiles.

test_engine_isa runs this file once more for each of the other instruction sets.
"""

import itertools

import pytest
import torch
from engine_support import ENGINE, FEW, Case, assert_parity, fill_workspace_with_nan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastrnn.cells import CELLS

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(ENGINE is None, reason="the engine is not built"),
]
BOTH, FORWARD, REVERSE = (False, True), (False,), (True,)
DIRECTIONS = {"forward": FORWARD, "reverse": REVERSE, "both": BOTH}
UNITS = [1, 2, 15, 16, 17, 19, 33, 64, 70]
# (T, B, I): every batch up to a tile and a half, few rows and many, inputs around a vector
SHAPES = [
    *((2, b, 3) for b in range(1, 14)),
    *((1, 1, 16), (1, 2, 50), (1, 13, 1), (1, 33, 16), (7, 1, 50), (7, 5, 16), (7, 33, 3), (40, 1, 3), (40, 3, 16)),
]
NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _workspace(poisoned):
    fill_workspace_with_nan()


@pytest.mark.parametrize("hidden", UNITS)
@pytest.mark.parametrize("cell", CELLS)
def test_units(cell, hidden):
    for k, (steps, batch, inputs) in enumerate(SHAPES[hidden % 2 :: 2] if hidden > 33 else SHAPES):
        directions = list(DIRECTIONS.values())[k % 3]
        assert_parity(Case(cell, steps, batch, inputs, hidden, reverse=directions), seed=k)


@pytest.mark.parametrize("hidden", [16, 19, 64])
@pytest.mark.parametrize("cell", CELLS)
def test_single_precision(cell, hidden):
    for k, (steps, batch, inputs) in enumerate(SHAPES):
        directions = list(DIRECTIONS.values())[k % 3]
        assert_parity(Case(cell, steps, batch, inputs, hidden, reverse=directions), torch.float32, seed=k)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_and_resets(cell, directions, dtype):
    options = itertools.product(
        [(True, False), (False, True), (True, True)], [(7, 5), (3, 2), (5, 13), (1, 4), (40, 3)]
    )
    for k, ((lengths, resets), (steps, batch)) in enumerate(options):
        case = Case(cell, steps, batch, 5, 19, reverse=DIRECTIONS[directions], lengths=lengths, resets=resets)
        assert_parity(case, dtype, seed=k)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("hidden", "projected"), [(2, 1), (17, 16), (19, 6), (33, 32), (40, 17), (70, 33)])
def test_projection(hidden, projected, dtype):
    for k, (steps, batch) in enumerate([(1, 1), (2, 3), (3, 4), (7, 5), (4, 13), (2, 33)]):
        for directions, ragged in ((FORWARD, False), (BOTH, False), (BOTH, True)):
            case = Case("lstm", steps, batch, 5, hidden, projected, directions, lengths=ragged, resets=ragged)
            assert_parity(case, dtype, seed=k)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("cell", [*CELLS, "projected"])
def test_sixteen_bits(cell, dtype):
    for k, (steps, batch, hidden) in enumerate([(1, 1, 19), (2, 3, 16), (7, 5, 19), (3, 13, 33), (2, 33, 15)]):
        for directions, ragged in ((FORWARD, False), (REVERSE, True), (BOTH, False), (BOTH, True)):
            name, out = ("lstm", 7) if cell == "projected" else (cell, 0)
            case = Case(name, steps, batch, 11, hidden, out, directions, lengths=ragged, resets=ragged)
            assert_parity(case, dtype, seed=k)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("cell", [*CELLS, "projected"])
def test_single_steps(cell, dtype):
    """The form of the cells: x (B, I), states (B, H)."""
    name, out = ("lstm", 7) if cell == "projected" else (cell, 0)
    for k, (batch, hidden) in enumerate([(1, 2), (1, 16), (1, 19), (FEW, 70), (FEW + 1, 15), (33, 33)]):
        if out < hidden:
            assert_parity(Case(name, 1, batch, 3, hidden, out, single=True), dtype, seed=k)


@pytest.mark.parametrize("rows", [(1, FEW), (FEW, 1), (3, FEW // 3), (1, FEW + 1), (FEW + 1, 1)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_around_few_rows(cell, rows):
    """Up to FEW rows, weights are read unpacked and their gradients made by the engine."""
    for hidden, inputs, directions in itertools.product((16, 19), (16, 3), (FORWARD, BOTH)):
        for resets, bias in ((False, True), (True, False)):
            assert_parity(Case(cell, *rows, inputs, hidden, reverse=directions, bias=bias, resets=resets))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("cell", [*CELLS, "projected"])
def test_chunks_of_steps(cell, dtype):
    """Gradients of weights are added up some steps at a time, in blocks of rows."""
    name, out = ("lstm", 18) if cell == "projected" else (cell, 0)
    for k, (steps, batch) in enumerate([(1, 300), (3, 257), (2, 530), (21, 33), (300, 1), (70, 9)]):
        case = Case(name, steps, batch, 67, 21, out, reverse=DIRECTIONS[list(DIRECTIONS)[k % 3]])
        assert_parity(case, dtype, seed=k)
        assert_parity(case._replace(lengths=True, resets=True), dtype, seed=k)


@pytest.mark.parametrize("cell", CELLS)
def test_without_bias(cell):
    for batch in (1, 5):
        assert_parity(Case(cell, B=batch, bias=False))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_long_sequence(cell):
    assert_parity(Case(cell, T=1500, B=1, I=2, H=3))
    assert_parity(Case(cell, T=1500, B=2, I=2, H=3, lengths=True, resets=True, reverse=BOTH), torch.float32)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cell=st.sampled_from([*CELLS]),
    sizes=st.tuples(*(st.integers(1, n) for n in (9, 20, 40, 50))),
    projected=st.integers(0, 20),
    directions=st.sampled_from([*DIRECTIONS.values()]),
    options=st.tuples(*[st.booleans()] * 3),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_random(cell, sizes, projected, directions, options, dtype):
    out = projected if cell == "lstm" and projected < sizes[3] else 0
    assert_parity(Case(cell, *sizes, out, directions, *options), dtype)
