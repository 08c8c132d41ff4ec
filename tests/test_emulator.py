"""The emulator itself: each operation does what the PTX ISA says, and planted bugs are found (docs/emulator.md)."""

import pytest
import torch
from emulator_support import EMULATOR, needs_emulator, needs_races

pytestmark = needs_emulator
SEEDS = range(12)
COPIES = [float(i + 1) for i in range(384)]
# (kernel, arguments, what it puts out)
KERNELS = {
    "neighbours": ({}, [float((i + 1) % 96) for i in range(96)]),
    "lanes": ({}, [float(i // 32 * 32 + (i + 1) % 32) for i in range(96)]),
    "votes": ({}, [2.0] * 96),
    "copies": (
        {"input": COPIES},
        [
            0.0 if k == 2 and j > 1 else COPIES[(k * 32 + (i + 1) % 32) * 4 + j]
            for k in range(3)
            for i in range(32)
            for j in range(4)
        ],
    ),
    "exchange": ({"blocks": 4}, [float((b - 9) % 4 * 32 + i + 9) for b in range(4) for i in range(32)]),
    "relay": ({"blocks": 4}, [0.0] * 4 + [4.0] * 32),
    "beyond": ({}, []),
}
# (kernel, bug, part of a message, or None where the output may be wrong instead)
BUGS = [
    ("neighbours", 1, None),  # no barrier
    ("neighbours", 2, "bar.sync 0: "),  # counts that differ
    ("lanes", 1, None),  # no __syncwarp
    ("lanes", 2, "deadlock"),  # a lane at another barrier
    ("votes", 1, "bar."),  # another barrier of the same number
    ("copies", 1, "cp.async in flight"),  # no wait
    ("copies", 2, None),  # no barrier after it
    ("copies", 3, "not committed"),
    ("exchange", 1, None),  # no cluster barrier before the first store
    ("exchange", 2, None),  # no wait for the mbarrier
    ("exchange", 3, None),  # wrong parity once
    ("exchange", 4, "deadlock"),  # more bytes expected than come
    ("exchange", 5, None),  # a block ends with stores to it in flight
    ("exchange", 6, None),  # one buffer where there should be two
    ("relay", 1, None),  # a flag set before the data is there
    ("relay", 2, None),  # a flag that nobody sets: the wait ends, and says so
    ("beyond", 1, "beyond the end of shared memory"),
    ("beyond", 2, "misaligned access to shared memory"),
    ("beyond", 3, "misaligned source"),
    ("beyond", 4, "no address of this block's shared memory"),
    ("beyond", 5, "no such rank"),
]


def outcome(name, bug, seed, races):
    """What a run shows: "" where all is as it should be."""
    arguments, want = KERNELS[name]
    try:
        got = EMULATOR.primitive(name, bug=bug, seed=seed, races=races, **arguments)
    except RuntimeError as error:
        return str(error)
    return "" if got == want else "wrong"


@pytest.mark.parametrize("races", [False, pytest.param(True, marks=needs_races)])
@pytest.mark.parametrize("name", KERNELS)
def test_right_kernels_pass(name, races):
    for seed in SEEDS:
        assert outcome(name, 0, seed, races) == ""


@pytest.mark.parametrize(("name", "bug", "message"), BUGS)
def test_planted_bugs_are_found(name, bug, message):
    found = [outcome(name, bug, seed, False) for seed in SEEDS]
    if message is not None:
        assert all(message in f for f in found), found
    else:
        assert any(found), found


RACES = [
    ("neighbours", 1),
    ("lanes", 1),
    ("copies", 2),
    ("exchange", 2),
    ("exchange", 6),
    ("relay", 1),
    ("relay", 3),
]


@needs_races
@pytest.mark.parametrize(("name", "bug"), RACES)
def test_races_are_found_by_every_schedule(name, bug):
    for seed in SEEDS:
        found = outcome(name, bug, seed, True)
        assert found not in ("", "wrong")
        if (name, bug) != ("exchange", 2):  # there an mbarrier may have got too many arrivals first
            assert "not ordered" in found, found
            assert found.count("primitives.cpp:") == 2, found


@pytest.mark.parametrize(("name", "dtype", "k"), [("bf16", "bfloat16", 16), ("fp16", "float16", 16), ("tf32", None, 8)])
def test_products(name, dtype, k):
    a, b = torch.randn(16, k), torch.randn(8, k)
    got = torch.tensor(EMULATOR.primitive(name, input=[*a.flatten().tolist(), *b.flatten().tolist()])).view(16, 8)

    def narrow(x):  # tf32: 10 bits of mantissa, the others cut off
        return (x.view(torch.int32) & -0x2000).view(torch.float32) if dtype is None else x.to(getattr(torch, dtype))

    want = narrow(a).double() @ narrow(b).double().T
    assert (got.double() - want).abs().max() < 1e-5 * want.abs().max()
    wrong = torch.tensor(EMULATOR.primitive(name, input=[*a.flatten().tolist(), *b.flatten().tolist()], bug=1))
    assert (wrong.view(16, 8) - want).abs().max() > 1e-2


def test_conversions_to_16_bits():
    """from_float and to_float, by a product with the unit matrix, against torch's."""
    edge = [0.0, -0.0, 1.0, 65504.0, 65519.0, 65520.0, 1e-8, 3e-8, 6.1e-5, 1.0009765625, 1.00048828125, -2.0 / 3]
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        a = torch.zeros(16, 16)
        a.flatten()[: len(edge)] = torch.tensor(edge)
        for half in range(2):
            b = torch.eye(16)[8 * half : 8 * half + 8]
            values = [*a.flatten().tolist(), *b.flatten().tolist()]
            got = torch.tensor(EMULATOR.primitive(name, input=values)).view(16, 8)
            want = a.to(dtype).float()
            finite = want.isfinite().all(1)
            assert torch.equal(got[finite], want[finite][:, 8 * half : 8 * half + 8])
            assert got[~finite].isnan().any() or got[~finite].isinf().any() or finite.all()


def test_a_deadlock_names_where_threads_wait():
    with pytest.raises(RuntimeError, match="deadlock") as raised:
        EMULATOR.primitive("exchange", bug=4, blocks=4)
    lines = str(raised.value).splitlines()
    assert any("128 in mbarrier.try_wait at primitives.cpp:" in line for line in lines), lines
    assert sum("0 arrivals and 8 bytes to come" in line for line in lines) == 4, lines


def test_the_same_seed_runs_in_the_same_order():
    """A wrong kernel is wrong in the same way."""
    for seed in SEEDS:
        runs = {str(EMULATOR.primitive("neighbours", bug=1, seed=seed)) for _ in range(3)}
        assert len(runs) == 1
    assert len({str(EMULATOR.primitive("neighbours", bug=1, seed=seed)) for seed in SEEDS}) > 3


def test_blocks_that_are_not_resident_cannot_be_waited_for():
    """One block at a time: those that come first in the shuffled order wait in vain, and their waits are bounded."""
    found = {max(EMULATOR.primitive("relay", blocks=4, seed=seed, resident=1)[:4]) for seed in SEEDS}
    assert 1.0 in found
