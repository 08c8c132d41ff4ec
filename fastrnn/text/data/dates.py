"""The default data of translation: dates as people write them, and the ISO date that each means."""

from __future__ import annotations

import datetime
import random

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
FIRST, LAST = datetime.date(1900, 1, 1).toordinal(), datetime.date(2099, 12, 31).toordinal()


def ordinal(day: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st."""
    suffix = "th" if 10 < day % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


def expressions(date: datetime.date) -> list[str]:
    """`date` in every way of writing that says day, month and four-digit year without doubt."""
    d, m, y, month, day = date.day, date.month, date.year, MONTHS[date.month - 1], DAYS[date.weekday()]
    return [
        f"{d} {month} {y}", f"{month} {d}, {y}", f"{month} {ordinal(d)}, {y}", f"the {ordinal(d)} of {month}, {y}",
        f"{ordinal(d)} {month} {y}", f"{d}.{m}.{y}", f"{d:02d}.{m:02d}.{y}", f"{d}-{month[:3]}-{y}",
        f"{day}, {d} {month} {y}", f"{day[:3]}, {d:02d} {month[:3]} {y}", f"{day} the {ordinal(d)} of {month} {y}",
        f"{y}, {month} {d}", f"{month[:3]} {d} {y}", f"{month.upper()} {d}, {y}",
    ]  # fmt: skip


def date_pairs(count: int = 8000, seed: int = 7) -> list[tuple[str, str]]:
    """(expression, ISO date) of `count` days, the same at every call."""
    chosen = random.Random(seed)
    pairs = []
    for number in chosen.sample(range(FIRST, LAST + 1), count):
        date = datetime.date.fromordinal(number)
        pairs.append((chosen.choice(expressions(date)), date.isoformat()))
    return pairs
