"""Two runs beside each other: what has become slower, or faster, by more than two runs of the same code differ.

Ratios over torch.nn are compared, since both sides of a ratio were measured in the same rounds; so the runs may come
from different machines. A case has changed when the medians of its passes differ by more than LEAST and by more than
SURE standard errors; on the same hardware and torch our own time must then have changed that way too, by more than
LEAST: else torch.nn's has, which is told as such. The standard deviation of a pass is the case's own, from the few
passes of both runs, drawn towards that of all cases of the older run as if that were PRIOR more passes. The same holds
for the geometric mean of all cases of a number of threads and type, in which a change shows that is too small for one
case. A run whose passes lie further apart than the older one's, NOISIER times, is told: it hides what it would show.
Peak memory has changed when ours differs by more than LEAST and a MiB.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastrnn.bench.environment import read, slug
from fastrnn.bench.passes import KINDS, Group, Key, Noise, group_of, identity, logs, noise
from fastrnn.bench.records import CONDITIONS, setups
from fastrnn.bench.report import MEMORY_RESOLUTION, header
from fastrnn.cli.parser import UsageError

Record = dict[str, Any]
LEAST = 0.05
SURE = 5.0  # docs/benchmarks.md has how many cases of equal code are named at this
PRIOR = 4
NOISIER, ENOUGH = 2.0, 20  # times; degrees of freedom from which a run's noise is itself known well enough
FREEDOM = 2  # degrees of it, from which there is a verdict: a single pair of passes tells nothing
NO_NOISE = "tell by how much passes of the same code differ; measure with --passes 3 --budget 0"


class Change(NamedTuple):
    """A case whose figure has changed; `factor` above 1 is for the better."""

    key: Key
    before: float
    after: float
    factor: float


class Whole(NamedTuple):
    """All cases of a group: by what factor they have changed in the geometric mean, and whether that is a change."""

    mean: float
    changed: bool
    before: Noise
    after: Noise | None
    noisier: bool


class Comparison(NamedTuple):
    """What two runs have in common."""

    regressions: list[Change]
    improvements: list[Change]
    compared: int
    groups: dict[Group, Whole]
    failed: list[Key]  # measured before, now wrong or not to be measured
    unknown: list[Key]  # cases of a group of which neither run tells the noise
    only_before: list[Key]
    only_after: list[Key]
    theirs: list[Change]  # whose ratio has changed, but not our own time

    @property
    def worse(self) -> bool:
        slower = (g.noisier or (g.changed and g.mean < 1) for g in self.groups.values())
        return bool(self.regressions or self.failed) or any(slower)


def failures(records: list[Record]) -> set[Key]:
    """Cases that could not be measured, or gave wrong numbers."""
    return {identity(KINDS[r["what"]], r) for r in records if r["kind"] == "failure" and r["what"] in KINDS}


def by_key(records: list[Record]) -> dict[Key, Record]:
    """Measurements and peaks of memory; the last of each."""
    return {identity(r["kind"], r): r for r in records if r["kind"] in ("measurement", "memory")}


def compare(
    before: list[Record], after: list[Record], least: float = LEAST, sure: float = SURE, same: bool = False
) -> Comparison:
    """What is in both, by what changed. The records are condensed; `same`: of the same hardware and torch."""
    old, new = by_key(before), by_key(after)
    levels = {**noise(new.values()), **noise(old.values())}  # the older run's, where it tells
    levels = {group: level for group, level in levels.items() if level.freedom >= FREEDOM}
    failed = failures(after)
    both = [key for key in old if key in new]
    times = [key for key in both if old[key]["kind"] == "measurement"]
    known = [key for key in times if group_of(old[key]) in levels]
    steps = {key: step(old[key], new[key], levels[group_of(old[key])]) for key in known}
    changes = [
        Change(key, math.exp(s.before), math.exp(s.after), math.exp(s.after - s.before))
        for key, s in steps.items()
        if beyond(s.after - s.before, s.error, least, sure)
    ]
    theirs = [c for c in changes if same and not ours(old[c.key], new[c.key], steps[c.key], least)]
    changes = [c for c in changes if c not in theirs]
    changes += [c for key in both if key not in times if (c := _memory(key, old[key], new[key], least)) is not None]
    groups: dict[Group, list[Step]] = {}
    for key in known:
        groups.setdefault(group_of(old[key]), []).append(steps[key])
    after_noise = noise(new.values())
    return Comparison(
        sorted((c for c in changes if c.factor < 1), key=lambda c: c.factor),
        sorted((c for c in changes if c.factor > 1), key=lambda c: -c.factor),
        len(both) - len(times) + len(known),
        {g: _whole(some, levels[g], after_noise.get(g), least, sure) for g, some in groups.items()},
        [key for key in old if key in failed],
        [key for key in times if key not in steps],
        [key for key in old if key not in new and key not in failed],
        [key for key in new if key not in old],
        theirs,
    )


class Step(NamedTuple):
    """From one run to the other: logarithms of the medians of a case's passes, standard error of their difference."""

    before: float
    after: float
    error: float


