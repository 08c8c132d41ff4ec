"""The Triton kernels compiled for GPUs that are not here, against the committed table and the plan's own estimates."""

import importlib.util

import pytest
import torch

from benchmarks import triton_compile as tables
from fastrnn.backends.triton import device, launch
from fastrnn.backends.triton import plan as plans

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton: pip install triton", allow_module_level=True)
if device.interpreted():
    pytest.skip("needs the compiler, not the interpreter", allow_module_level=True)

ENTRIES = tables.entries()
SPILLED = 256  # bytes a thread: eight times 32 bytes, none of them in the innermost loop's products


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_what_a_kernel_needs(entry, monkeypatch):
    limits = tables.DEVICES[entry.arch]
    problem = tables.problem_of(entry)
    chosen, _ = plans.plan(problem, limits, entry.schedule)
    needs = tables.compile_entry(entry, chosen)
    assert needs.shared <= plans.shared(chosen, problem) <= limits.shared
    assert needs.registers * 32 * chosen.warps <= 65536
    assert needs.product == "fma" if entry.kind == "fp32" else needs.product in ("mma", "wgmma")
    import triton

    table = tables.table()
    if triton.__version__ == table["triton"]:
        assert list(needs) == table["kernels"][str(entry)]


def test_the_table_has_no_more_and_no_less():
    assert list(tables.table()["kernels"]) == [str(entry) for entry in ENTRIES]


def test_no_kernel_spills_much():
    spilled = {name: needs[1] for name, needs in tables.table()["kernels"].items() if needs[1] > SPILLED}
    assert not spilled


@pytest.mark.parametrize("schedule", plans.SCHEDULES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_no_variant_is_compiled_for_another_size(schedule, direction):
    """Triton compiles anew where an argument becomes 1, a multiple of 16 or a constant: not for T, B, N or k."""
    kernel = launch.kernel_of(schedule, direction)
    free = {p.name for p in kernel.params if p.do_not_specialize}
    sizes = {p.name for p in kernel.params if not p.is_constexpr and p.name in ("T", "B", "N", "k", "reverse", "limit")}
    assert sizes == free
    assert not {p.name for p in kernel.params if p.is_constexpr} & {"T", "B", "N", "H"}
    keys = set()
    for batch, steps in ((1, 1), (5, 7), (16, 16), (13, 512)):
        entry = tables.Entry("lstm", "bf16", 256 if schedule != plans.RESIDENT else 64, batch, schedule, direction, 90)
        keys.add(_variant(kernel, entry, steps))
    assert len(keys) == 1


def _variant(kernel, entry, steps):
    """What Triton would look a compiled kernel up by."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    how = plans.plan(tables.problem_of(entry._replace(B=16)), tables.DEVICES[90], entry.schedule)[0]
    _, arguments, flags = tables.caught(entry, how, steps)
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    _, specialization, options = bind(*arguments.values(), **flags)
    return str(specialization), str(sorted(options.items()))


def test_a_variant_is_told_apart_where_it_must_be():
    """That the test above can fail."""
    kernel = launch.kernel_of("resident", "forward")
    entry = tables.Entry("lstm", "bf16", 64, 16, "resident", "forward", 90)
    assert _variant(kernel, entry, 7) != _variant(kernel, entry._replace(kind="fp16"), 7)
    assert _variant(kernel, entry, 7) != _variant(kernel, entry._replace(H=63), 7)


def test_types_of_the_table():
    assert {t for t, _ in tables.KINDS.values()} == {torch.float32, torch.bfloat16, torch.float16}
