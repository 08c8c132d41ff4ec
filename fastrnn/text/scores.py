"""Scores of a classifier from its confusion matrix, and of a regressor from sums of errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class Scores:
    """`loss` is the mean over `count` examples. Of a classifier: accuracy, macro_f1 and `confusion` (n, n), counts by
    true and predicted class. Of a regressor: mae (mean absolute error) and rmse in the targets' units, and r2."""

    loss: float
    count: int
    accuracy: float | None = None
    macro_f1: float | None = None
    confusion: Any = None
    f1: Any = None  # (n,), of each class
    mae: float | None = None
    rmse: float | None = None
    r2: float | None = None

    def figures(self) -> dict[str, float]:
        names = ("loss", "accuracy", "macro_f1", "mae", "rmse", "r2")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def describe(self) -> str:
        if self.confusion is not None:
            return f"accuracy {self.accuracy:.2%}, macro-F1 {self.macro_f1:.4f}, loss {self.loss:.4f} ({self.count:,} examples)"  # noqa: E501
        return f"mean absolute error {self.mae:.4g}, RMSE {self.rmse:.4g}, R2 {self.r2:.4f} ({self.count:,} examples)"

    def table(self, labels: list[str]) -> list[str]:
        """F1 and number of examples of each class, in lines."""
        if self.confusion is None:
            return []
        counts = self.confusion.sum(1).tolist()
        return [
            f"  {label}: F1 {f1:.4f}, {count:,} examples"
            for label, f1, count in zip(labels, self.f1.tolist(), counts, strict=True)
        ]


def class_scores(loss: float, confusion: Tensor) -> Scores:
    """Macro-F1 is the mean of 2 TP / (2 TP + FP + FN) over the classes that occur as true or predicted."""
    hits, both = confusion.diagonal().double(), (confusion.sum(0) + confusion.sum(1)).double()
    f1 = torch.where(both > 0, 2 * hits / both.clamp(min=1), torch.zeros_like(hits))
    count = int(confusion.sum())
    accuracy = hits.sum().item() / max(count, 1)
    return Scores(loss, count, accuracy, f1[both > 0].mean().item(), confusion, f1)


def number_scores(loss: float, count: int, sums: dict[str, float], unit: float) -> Scores:
    """From sums over standardised targets, whose deviation was `unit`."""
    spread = sums["truth_squared"] - sums["truth"] ** 2 / count
    r2 = 1 - sums["squared"] / spread if spread > 0 else 0.0
    mae, rmse = unit * sums["absolute"] / count, unit * (sums["squared"] / count) ** 0.5
    return Scores(loss, count, mae=mae, rmse=rmse, r2=r2)
