"""K2, whose blocks meet in global memory, on the emulator: at small sizes, by the keywords of the plan."""

from __future__ import annotations

import re
import weakref

import pytest
import torch
from emulator_support import EMULATOR, NUMBERS, ROOT, emulated, needs_emulator, needs_races
from engine_support import Case, like
from support import error
from test_emulator_clusters import of_kernel
from test_emulator_kernels import BOTH, REVERSE, assert_parity, make, run, same_bits
from tolerances import KERNELS

import fastrnn
from fastrnn.backends import meeting
from fastrnn.backends.base import GATES
from fastrnn.backends.reference import REFERENCE
from fastrnn.cells import CELLS

__all__ = ["emulated"]
pytestmark = [needs_emulator, pytest.mark.usefixtures("poisoned")]
K1, K2 = {"kernel": 1}, {"kernel": 2}
# (what is asked of the plan, the call): one or several batch tiles to a group, a group for both directions or one each
CASES = {
    "odd": (K2, Case(T=7, B=5, H=19)),
    "lengths, resets, several tiles": (
        {**K2, "groups": 1, "warps": 2},
        Case(T=5, B=19, I=3, H=33, reverse=BOTH, lengths=True, resets=True),
    ),
    "reverse, a group for each tile": ({**K2, "warps": 1}, Case(T=4, B=17, I=3, H=40, reverse=REVERSE, bias=False)),
}
FORWARD = {6: (3, 72), 7: (2, 40), 8: (5, 72), 9: (3, 40)}  # variant: (blocks, H)
BACKWARD = {9: (15, 232), 10: (3, 40), 11: (9, 136), 12: (3, 40)}  # the first and the third: two rounds of row tiles
# ((variant, blocks) forward, backward, H); the last forward is K1's, and quick
SHAPES = [((6, 2), (9, 2), 40), ((9, 3), (12, 3), 40), ((2, 3), (11, 9), 136)]


@pytest.fixture(autouse=True)
def fresh():
    """No test leaves an error behind that is its own."""
    yield
    meeting.watchdog.check(torch.device("cpu"))


def asked(emulated, number, forward, backward, **more):
    backend = emulated(number)
    backend.asked = more
    backend.forced = {False: forward[::-1], True: backward[::-1]}
    return backend


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("cell", CELLS)
def test_parity(emulated, cell, number, case):
    backend = emulated(number)
    backend.asked, sizes = CASES[case]
    assert_parity(backend, make(sizes._replace(cell=cell), number), number)