def step(old: Record, new: Record, level: Noise) -> Step:
    a, b = logs(old), logs(new)
    squares = sum((x - statistics.fmean(v)) ** 2 for v in (a, b) for x in v)
    variance = (PRIOR * level.deviation**2 + squares) / (PRIOR + len(a) + len(b) - 2)
    return Step(statistics.median(a), statistics.median(b), math.sqrt(variance * (1 / len(a) + 1 / len(b))))


def ours(old: Record, new: Record, found: Step, least: float) -> bool:
    """Whether our own time has changed as the ratio has: longer by more than `least` where that is lower."""
    longer = math.log(new["subject"]["p50"] / old["subject"]["p50"])
    return (longer if found.after < found.before else -longer) > -math.log1p(-least)


def beyond(difference: float, error: float, least: float, sure: float) -> bool:
    """Whether a difference of logarithms is a change."""
    return abs(difference) > max(-math.log1p(-least), sure * error)


def _whole(steps: list[Step], before: Noise, after: Noise | None, least: float, sure: float) -> Whole:
    mean = statistics.fmean(s.after - s.before for s in steps)
    error = math.sqrt(sum(s.error**2 for s in steps)) / len(steps)
    told = after is not None and min(before.freedom, after.freedom) >= ENOUGH
    noisier = told and after is not None and after.deviation > NOISIER * before.deviation
    return Whole(math.exp(mean), beyond(mean, error, least, sure), before, after, noisier)


def _memory(key: Key, old: Record, new: Record, least: float) -> Change | None:
    a, b = float(old["subject"]), float(new["subject"])
    big = abs(a - b) > MEMORY_RESOLUTION and abs(a - b) > least * a
    return Change(key, a / 2**20, b / 2**20, max(a, 1) / max(b, 1)) if big else None


def made_on(records: list[Record]) -> set[tuple[str, str]]:
    """Hardware and torch of each environment."""
    return {(slug(r), r["torch"]) for r in records if r["kind"] == "environment"}


def differing(made: list[Record], other: Record, names: tuple[str, ...] = CONDITIONS) -> str | None:
    """In what one of the setups `made` is another than `other`; None: in nothing."""
    name = next((n for n in names if any(m[n] != other[n] for m in made)), None)
    return name and f"made with {name} {made[-1][name]}, not {other[name]}"


def describe(key: Key) -> str:
    kind, case, cell, mode, threads, dtype, device = key
    return f"{cell} {case} {mode} {_where((device, threads, dtype))}" + (", peak MiB" if kind == "memory" else "")


def _where(group: Group) -> str:
    device, threads, dtype = group
    return f"{dtype}, {f'{threads} thread' + 's' * (threads > 1) if threads else device}"


def text(found: Comparison) -> str:
    """Each change in a line."""
    rows = [f"{found.compared} cases compared, as torch.nn / fastrnn: {len(found.regressions)} regressions"]
    for group, whole in sorted(found.groups.items()):
        rows.append(_line(group, whole))
    for title, changes in (("REGRESSION", found.regressions), ("improvement", found.improvements)):
        rows += [f"{title:12}{c.before:8.2f} -> {c.after:8.2f}  ({c.factor:.2f})  {describe(c.key)}" for c in changes]
    alone = ((c, "slower" if c.factor > 1 else "faster") for c in found.theirs)
    rows += [f"torch.nn alone has become {how}: {c.before:.2f} -> {c.after:.2f}  {describe(c.key)}" for c, how in alone]
    rows += [f"FAILED in the new run: {describe(key)}" for key in found.failed]
    if found.unknown:
        rows.append(f"not compared: {len(found.unknown)} cases of which the records do not {NO_NOISE}")
    for title, keys in (("old", found.only_before), ("new", found.only_after)):
        if keys:
            rows.append(f"in the {title} run only: {len(keys)}, the first of them {describe(keys[0])}")
    return "\n".join(rows)


def _line(group: Group, whole: Whole) -> str:
    deviations = [n.deviation for n in (whole.before, whole.after) if n is not None]
    told = " and ".join(f"{d:.1%}" for d in deviations)
    line = f"{_where(group)}: passes deviate by {told}; geometric mean of all cases {whole.mean:.3f}"
    if whole.changed:
        line += ", a REGRESSION" if whole.mean < 1 else ", an improvement"
    return line + (", the new run is NOISIER: measure it again" if whole.noisier else "")


def command(old: str, new: str, echo: Callable[[str], None]) -> int:
    """Exit code 1 if something has become slower, or noisier.

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
    if why := differing(setups(before), setups(after)[0]):
        raise UsageError(f"--compare: {old} was {why}, as {new} was")
    found = compare(before, after, same=made_on(before) == made_on(after) and len(made_on(after)) == 1)
    if not found.compared and not found.failed:
        why = f"do not {NO_NOISE}" if found.unknown else "have no case in common"
        raise UsageError(f"--compare: {old} and {new} {why}")
    echo("\n".join(headers))
    echo(text(found))
    return 1 if found.worse else 0
