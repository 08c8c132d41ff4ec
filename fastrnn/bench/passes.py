"""Passes: a case measured several times over in one run, built anew each time and with the other cases in between.

How far the passes of the same code lie apart tells by how much another run of it would differ; the rounds of one pass
do not. A file holds a record for each pass; what reads it takes for each case the pass in the middle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from fastrnn.bench.measure import quantile

Record = dict[str, Any]
Key = tuple[Any, ...]
Group = tuple[str, int]  # device and threads
KINDS = {"timing": "measurement", "latency": "latency", "memory": "memory"}
UNUSUAL = 0.95  # of the pairs of passes differ by less than what is called noise


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


def group_of(record: Record) -> Group:
    return record.get("device", "cpu"), record["threads"]


def noise(records: Iterable[Record]) -> dict[Group, float]:
    """The factor by which two passes of the same code differ, in all but one of twenty pairs.

    For each device and number of threads of which there are cases with more than one pass. `records` are condensed.
    """
    apart: dict[Group, list[float]] = {}
    for r in records:
        for a, b in combinations(r.get("passes") or [], 2):
            apart.setdefault(group_of(r), []).append(abs(math.log(a / b)))
    return {group: math.exp(quantile(factors, UNUSUAL)) for group, factors in apart.items()}
