"""Compile the Triton kernels for GPUs that are not there, and read what they would need.

    python -m benchmarks.triton_compile                  every entry of the table, and how it differs from the committed
    python -m benchmarks.triton_compile --write          the table anew: benchmarks/results/triton-compiled.json

An entry is a launch exactly as `fastrnn.backends.triton.launch` makes it, caught before it reaches the device:
registers a thread, spilled bytes, shared memory a program, and the kind of product that the compiler chose.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastrnn.backends.base import Call, Weights
from fastrnn.backends.triton import launch
from fastrnn.backends.triton.plan import SCHEDULES, Limits, Plan, Problem, plan
from fastrnn.bench.environment import write
from fastrnn.cells import CELLS

TABLE = Path(__file__).parent / "results" / "triton-compiled.json"
# Shared memory that a program may have, and multiprocessors, of A100, H100/H200 and B200.
DEVICES = {
    80: Limits("sm_80", (8, 0), 163 << 10, 108),
    90: Limits("sm_90", (9, 0), 227 << 10, 132),
    100: Limits("sm_100", (10, 0), 227 << 10, 148),
}
KINDS = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"),
    "fp32": (torch.float32, "ieee"),
}
_OPTIONS = ("num_warps", "num_stages", "launch_cooperative_grid", "enable_fp_fusion")
# How an entry's batch comes, joined by "+"; "bare" is without biases, initial states and their gradients.
FORMS = ("packed+resets", "lengths+resets+trail", "bare")
_POINTERS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


class Entry(NamedTuple):
    """One kernel."""

    cell: str
    kind: str
    H: int
    B: int
    schedule: str
    direction: str
    arch: int
    S: int = 1
    form: str = ""

    def __str__(self) -> str:
        sizes = f"H={self.H} B={self.B} S={self.S}"
        return f"sm_{self.arch} {self.schedule} {self.direction} {self.cell} {self.kind} {sizes} {self.form}".rstrip()


class Needs(NamedTuple):
    """What the compiler says of it."""

    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    product: str  # wgmma, mma (tcgen05 too) or fma


def problem_of(entry: Entry) -> Problem:
    dtype, precision = KINDS[entry.kind]
    gates = CELLS[entry.cell].gates
    return Problem(gates, entry.H, entry.B, entry.S, dtype.itemsize, precision, entry.direction == "backward")


def launch_of(entry: Entry, how: Plan, T: int = 3) -> None:
    """A launch of `entry` on tensors of the CPU: somebody else must be in the kernel's place."""
    dtype, precision = KINDS[entry.kind]
    cell, B, H, S = CELLS[entry.cell], entry.B, entry.H, entry.S
    rows, form = cell.gates * H, entry.form.split("+")
    bare = "bare" in form

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype)

    def bias() -> torch.Tensor | None:
        return None if bare else empty(rows)

    weights = tuple(Weights(empty(rows, 16), empty(rows, H), bias(), bias(), None) for _ in range(S))
    ends = tuple(empty(S, B, H) for _ in range(cell.states))
    lead = (T * B,) if "packed" in form else (T, B)
    call = Call(
        cell,
        empty(*lead, 16),
        () if bare else ends,
        weights,
        (False, True)[:S],
        lengths=torch.zeros(B, dtype=torch.int64) if "lengths" in form else None,
        batch_sizes=torch.full((T,), B) if "packed" in form else None,
        resets=torch.zeros(lead, dtype=torch.bool) if "resets" in form else None,
        params=tuple(tuple(empty(H) for _ in range(cell.params)) for _ in range(S)) if cell.params else (),
    )
    shape = launch.shape_of(call, precision)
    y, c = empty(*lead, S * H), torch.empty(S, T * B, H) if cell.states > 1 else None
    if entry.direction == "forward":
        xg = empty(S, T * B, max(cell.gates, cell.tape) * H)
        launch.forward(call, shape, how, xg, y, ends, None if bare else c, cell.tape > 0 and not bare)
    else:
        tape = empty(S, T * B, cell.tape * H) if cell.tape else y
        dgates, dends = empty(S, T * B, cell.dgates * H), (None,) * cell.states if bare else ends
        dc = c if "trail" in form else None
        launch.backward(call, shape, how, y, c, tape, y, dends, dc, dgates, call.states)


