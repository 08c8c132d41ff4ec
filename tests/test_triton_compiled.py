"""The Triton kernels compiled for GPUs that are not here, against the committed table and the plan's own estimates."""

import importlib.util

import pytest
import torch
from new_cell_support import NAME, page

from benchmarks import triton_compile as tables
from fastrnn.backends.triton import device, launch
from fastrnn.backends.triton import plan as plans

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton: pip install triton", allow_module_level=True)
if device.interpreted():
    pytest.skip("needs the compiler, not the interpreter", allow_module_level=True)

__all__ = ["page"]
ENTRIES = tables.entries()
STEPWISE_PLAN = plans.Plan(plans.STEPWISE, 16, 32, 64, 4)
SPILLED = 256  # bytes a thread: eight times 32 bytes, none of them in the innermost loop's products


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_what_a_kernel_needs(entry, monkeypatch):
    limits = tables.DEVICES[entry.arch]
    problem = tables.problem_of(entry)
    chosen, _ = plans.plan(problem, limits, entry.schedule)
    compiled = tables.compile_entry(entry, chosen)
    needs = tables.needs_of(compiled)
    assert needs.shared <= plans.shared(chosen, problem) <= limits.shared
    assert needs.registers * 32 * chosen.warps <= 65536
    assert needs.product == "fma" if entry.kind == "fp32" else needs.product in ("mma", "wgmma")
    if entry.schedule == plans.PERSISTENT:
        assert not tables.reads_before_waiting(compiled)
    import triton

    table = tables.table()
    if triton.__version__ == table["triton"]:
        assert list(needs) == table["kernels"][str(entry)]


@pytest.mark.usefixtures("page")
@pytest.mark.parametrize("schedule", plans.SCHEDULES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_cell_with_parameters_of_its_own(schedule, direction):
    H = 32 if schedule == plans.RESIDENT else 256
    entry = tables.Entry(NAME, "bf16", H, 16, schedule, direction, 90, 1, "lengths+resets+trail")
    chosen, _ = plans.plan(tables.problem_of(entry), tables.DEVICES[entry.arch], schedule)
    needs = tables.needs_of(tables.compile_entry(entry, chosen))
    assert needs.registers * 32 * chosen.warps <= 65536
    assert needs.spilled <= SPILLED


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_the_oldest_device_has_the_instructions(kind):
    major, minor = device.OLDEST
    entry = tables.Entry("lstm", kind, 32, 16, plans.RESIDENT, "forward", 10 * major + minor)
    tables.compile_entry(entry, plans.Plan(plans.RESIDENT, 16, 32, 0, 4))


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
    H = 256 if schedule != plans.RESIDENT else 64
    for form in ("", *tables.FORMS):
        keys.clear()
        for batch, steps in ((1, 1), (5, 7), (16, 16), (13, 512)):
            entry = tables.Entry("lstm", "bf16", H, batch, schedule, direction, 90, 1, form)
            keys.add(_variant(kernel, entry, steps))
        assert len(keys) == 1, form


def _binder(kernel):
    """What binds and specializes the arguments of a launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))


def _variant(kernel, entry, steps):
    """What Triton would look a compiled kernel up by."""
    how = plans.plan(tables.problem_of(entry._replace(B=16)), tables.DEVICES[90], entry.schedule)[0]
    _, arguments, flags = tables.caught(entry, how, steps)
    _, specialization, options = _binder(kernel)(*arguments.values(), **flags)
    return str(specialization), str(sorted(options.items()))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_later_steps_start_the_compiled_kernel_with_the_same_arguments(direction, monkeypatch):
    """Triton's own launch binds its arguments in the order that `launch` gives to the compiled kernel."""
    kernel = launch.kernel_of("stepwise", direction)
    bind = _binder(kernel)
    calls = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: calls.append((grid, arguments))

    class Kernel:
        arg_names = kernel.arg_names

        def __getitem__(self, grid):
            def first(*arguments, **flags):
                calls.append((grid, tuple(bind(*arguments, **flags)[0].values())))
                return Compiled()

            return first

    monkeypatch.setattr(launch, "kernel_of", lambda *names: Kernel())
    tables.launch_of(tables.Entry("lstm", "bf16", 64, 16, "stepwise", direction, 90), STEPWISE_PLAN, 5)
    assert len(calls) == 5 + (direction == "backward")
    at = kernel.arg_names.index("k")
    for k, (grid, arguments) in enumerate(calls[:5]):
        assert grid == calls[0][0]
        assert arguments[at] == k
        rest = arguments[:at] + arguments[at + 1 :]
        assert all(a is b for a, b in zip(rest, calls[0][1][:at] + calls[0][1][at + 1 :], strict=True))


def test_a_variant_is_told_apart_where_it_must_be():
    """That the test above can fail."""
    kernel = launch.kernel_of("resident", "forward")
    entry = tables.Entry("lstm", "bf16", 64, 16, "resident", "forward", 90)
    assert _variant(kernel, entry, 7) != _variant(kernel, entry._replace(kind="fp16"), 7)
    assert _variant(kernel, entry, 7) != _variant(kernel, entry._replace(H=63), 7)


def test_types_of_the_table():
    assert {t for t, _ in tables.KINDS.values()} == {torch.float32, torch.bfloat16, torch.float16}
