"""Passes: a case measured several times over in one run, built anew each time and with the other cases in between.

How far the passes of the same code lie apart tells by how much another run of it would differ; the rounds of one pass
do not (docs/benchmarks.md has what was measured). A file holds a record for each pass; what reads it takes for each
case the pass in the middle.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]
Key = tuple[Any, ...]
Group = tuple[str, int, str]  # device, threads, type
KINDS = {"timing": "measurement", "latency": "latency", "memory": "memory"}


def identity(kind: str, record: Record) -> Key:
    """By which a record is found again."""
    device, dtype = record.get("device", "cpu"), record.get("dtype", "float32")
    return kind, record["case"], record["cell"], record["mode"], record["threads"], dtype, device


def condensed(records: Sequence[Record]) -> list[Record]:
    """One record for each measured case, in the place of the first: see `middle`. Other records as they are."""
    passes: dict[Key, dict[int, Record]] = {}
    for r in records:
        if r["kind"] == "measurement":
            passes.setdefault(identity(r["kind"], r), {})[r.get("pass", 0)] = r
    found = []
    for r in records:
        if r["kind"] != "measurement":
            found.append(r)
        elif group := passes.pop(identity(r["kind"], r), None):
            found.append(middle(list(group.values())))
    return found


def middle(records: Sequence[Record]) -> Record:
    """Of the passes of a case the one whose ratio has as many above as below it (of an even number, the lower of two).

    It then holds the medians of the ratios of all, as `passes`.
    """
    ordered = sorted(records, key=lambda r: float(r["ratio"]["p50"]))
    return {**ordered[(len(ordered) - 1) // 2], "passes": [r["ratio"]["p50"] for r in records]}


def joined(files: Iterable[Sequence[Record]]) -> list[Record]:
    """Condensed records of several files as of one; of a case that is in several of them, the last file's."""
    found: dict[Any, Record] = {}
    for number, records in enumerate(files):
        for place, r in enumerate(records):
            known = r["kind"] in KINDS.values()
            found[identity(r["kind"], r) if known else (number, place)] = r
    return list(found.values())


def group_of(record: Record) -> Group:
    return record.get("device", "cpu"), record["threads"], record.get("dtype", "float32")


def logs(record: Record) -> list[float]:
    """Of the ratios of a case's passes."""
    return [math.log(ratio) for ratio in record.get("passes") or [record["ratio"]["p50"]]]


class Noise(NamedTuple):
    """Standard deviation of the logarithm of a ratio among passes of the same code, and its degrees of freedom."""

    deviation: float
    freedom: int


def noise(records: Iterable[Record]) -> dict[Group, Noise]:
    """Of each device, number of threads and type of which at least half of the cases have more than one pass.

    `records` are condensed.
    """
    cases: dict[Group, list[list[float]]] = {}
    for r in records:
        if r["kind"] == "measurement":
            cases.setdefault(group_of(r), []).append(logs(r))
    found = {}
    for group, values in cases.items():
        several = [v for v in values if len(v) > 1]
        if 2 * len(several) >= len(values):
            freedom = sum(len(v) - 1 for v in several)
            squares = sum((len(v) - 1) * statistics.variance(v) for v in several)
            found[group] = Noise(math.sqrt(squares / freedom), freedom)
    return found
