"""Numbers and texts as a reader sees them."""

from __future__ import annotations

import html
import json
from typing import Any

__all__ = [
    "deviation_si",
    "milliseconds",
    "number",
    "percent",
    "plotly_text",
    "points",
    "setting_text",
    "shortened",
    "si",
]


def number(value: float, form: str) -> str:
    """A number in a format of Python, with a typographic minus sign, and no sign where it rounds to zero.

    Example:
        >>> number(-1.25, ".1f"), number(-0.001, "+.1f")
        ('−1.2', '0.0')
    """
    text = f"{value:{form}}"
    if not float(text):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def percent(share: float) -> str:
    """A share in percent.

    Example:
        >>> percent(0.4567)
        '45.7%'
    """
    return f"{number(100 * share, '.1f')}%"


def points(difference: float) -> str:
    """A difference of two shares, in percentage points.

    Example:
        >>> points(0.0123)
        '+1.2'
    """
    return number(100 * difference, "+.1f")


def milliseconds(seconds: float) -> str:
    """A time in milliseconds, with three digits.

    Example:
        >>> milliseconds(0.012345)
        '12.3 ms'
    """
    return f"{float(f'{1e3 * seconds:.3g}'):g} ms"


def si(value: float) -> str:
    """Three digits and an SI prefix, as plotly writes them beside an axis.

    Example:
        >>> si(763_520), si(999.6)
        ('764k', '1.00k')
    """
    power, decimals = _scale(value)
    return f"{float(f'{value:.3g}') / 1000**power:.{decimals}f}{_PREFIXES[power]}"


def deviation_si(deviation: float, mean: float) -> str:
    """A standard deviation with the prefix and the decimals of its mean.

    Example:
        >>> deviation_si(2_890, 133_000), deviation_si(0, 133_000)
        ('3k', '0')
    """
    if deviation == 0:
        return "0"
    power, decimals = _scale(mean)
    return f"{deviation / 1000**power:.{decimals}f}{_PREFIXES[power]}"


_PREFIXES = ("", "k", "M", "G", "T")


def _scale(value: float) -> tuple[int, int]:
    """The power of 1000 of the prefix, and the decimals that make three digits."""
    rounded = float(f"{value:.3g}")
    power = min(len(f"{abs(rounded):.0f}") - 1, 12) // 3
    return power, max(0, 3 - len(f"{abs(rounded / 1000**power):.0f}"))


def setting_text(value: Any) -> str:
    """The value of a setting as it is written in YAML.

    Example:
        >>> setting_text("digits"), setting_text(None), setting_text([0.6, 0.4])
        ('digits', 'null', '[0.6, 0.4]')
    """
    return value if isinstance(value, str) else json.dumps(value)


def shortened(text: object, limit: int = 40) -> str:
    r"""A text in one line, with an ellipsis where it is longer than a limit.

    Example:
        >>> shortened("a  long\nname", limit=6)
        'a lon…'
    """
    line = " ".join(str(text).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def plotly_text(text: object, limit: int = 40) -> str:
    """A shortened text that plotly shows as it is; unescaped, plotly would interpret tags in it.

    Example:
        >>> plotly_text("<b>cat</b>")
        '&lt;b&gt;cat&lt;/b&gt;'
    """
    return html.escape(shortened(text, limit), quote=False)
