"""Two runs beside each other: what has become slower, or faster, by more than two runs of the same code differ.

Ratios over torch.nn are compared, since both sides of a ratio were measured in the same rounds; so the runs may come
from different machines. A case has changed when none of the passes of one run is within those of the other, and the
medians differ by more than LEAST and by more than the noise: what passes of the same code differ by, in all but one of
twenty pairs, in either run (`fastrnn.bench.passes`). A run of a single pass has the span of its rounds, p20 to p80, for
passes. Peak memory has changed when ours differs by more than LEAST and a MiB.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastrnn.bench.environment import read, slug
from fastrnn.bench.measure import geomean
from fastrnn.bench.passes import Group, Key, group_of, identity, noise
from fastrnn.bench.report import MEMORY_RESOLUTION, header
from fastrnn.cli.parser import UsageError

Record = dict[str, Any]
LEAST = 0.05
NO_NOISE = "tell by how much two passes of the same code differ; measure at least one of them with --passes 3"


class Change(NamedTuple):
    """A case whose figure has changed; `factor` above 1 is for the better."""

    key: Key
    before: float
    after: float
    factor: float


class Comparison(NamedTuple):
    """What two runs have in common; `noise` and `mean`, the geometric mean of all factors, by device and threads."""

    regressions: list[Change]
    improvements: list[Change]
    compared: int
    noise: dict[Group, float]
    mean: dict[Group, float]
    unknown: list[Key]  # cases of a group without passes: no noise to hold them against
    only_before: list[Key]
    only_after: list[Key]


def by_key(records: list[Record]) -> dict[Key, Record]:
    """Measurements and peaks of memory; the last of each."""
    return {identity(r["kind"], r): r for r in records if r["kind"] in ("measurement", "memory")}


def compare(before: list[Record], after: list[Record], least: float = LEAST) -> Comparison:
    """What is in both, by what changed. The records are condensed."""
    old, new = by_key(before), by_key(after)
    levels = noise([*old.values(), *new.values()])
    both = [key for key in old if key in new]
    unknown = [k for k in both if old[k]["kind"] == "measurement" and group_of(old[k]) not in levels]
    judged = [key for key in both if key not in unknown]
    changes = [c for key in judged if (c := _change(key, old[key], new[key], levels, least)) is not None]
    factors: dict[Group, list[float]] = {}
    for key in judged:
        if old[key]["kind"] == "measurement":
            factors.setdefault(group_of(old[key]), []).append(new[key]["ratio"]["p50"] / old[key]["ratio"]["p50"])
    return Comparison(
        sorted((c for c in changes if c.factor < 1), key=lambda c: c.factor),
        sorted((c for c in changes if c.factor > 1), key=lambda c: -c.factor),
        len(judged),
        levels,
        {group: geomean(values) for group, values in factors.items()},
        unknown,
        [key for key in old if key not in new],
        [key for key in new if key not in old],
    )


def _change(key: Key, old: Record, new: Record, levels: dict[Group, float], least: float) -> Change | None:
    if old["kind"] == "memory":
        a, b = float(old["subject"]), float(new["subject"])
        big = abs(a - b) > MEMORY_RESOLUTION and abs(a - b) > least * a
        return Change(key, a / 2**20, b / 2**20, max(a, 1) / max(b, 1)) if big else None
    (low_a, high_a), (low_b, high_b) = _span(old), _span(new)
    factor = new["ratio"]["p50"] / old["ratio"]["p50"]
    enough = max(levels[group_of(old)], 1 / (1 - least))
    if (low_b <= high_a and low_a <= high_b) or 1 / enough <= factor <= enough:
        return None
    return Change(key, old["ratio"]["p50"], new["ratio"]["p50"], factor)


def _span(r: Record) -> tuple[float, float]:
    """Of the medians of its passes; of a single pass, of its rounds."""
    passes = r.get("passes") or []
    return (min(passes), max(passes)) if len(passes) > 1 else (r["ratio"]["p20"], r["ratio"]["p80"])


def describe(key: Key) -> str:
    kind, case, cell, mode, threads, dtype, device = key
    return f"{cell} {case} {mode} {dtype}, {_where((device, threads))}" + (", peak MiB" if kind == "memory" else "")


def _where(group: Group) -> str:
    device, threads = group
    return f"{threads} thread{'s' * (threads > 1)}" if threads else device


def text(found: Comparison) -> str:
    """Each change in a line."""
    rows = [f"{found.compared} cases compared, as torch.nn / fastrnn: {len(found.regressions)} regressions"]
    for group, mean in sorted(found.mean.items()):
        rows.append(f"{_where(group)}: noise {found.noise[group]:.2f}, geometric mean of all cases {mean:.3f}")
    for title, changes in (("REGRESSION", found.regressions), ("improvement", found.improvements)):
        rows += [f"{title:12}{c.before:8.2f} -> {c.after:8.2f}  ({c.factor:.2f})  {describe(c.key)}" for c in changes]
    if found.unknown:
        rows.append(f"not compared: {len(found.unknown)} cases of which the files do not {NO_NOISE}")
    for title, keys in (("old", found.only_before), ("new", found.only_after)):
        if keys:
            rows.append(f"in the {title} run only: {len(keys)}, the first of them {describe(keys[0])}")
    return "\n".join(rows)


def command(old: str, new: str, echo: Callable[[str], None]) -> int:
    """Exit code 1 if something has become slower.

    Raises:
        UsageError: a file is none of records, or they have nothing in common that can be compared.
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
        why = f"do not {NO_NOISE}" if found.unknown else "have no case in common"
        raise UsageError(f"--compare: {old} and {new} {why}")
    echo("\n".join(headers))
    echo(text(found))
    return 1 if found.regressions else 0
