"""Which schedule, and which tiles: a rule from sizes, type and the device's limits. No Triton in here.

    resident     one program holds all of W_hh: no exchange between programs, one launch
    persistent   each program holds the columns of its units, a barrier a step: one launch, all programs at once
    stepwise     one launch a step, W_hh from the caches: any size

The first that fits is taken. What limits the first two is shared memory, where Triton keeps the operands of products,
and registers, which products of exact fp32 and in three parts take most of; what limits the second is, too, that all
programs must run at once. The bounds were read off compiled kernels (benchmarks/results/triton-compiled.json), not
off a running GPU; `tuning` puts measurements in their place.
"""

from __future__ import annotations

from typing import NamedTuple

RESIDENT, PERSISTENT, STEPWISE = "resident", "persistent", "stepwise"
SCHEDULES = (RESIDENT, PERSISTENT, STEPWISE)
ROWS = 16  # the least that the matrix units take
UNITS = 16  # of a persistent program
# Up to which H kernels compile with few or no registers spilled, and the blocks of the inner sum and the warps for it.
_RESIDENT = {"half": 128, "tf32": 64, "ieee": 64, "tf32x3": 64}
_PERSISTENT = {"half": 1024, "tf32": 512, "ieee": 512, "tf32x3": 256}
_INNER = {"half": (128, 8), "tf32": (64, 8), "ieee": (32, 4), "tf32x3": (32, 8)}


class Limits(NamedTuple):
    """Of a device."""

    name: str
    capability: tuple[int, int]
    shared: int  # bytes of shared memory that one program may have
    multiprocessors: int


class Plan(NamedTuple):
    """A schedule with its tiles: batch rows, units and, but for `resident`, units of the product's inner sum."""

    schedule: str
    BB: int
    BN: int
    BK: int
    warps: int
    stages: int = 2

    def __str__(self) -> str:
        inner = f", {self.BK} at a time" if self.schedule != RESIDENT else ""
        return f"{self.schedule}, {self.BB} rows x {self.BN} units{inner}, {self.warps} warps"


class Problem(NamedTuple):
    """What a plan depends on."""

    gates: int
    H: int
    B: int
    S: int
    itemsize: int
    precision: str  # of products: ieee, tf32, tf32x3
    backward: bool

    @property
    def kind(self) -> str:
        return "half" if self.itemsize == 2 else self.precision


def plan(problem: Problem, limits: Limits, schedule: str | None = None) -> tuple[Plan, str]:
    """The plan for `problem` on a device, and why.

    Args:
        schedule: the one to take, if any.

    Raises:
        RuntimeError: the schedule asked for does not fit, with the reason.
    """
    if schedule is not None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
        found, why_not = _of(schedule, problem, limits)
        if found is None:
            raise RuntimeError(f"schedule {schedule!r} cannot run this call: {why_not}")
        return found, "asked for"
    reasons: list[str] = []
    for name in SCHEDULES:
        found, reason = _of(name, problem, limits)
        if found is not None:
            return found, "; ".join([*reasons, reason])
        reasons.append(f"not {name}: {reason}")
    raise AssertionError("unreachable: stepwise takes everything")


def candidates(problem: Problem, limits: Limits) -> list[Plan]:
    """Every plan worth a measurement."""
    found = [p for name in SCHEDULES if (p := _of(name, problem, limits)[0]) is not None]
    others = [p._replace(warps=w) for p in found for w in (4, 8) if w != p.warps]
    if problem.B > ROWS:
        others += [p._replace(BB=2 * p.BB) for p in found if p.schedule != STEPWISE]
    return [p for p in found + others if not misfit(p, problem, limits)]


def misfit(p: Plan, problem: Problem, limits: Limits) -> str | None:
    """Why a plan cannot be launched, or None."""
    need = shared(p, problem)
    if need > limits.shared:
        return f"{need >> 10} KiB of shared memory, of which a program may have {limits.shared >> 10}"
    if p.schedule == PERSISTENT and (n := programs(p, problem)) > limits.multiprocessors:
        return f"{n} programs, of which {limits.multiprocessors} run at once"
    return None


def programs(p: Plan, problem: Problem) -> int:
    tiles = -(-problem.B // p.BB) * problem.S
    return tiles if p.schedule == RESIDENT else tiles * -(-problem.H // p.BN)


def shared(p: Plan, problem: Problem) -> int:
    """Shared memory of one program in bytes, at most: the operands of its products, and values that change hands."""
    G, item = problem.gates, problem.itemsize
    parts = 2 if problem.kind == "tf32x3" else 1  # the rounded operand and what is left of it
    if p.schedule == RESIDENT:
        operands = (2 * G + 1 if problem.backward else 1) * p.BB * p.BN * 4
        return parts * (G * p.BN * p.BN * item + operands)
    if p.schedule == PERSISTENT:
        return parts * (G * _up(problem.H, p.BK) * p.BN * item + p.BB * p.BK * item)
    blocks = 1 if problem.backward else G
    return parts * p.stages * (blocks * p.BK * p.BN + p.BB * p.BK) * item + p.BB * p.BN * 4


def _of(schedule: str, problem: Problem, limits: Limits) -> tuple[Plan | None, str]:
    return _RULES[schedule](problem, limits)


def _resident(problem: Problem, limits: Limits) -> tuple[Plan | None, str]:
    units = max(ROWS, 1 << (problem.H - 1).bit_length())
    if units > _RESIDENT[problem.kind]:
        return None, f"H={problem.H} is beyond {_RESIDENT[problem.kind]}"
    p = Plan(RESIDENT, ROWS, units, 0, 8 if units >= 64 else 4)
    why_not = misfit(p, problem, limits)
    return (None, why_not) if why_not else (p, "W_hh fits one program")


def _persistent(problem: Problem, limits: Limits) -> tuple[Plan | None, str]:
    if problem.H > _PERSISTENT[problem.kind]:
        return None, f"H={problem.H} is beyond {_PERSISTENT[problem.kind]}"
    why_not: str | None = None
    for rows in (16, 32, 64):
        p = Plan(PERSISTENT, rows, UNITS, *_INNER[problem.kind])
        why_not = misfit(p, problem, limits)
        if why_not is None:
            return p, f"W_hh fits {-(-problem.H // UNITS)} programs a batch tile, {programs(p, problem)} in all"
    return None, str(why_not)


def _stepwise(problem: Problem, limits: Limits) -> tuple[Plan | None, str]:
    rows = 16 if problem.B <= 16 else 32 if problem.B <= 64 else 64
    p = Plan(STEPWISE, rows, 32, 64 if problem.itemsize == 2 else 32, 4, 3)
    if misfit(p, problem, limits):
        p = p._replace(stages=2)
    return p, "takes any size"


def _up(n: int, block: int) -> int:
    return -(-n // block) * block


_RULES = {RESIDENT: _resident, PERSISTENT: _persistent, STEPWISE: _stepwise}
