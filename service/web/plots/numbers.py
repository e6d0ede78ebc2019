"""Numbers as people read them."""

import math


def number(value: float | None) -> str:
    """Three significant digits, or all of a whole number; `-` for none.

    >>> number(1234567), number(0.012345), number(-12.34), number(0.0000123), number(None)
    ('1,234,567', '0.0123', '-12.3', '1.23e-05', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.2e}"
    text = f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float | None) -> str:
    """A share as a percentage, of which a small one does not become none at all.

    >>> percent(0.5), percent(0.034), percent(0.00004), percent(0.0), percent(None)
    ('50%', '3.4%', 'below 0.01%', '0%', '-')
    """
    if share is None or not math.isfinite(share):
        return "-"
    if 0 < share < 1e-4:
        return "below 0.01%"
    return f"{number(round(100 * share, 1 if share >= 0.01 else 2))}%"


def seconds(value: float | None) -> str:
    """A duration.

    >>> seconds(0.042), seconds(7.25), seconds(75), seconds(7322), seconds(None)
    ('42 ms', '7.2 s', '1 min 15 s', '2 h 2 min', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    if value < 1:
        return f"{round(1000 * value)} ms"
    if value < 60:
        return f"{value:.1f} s"
    minutes = int(value) // 60
    return f"{minutes} min {int(value) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
