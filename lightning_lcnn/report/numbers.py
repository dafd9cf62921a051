"""Numbers as text, and numbers compared."""

from __future__ import annotations

import math

from lightning_lcnn.plots.grouping import Spread

_DIGITS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None, digits: int = 3) -> str:
    """A few significant digits.

    Example:
        >>> number(0.012345), number(27.456), number(26300.0), number(1.234e9), number(None)
        ('0.0123', '27.5', '26,300', '1.23×10⁹', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return text
    if 1000 <= abs(value) < 1e6:
        return f"{float(text):,.0f}"
    mantissa, exponent = text.split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_DIGITS)}"


def percent(value: float | None) -> str:
    """A fraction in percent with one decimal.

    Example:
        >>> percent(0.9866)
        '98.7 %'
    """
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def spread_text(spread: Spread | None, as_percent: bool = False) -> str:
    """Mean, and ± the standard deviation of several seeds.

    Example:
        >>> spread_text(Spread(0.987, 0.003, 5), as_percent=True)
        '98.7 ± 0.3 %'
    """
    if spread is None:
        return "–"
    if math.isnan(spread.deviation):
        return percent(spread.mean) if as_percent else number(spread.mean)
    if as_percent:
        return f"{100 * spread.mean:.1f} ± {100 * spread.deviation:.1f} %"
    return f"{number(spread.mean)} ± {number(spread.deviation, 2)}"


def against(value: float, baseline: float, points: bool = False) -> str:
    """A value relative to the baseline's, in points of percent or as a factor.

    Example:
        >>> against(1.0, 27.9), against(30.0, 20.0), against(0.986, 0.987, points=True)
        ('27.9× lower', '1.5× higher', '−0.1 points')
    """
    if points:
        difference = f"{100 * (value - baseline):+.1f}".replace("-", "−")
        return f"{difference} points" if difference not in ("+0.0", "−0.0") else "equal"
    if value <= 0 or baseline <= 0:
        return ""
    factor = number(max(value, baseline) / min(value, baseline))
    return "equal" if factor == "1" else f"{factor}× {'lower' if value < baseline else 'higher'}"