@pytest.mark.parametrize("number", ["bf16", "fp32"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("variant", [(False, v) for v in FORWARD] + [(True, v) for v in BACKWARD])
def test_every_kernel(emulated, cell, number, variant):
    backward, v = variant
    blocks, hidden = (FORWARD, BACKWARD)[backward][v]
    backend = emulated(number)
    backend.asked, backend.forced = {"warps": 2}, {backward: (blocks, v)}
    plan = backend.plan(cell, 0, backward, 1, 11, hidden)
    assert plan.kernel == 2
    assert plan.rounds == 1 + (hidden > 100)
    assert_parity(backend, make(Case(cell, T=3, B=3 if hidden > 200 else 11, I=3, H=hidden), number), number)


def test_every_kernel_is_in_a_list():
    assert set(FORWARD) == of_kernel(2, False)
    assert set(BACKWARD) == of_kernel(2, True)
    assert sum(len(of_kernel(k, True)) for k in (1, 2)) == EMULATOR.backward_variants
    assert sum(len(of_kernel(k, False)) for k in (1, 2)) == EMULATOR.forward_variants


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("forward", "backward", "hidden"), SHAPES)
def test_no_schedule_changes_a_bit(emulated, cell, forward, backward, hidden):
    backend = asked(emulated, "bf16", forward, backward, groups=2, warps=1)
    call = make(Case(cell, T=4, B=11, I=3, H=hidden, lengths=True, resets=True, reverse=BOTH), "bf16")
    runs = []
    for seed in range(5):
        EMULATOR.schedule(seed=seed)
        runs.append(run(backend, call))
        backend.asked = {**backend.asked, "groups": 1 + seed % 2}
    assert all(same_bits(runs[0], r) for r in runs)


@needs_races
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(("forward", "backward", "hidden"), SHAPES)
def test_no_races(emulated, cell, forward, backward, hidden):
    backend = asked(emulated, "fp32", forward, backward, groups=1, warps=1)
    call = make(Case(cell, T=3, B=9, I=3, H=hidden, lengths=True, resets=True), "fp32")
    for seed in range(2):
        EMULATOR.schedule(seed=seed, races=True)
        assert_parity(backend, call, "fp32")


def test_a_launch_finds_flags_that_are_zero_and_nothing_outlives_it(emulated, monkeypatch):
    """Whatever pool of memory they come from, as that of a CUDA graph to be captured: it gets them back."""
    backend = asked(emulated, "bf16", (8, 3), (11, 3), groups=1)
    call = make(Case("lstm", T=4, B=9, I=3, H=40), "bf16")
    made, lent, before = meeting.place, [], []

    def place(plan, device):
        flags, exchanged, error = made(plan, device)
        before.append((flags.count_nonzero().item(), flags.numel() - plan.flags))
        lent.extend((weakref.ref(flags), weakref.ref(exchanged)))
        return flags, exchanged, error

    monkeypatch.setattr(meeting, "place", place)
    run(backend, call)
    assert before == [(0, 0)] * 2
    assert [ref() for ref in lent] == [None] * 4


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backward", [False, True])
def test_a_peer_that_never_arrives(emulated, cell, backward):
    """One block at a time: those that come first wait in vain. NaN, then an error, then all is well again."""
    backend = emulated("fp32")
    backend.asked = {**K2, "groups": 1}
    call = make(Case(cell, T=4, B=9, I=3, H=40), "fp32")
    with torch.no_grad():
        right = backend.forward(call, GATES)
        EMULATOR.schedule(resident=1)
        if backward:
            back = backend.backward(call, right.saved, right.y, right.y, right.finals, (True,) * 20, False)
            assert not back.dgates[:, -9:-8].isnan().any()  # the last step's, before the first wait
            found = [back.dgates[:, :9], *back.dstates]
        else:
            result = backend.forward(call, GATES)
            assert torch.equal(result.y[0, :8], right.y[0, :8])  # before the first wait
            found = [result.y[1:], *result.finals]
        assert all(a.isnan().any(-1).all() for a in found)
        EMULATOR.schedule()
        with pytest.raises(
            RuntimeError, match="CUDA kernel on cpu gave up at a barrier, as its blocks did not all run"
        ):
            backend.forward(call, GATES)
        again = backend.forward(call, GATES)
        assert torch.equal(again.y, right.y)


def test_sizes_beyond_a_cluster(emulated):
    """K1 where it fits, K2 beyond, and the reason where neither does."""
    code, limits = EMULATOR.cells.index("lstm"), EMULATOR.limits(0)
    for hidden, kernel in ((256, 1), (776, 2), (1024, 2), (2048, 2)):
        for backward in (False, True):
            plan = EMULATOR.plan(code, 0, backward, 1, 16, hidden, limits)
            assert not plan.error
            assert plan.kernel == kernel, (hidden, backward)
    assert "one after another" in str(EMULATOR.plan(code, 0, False, 2, 64, 1024, limits))
    error = EMULATOR.plan(code, 0, False, 1, 16, 4096, limits).error
    assert "lstm with H=4096" in error
    assert "each of the 132 multiprocessors has 227" in error
    ampere = EMULATOR.Limits(80, 163 << 10, 1, 108)
    assert EMULATOR.plan(code, 0, False, 1, 16, 512, ampere).kernel == 2


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("largest", [1, 2, 7, 10, 15])
def test_no_cluster_is_larger_than_the_device_has_room_for(cell, backward, largest):
    """A smaller one or K2 runs what a larger one would have run."""
    code, smaller = EMULATOR.cells.index(cell), 0
    for hidden in (128, 256, 512, 704):
        whole = EMULATOR.plan(code, 0, backward, 1, 8, hidden, EMULATOR.Limits(90, 227 << 10, 16, 120))
        plan = EMULATOR.plan(code, 0, backward, 1, 8, hidden, EMULATOR.Limits(90, 227 << 10, largest, 120))
        assert not plan.error
        assert plan.kernel == 2 or plan.blocks <= largest
        smaller += whole.kernel == 1 and whole.blocks > largest
    assert smaller


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backward", [False, True])
def test_no_cluster_is_of_a_size_that_the_device_refuses(cell, backward):
    code, changed = EMULATOR.cells.index(cell), 0
    for hidden in (128, 256, 384, 512, 704):
        whole = EMULATOR.plan(code, 0, backward, 1, 8, hidden, EMULATOR.Limits(90, 227 << 10, 16, 120))
        if whole.kernel == 2 or whole.blocks == 1:
            continue
        refused = EMULATOR.Limits(90, 227 << 10, 16, 120, refused=1 << whole.blocks)
        plan = EMULATOR.plan(code, 0, backward, 1, 8, hidden, refused)
        assert not plan.error
        assert plan.kernel == 2 or plan.blocks != whole.blocks
        changed += 1
    assert changed


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backward", [False, True])
def test_all_blocks_are_resident_at_once(cell, backward):
    code = EMULATOR.cells.index(cell)
    for multiprocessors in (132, 108, 20):
        limits = EMULATOR.Limits(90, 227 << 10, 16, multiprocessors)
        for hidden in (48, 712, 1536, 2048):
            for batch in (1, 40, 500):
                for streams in (1, 2):
                    plan = EMULATOR.plan(code, 0, backward, streams, batch, hidden, limits, **K2)
                    if plan.error:
                        assert "KiB of shared memory" in plan.error or "20 multiprocessors are too" in plan.error
                        continue
                    blocks, rows = plan.grid
                    assert rows == 1
                    assert blocks <= multiprocessors
                    assert blocks % plan.blocks == 0
                    groups = blocks // plan.blocks
                    tiles = streams * -(-batch // plan.batch)
                    assert groups * plan.items >= tiles > (groups - 1) * plan.items
                    assert plan.exchange == groups * 2 * plan.blocks * plan.units * plan.batch * (
                        4 * plan.blocks if backward else 2
                    )


def test_a_module_by_name(emulated):
    """Two layers, both directions, through `explain` and training."""
    backend = emulated("fp32")
    backend.asked = {**K2, "groups": 1}
    torch.manual_seed(0)
    module = fastrnn.LSTM(5, 24, num_layers=2, bidirectional=True, backend="cuda")
    reference = torch.nn.LSTM(5, 24, num_layers=2, bidirectional=True)
    reference.load_state_dict(module.state_dict())
    x = torch.randn(4, 3, 5)
    assert "K2: 2x1 blocks" in fastrnn.explain(module, x).reason
    (got, _), (want, _) = module(x), reference(x)
    assert error(got, want) < KERNELS["fp32"]
    got.square().sum().backward()
    want.square().sum().backward()
    for (name, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        assert error(p.grad, q.grad) < KERNELS["fp32"], name


def test_no_memory_to_meet_in_is_refused(emulated):
    plan = EMULATOR.plan(0, 0, False, 1, 5, 24, EMULATOR.limits(0), **K2)
    with pytest.raises(ValueError, match="no memory to meet in"):
        EMULATOR.forward(plan, 0, 0, [1, 5, 24, 1, 0, 24], [0] * 16, 0, 4)


@pytest.mark.parametrize("cell", CELLS)
def test_rows_of_length_zero(emulated, cell):
    """A group whose longest row has no step exchanges nothing, and its next tile does."""
    backend = emulated("fp32")
    backend.asked = {**K2, "groups": 1}
    call = make(Case(cell, T=3, B=40, I=3, H=24), "fp32")
    lengths = torch.zeros(40, dtype=torch.int64)
    lengths[17], lengths[33] = 1, 3
    call = call._replace(lengths=lengths)
    got, want = run(backend, call), run(REFERENCE, like(call, torch.float64))
    for name, a in got.items():
        assert error(a, want[name]) <= KERNELS["fp32"], name


# The table of docs/cuda.md: shared memory of a block, blocks of a cluster.
DEVICES = {"90": (227, 16), "120": (99, 8), "80": (163, 1)}


def test_the_documented_sizes_are_the_plans():
    text = (ROOT / "docs" / "cuda.md").read_text()
    rows = re.findall(r"\| K2 on (\d+) of sm_(\d+), (16 bits|fp32 and TF32) \|(.*)\|", text)
    assert len(rows) == 6
    for multiprocessors, capability, numbers, sizes in rows:
        kib, cluster = DEVICES[capability]
        limits = EMULATOR.Limits(int(capability), kib << 10, cluster, int(multiprocessors))
        number, unit = (0, 8) if numbers == "16 bits" else (3, 4)
        for cell, pair in zip(("lstm", "gru", "rnn_tanh"), sizes.split("|"), strict=True):
            for backward, documented in enumerate(map(int, pair.split("/"))):
                for hidden, fits in ((documented, True), (documented + unit, False)):
                    plan = EMULATOR.plan(
                        EMULATOR.cells.index(cell), number, bool(backward), 1, 16, hidden, limits, **K2
                    )
                    assert (not plan.error) == fits, (capability, numbers, cell, backward, hidden)