def caught(entry: Entry, how: Plan, T: int = 3) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The kernel, its run-time arguments by name and its flags."""
    found: list[Any] = []

    class Catch:
        def __init__(self, kernel: Any) -> None:
            self.kernel, self.arg_names = kernel, kernel.arg_names

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **flags: found.append((self.kernel, args, flags))

    original = launch.kernel_of
    launch.kernel_of = lambda schedule, direction: Catch(original(schedule, direction))  # type: ignore[assignment]
    try:
        launch_of(entry, how, T)
    finally:
        launch.kernel_of = original
    kernel, args, flags = found[0]
    return kernel, dict(zip(kernel.arg_names, args, strict=False)), flags


def compile_entry(entry: Entry, how: Plan) -> Any:
    """Triton's compiled kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from fastrnn.backends.triton.steps import MASKS

    kernel, arguments, flags = caught(entry, how)
    signature, constants, attributes = {}, {}, {}
    options = {k: flags.pop(k) for k in _OPTIONS if k in flags}
    for i, name in enumerate(kernel.arg_names):
        value = arguments.get(name)
        if name in flags:
            signature[name], constants[i,] = "constexpr", flags[name]
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _POINTERS[value.dtype]
            if name not in MASKS:
                attributes[i,] = [["tt.divisibility", 16]]
        elif name == "H" and value == 1:
            signature[name], constants[i,] = "constexpr", value
        else:
            signature[name] = "i32"
            if name == "H" and value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return compile(source, target=GPUTarget("cuda", entry.arch, 32), options=options)


def needs_of(compiled: Any) -> Needs:
    return Needs(*_usage(compiled), compiled.metadata.shared, _product(compiled.asm["ptx"]))


def reads_before_waiting(compiled: Any) -> bool:
    """Has the compiler moved a load of what other programs write in front of the wait for them?"""
    text = compiled.asm["ttgir"]
    exchanged = re.search(r"cache_?[mM]odifier = cg|async_copy", text)
    return exchanged is None or exchanged.start() < text.index("atomic_rmw")


def _usage(compiled: Any) -> tuple[int, int]:
    """Registers a thread and bytes of local memory, which are spilled ones, from the binary itself."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(used["REG"]), int(used["STACK"]) + int(used.get("LOCAL", 0))


def _product(ptx: str) -> str:
    return "wgmma" if "wgmma.mma" in ptx else "mma" if "mma.sync" in ptx or "tcgen05.mma" in ptx else "fma"


def entries() -> list[Entry]:
    """The table: every schedule in every kind on every device where it fits; the other cells, forms and sizes once."""
    found = []
    sizes = {"resident": ((64, 16), (128, 16)), "persistent": ((256, 32), (1024, 16)), "stepwise": ((512, 64),)}
    for arch, limits in DEVICES.items():
        for kind in KINDS:
            if kind == "fp16" and arch != 90:  # the same instructions as bf16's
                continue
            for schedule in SCHEDULES:
                for direction in ("forward", "backward"):
                    for H, B in sizes[schedule]:
                        entry = Entry("lstm", kind, H, B, schedule, direction, arch)
                        if _fits(entry, limits):
                            found.append(entry)
    for cell in CELLS:
        for schedule, H in (("resident", 64), ("persistent", 256), ("stepwise", 512)):
            found += [Entry(cell, "bf16", H, 32, schedule, d, 90, 2) for d in ("forward", "backward")]
    for schedule, H in (("resident", 64), ("persistent", 256), ("stepwise", 512)):
        for direction in ("forward", "backward"):
            found += [Entry("lstm", "bf16", H, 16, schedule, direction, 90, 2, form) for form in FORMS]
            found += [Entry("lstm", "bf16", odd, 16, schedule, direction, 90) for odd in (1, H - 1)]
    return found


def _fits(entry: Entry, limits: Limits) -> bool:
    try:
        plan(problem_of(entry), limits, entry.schedule)
    except RuntimeError:
        return False
    return True


def compiled(entry: Entry) -> Needs:
    """With the plan that the rule gives."""
    return needs_of(compile_entry(entry, plan(problem_of(entry), DEVICES[entry.arch], entry.schedule)[0]))


def table() -> dict[str, Any]:
    """The committed table."""
    return json.loads(TABLE.read_text())  # type: ignore[no-any-return]


def main(argv: list[str] | None = None) -> int:
    import triton

    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_compile", description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the committed table")
    args = parser.parse_args(argv)
    known = table()["kernels"] if TABLE.exists() else {}
    made, worse = {}, 0
    for entry in entries():
        needs = compiled(entry)
        made[str(entry)] = needs
        before = known.get(str(entry))
        changed = "" if before == list(needs) else f"  (table: {before})"
        worse += bool(changed)
        numbers = f"{needs.registers:4} registers {needs.spilled:5} B spilled {needs.shared:7} B shared"
        print(f"{entry!s:62} {numbers} {needs.product}{changed}", flush=True)
    if args.write:
        write(TABLE, json.dumps({"triton": triton.__version__, "kernels": made}, indent=0) + "\n")
        return 0
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
