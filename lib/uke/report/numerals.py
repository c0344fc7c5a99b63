"""Numbers as a reader sees them: decimals, intervals, powers of ten, and the score with its interval that fills a cell."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import pandas as pd

MISSING = "–"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Score:
    """A cell `mean [low, high]` of a table; `best` is set in bold."""

    mean: float
    low: float | None = None
    high: float | None = None
    best: bool = False

    def __str__(self) -> str:
        return " ".join(filter(None, (self.text, self.note)))

    @property
    def text(self) -> str:
        return number(self.mean, self._decimals)

    @property
    def note(self) -> str:
        return "" if absent(self.low) else bracket(self.low, self.high, self._decimals)

    @property
    def _decimals(self) -> int:
        return min(2, places(self.mean, self.low, self.high))


def absent(value: Any) -> bool:
    """True for None, NaN and pandas' missing values."""
    return value is None or (
        not isinstance(value, (str, list, tuple, dict, Score)) and bool(pd.isna(value))
    )


def places(*values: float | None) -> int:
    """Decimals that give the largest of `values` two or three significant digits, so that an interval shares them."""
    largest = max((abs(value) for value in values if not absent(value)), default=0)
    if not largest:
        return 2
    return next(
        decimals
        for bound, decimals in ((99.95, 0), (9.995, 1), (0.0995, 2), (0, 3))
        if largest >= bound
    )


def number(value: float | None, decimals: int | None = None) -> str:
    """A number in print: proper minus, thousands separated, tiny ones as powers of ten, a dash where there is none."""
    if absent(value):
        return MISSING
    if isinstance(value, Integral):
        return f"{value:,}".replace("-", "−")
    if not math.isfinite(value):
        return "−∞" if value < 0 else "∞"
    if decimals is None and 0 < abs(value) < 1e-2:
        digits, power = f"{value:.1e}".split("e")
        return (
            f"{digits.removesuffix('.0')} × 10{str(int(power)).translate(_SUPERSCRIPTS)}".replace(
                "-", "−"
            )
        )
    text = f"{value:,.{places(value) if decimals is None else decimals}f}"
    return text.replace("-", "−") if text.strip("-0.,") else text.lstrip("-")


def bracket(low: float, high: float, decimals: int | None = None) -> str:
    """An interval in print: [low, high]."""
    decimals = places(low, high) if decimals is None else decimals
    return f"[{number(float(low), decimals)}, {number(float(high), decimals)}]"


def shortened(value: Any, digits: int) -> Any:
    """The same value with numbers of so many digits, however deep they lie: what is stored of a measurement."""
    if isinstance(value, Mapping):
        return {name: shortened(one, digits) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [shortened(one, digits) for one in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
