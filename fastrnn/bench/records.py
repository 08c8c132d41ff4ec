"""What a record must hold, by its kind, and what a file of records was made with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fastrnn.bench.shapes import CELLS

Record = dict[str, Any]
Rule = type | tuple[type, ...] | Callable[[Any], bool] | dict[str, Any]
SETUP = ("subject", "backend", "malloc", "apart", "commit", "torch", "fastrnn")  # alike in all that one file holds
CONDITIONS = ("malloc", "apart")  # alike in whatever is compared


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def positive(value: Any) -> bool:
    return number(value) and value > 0


def count(value: Any) -> bool:
    return isinstance(value, int) and number(value) and value >= 0


def cell(value: Any) -> bool:
    return value in CELLS


def gpu(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and isinstance(value.get("name"), str))


def clock(value: Any) -> bool:
    return not value or (isinstance(value, dict) and number(value.get("now")))


def info(value: Any) -> bool:
    return not value or isinstance(value, dict)


def ratios(value: Any) -> bool:
    """Of peers: a median, or why there is none."""
    if not isinstance(value, dict):
        return value is None
    return all(
        isinstance(p, dict) and ("absent" in p or fault_in(p, {"ratio": {"p50": positive}}) is None)
        for p in value.values()
    )


def pairs(value: Any) -> bool:
    """Of an environment's peers: names, and whether they are there."""
    return value is None or (isinstance(value, list) and all(isinstance(v, list) and len(v) == 2 for v in value))


def names(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(isinstance(v, list) for v in value.values()))


def numbers(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(number, value.values())))


def bound(value: Any) -> bool:
    shares: dict[str, Rule] = {"share": {"baseline": number, "subject": number}, "seconds": number, "limit": str}
    return value is None or (isinstance(value, dict) and fault_in(value, shares) is None)


_SPAN: dict[str, Rule] = {"p20": positive, "p50": positive, "p80": positive}
_TAIL: dict[str, Rule] = {"p50": positive, "p99": positive}
_KEY: dict[str, Rule] = {"case": str, "cell": cell, "mode": str, "threads": count}
_TEXT = (str, type(None))
REQUIRED: dict[str, dict[str, Rule]] = {
    "environment": {
        "cpu": str, "flags": list, "cores": count, "load": number, "malloc": str, "torch": str, "subject": str,
        "fastrnn": _TEXT, "commit": _TEXT, "python": str, "date": str, "command": str, "info": info, "variables": dict,
    },
    "measurement": {
        **_KEY, "rounds": count, "baseline": _SPAN, "subject": _SPAN, "ratio": _SPAN, "flops": number,
        "gemm": lambda value: value is None or positive(value), "chosen": str,
    },
    "latency": {**_KEY, "steps": count, "baseline": _TAIL, "subject": _TAIL},
    "memory": {**_KEY, "baseline": number, "subject": number},
    "failure": {**_KEY, "what": str, "message": str},
    "note": {"message": str},
    "ddp": {"world": count, "threads": count, "baseline": _SPAN, "subject": _SPAN, "ratio": _SPAN},
}  # fmt: skip
OPTIONAL: dict[str, Rule] = {
    "dtype": str, "device": str, "gpu": gpu, "clock": clock, "backend": str, "T": count, "B": count, "I": count,
    "H": count, "layers": count, "bidirectional": bool, "form": str, "tokens": count, "bound": bound, "peers": ratios,
    "kernels": names, "joules": numbers, "pass": count, "passes": count,
}  # fmt: skip
SHAPE = ("T", "B", "H", "layers", "bidirectional", "form")  # all of them, or none in the oldest records


def fault(record: Any) -> str | None:
    """What keeps `record` from being one, in a few words; None if nothing does."""
    kind = record.get("kind") if isinstance(record, dict) else None
    if not isinstance(kind, str):
        return "it has no kind"
    if kind not in REQUIRED:
        return f"there is no kind {kind!r}"
    wrong = fault_in(record, REQUIRED[kind])
    if wrong:
        return f"{kind}: {wrong}"
    optional = {name: rule for name, rule in OPTIONAL.items() if name in record}
    if kind == "environment" and "peers" in record:
        optional["peers"] = pairs
    if kind == "environment" and record.get("device") == "cuda":
        optional["gpu"] = {"name": str}
    if kind == "measurement" and any(name in record for name in SHAPE):
        optional |= {name: OPTIONAL[name] for name in SHAPE}
    wrong = fault_in(record, optional)
    return f"{kind}: {wrong}" if wrong else None


def fault_in(record: Record, rules: dict[str, Rule]) -> str | None:
    """The first field of `rules` that is missing or is not what its rule says."""
    for name, rule in rules.items():
        if name not in record:
            return f"{name} is missing"
        value = record[name]
        if isinstance(rule, dict):
            inner = fault_in(value, rule) if isinstance(value, dict) else "is no object"
            if inner:
                return f"{name}: {inner}"
        elif not (isinstance(value, rule) if isinstance(rule, (type, tuple)) else rule(value)):
            return f"{name} cannot be {value!r:.40}"
    return None


def setups(records: Sequence[Record]) -> list[Record]:
    """SETUP of each environment. The oldest do not tell the backend, as the first measurement does, nor whether they
    are of one process, as they are."""
    first = next((r.get("backend") for r in records if r["kind"] == "measurement"), None)
    found = [r for r in records if r["kind"] == "environment"]
    defaults = {"backend": first, "apart": False}
    return [{name: r.get(name, defaults.get(name)) for name in SETUP} for r in found]
