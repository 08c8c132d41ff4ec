"""Two runs beside each other: what has become slower, or faster, by more than the noise within each.

Ratios over torch.nn are compared, since both sides of a ratio were measured in the same rounds; so the runs may come
from different machines. A case has changed when the spans from p20 to p80 of both runs do not meet and the medians
differ by more than LEAST. The spans are of the rounds of one run: by how much a second run of the same code differs is
not in them. Peak memory has changed when ours differs by more than LEAST and a MiB.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastrnn.bench.environment import read, slug
from fastrnn.bench.report import MEMORY_RESOLUTION, header
from fastrnn.bench.run import identity
from fastrnn.cli.parser import UsageError

Record = dict[str, Any]
LEAST = 0.05
Key = tuple[Any, ...]


class Change(NamedTuple):
    """A case whose figure has changed; `factor` above 1 is for the better."""

    key: Key
    before: float
    after: float
    factor: float


class Comparison(NamedTuple):
    """What two runs have in common."""

    regressions: list[Change]
    improvements: list[Change]
    compared: int
    only_before: list[Key]
    only_after: list[Key]


def by_key(records: list[Record]) -> dict[Key, Record]:
    """Measurements and peaks of memory; the last of each."""
    return {identity(r["kind"], r): r for r in records if r["kind"] in ("measurement", "memory")}


def compare(before: list[Record], after: list[Record], least: float = LEAST) -> Comparison:
    """What is in both, by what changed."""
    old, new = by_key(before), by_key(after)
    both = [key for key in old if key in new]
    changes = [c for key in both if (c := _change(key, old[key], new[key], least)) is not None]
    return Comparison(
        sorted((c for c in changes if c.factor < 1), key=lambda c: c.factor),
        sorted((c for c in changes if c.factor > 1), key=lambda c: -c.factor),
        len(both),
        [key for key in old if key not in new],
        [key for key in new if key not in old],
    )


def _change(key: Key, old: Record, new: Record, least: float) -> Change | None:
    if old["kind"] == "memory":
        a, b = float(old["subject"]), float(new["subject"])
        big = abs(a - b) > MEMORY_RESOLUTION and abs(a - b) > least * a
        return Change(key, a / 2**20, b / 2**20, max(a, 1) / max(b, 1)) if big else None
    a, b = old["ratio"], new["ratio"]
    apart = b["p80"] < a["p20"] or b["p20"] > a["p80"]
    factor = b["p50"] / a["p50"]
    if not apart or 1 - least < factor < 1 / (1 - least):
        return None
    return Change(key, a["p50"], b["p50"], factor)


def describe(key: Key) -> str:
    kind, case, cell, mode, threads, dtype, device = key
    where = f"{threads} threads" if threads else device
    return f"{cell} {case} {mode} {dtype}, {where}" + (", peak MiB" if kind == "memory" else "")


def text(found: Comparison) -> str:
    """Each change in a line."""
    slower = f"{len(found.regressions)} regressions beyond the noise within a run"
    rows = [f"{found.compared} cases compared, as torch.nn / fastrnn: {slower}"]
    for title, changes in (("REGRESSION", found.regressions), ("improvement", found.improvements)):
        rows += [f"{title:12}{c.before:8.2f} -> {c.after:8.2f}  ({c.factor:.2f})  {describe(c.key)}" for c in changes]
    for title, keys in (("old", found.only_before), ("new", found.only_after)):
        if keys:
            rows.append(f"in the {title} run only: {len(keys)}, the first of them {describe(keys[0])}")
    return "\n".join(rows)


def command(old: str, new: str, echo: Callable[[str], None]) -> int:
    """Exit code 1 if something has become slower.

    Raises:
        UsageError: a file is none of records, or they have nothing in common.
    """
    before, after = read(Path(old)), read(Path(new))
    headers = []
    for name, records in ((old, before), (new, after)):
        environment = next((r for r in records if r["kind"] == "environment"), None)
        if environment is None:
            raise UsageError(f"{name}: holds no environment; it is not a whole file of records")
        headers.append(f"{name}  [{slug(environment)}]\n{header(environment)}\n")
    found = compare(before, after)
    if not found.compared:
        raise UsageError(f"--compare: {old} and {new} have no case in common")
    echo("\n".join(headers))
    echo(text(found))
    return 1 if found.regressions else 0
