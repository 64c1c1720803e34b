"""Read a plain number exactly: the fast path for most golds of most datasets."""

import re
from fractions import Fraction

from rewards.math.normalize import normalize_text

# No plain number is longer, and the cap bounds the cost.
MAX_CHARS = 200

_DECIMAL = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_DRESS = re.compile(r"\\[,;!:> ]|\\(?:left|right|displaystyle)(?![a-zA-Z])|[$\s]|\{,\}")
_SPACED = re.compile(r"\d(?:\s|\\[,;:!> ])+\d")  # 1 000 or 4 2: left to the parser
_PLAIN = re.compile(rf"([+-]?)({_DECIMAL})")
_RATIO = re.compile(rf"([+-]?)({_DECIMAL})/({_DECIMAL})")
_FRAC = re.compile(rf"([+-]?)\\[dtc]?frac\{{([+-]?)({_DECIMAL})\}}\{{({_DECIMAL})\}}")


def parse_number(text: str) -> Fraction | None:
    """Return the exact value of an integer, decimal or fraction, None if ``text`` is not one.

    Reads ``-1,234.50``, ``3/4``, ``\\frac{3}{4}``, in and out of ``$``. ``0.5`` is exactly 1/2;
    nothing is rounded. Commas group thousands only where the grouping is right (``1,234``).
    """
    if len(text) > MAX_CHARS:
        return None
    if not text.isascii():
        text = normalize_text(text)
    if _SPACED.search(text):
        return None
    text = _DRESS.sub(lambda m: "," if m.group() == "{,}" else "", text)
    if match := _PLAIN.fullmatch(text):
        sign, value = match.groups()
        return _signed(sign, _exact(value))
    if match := _RATIO.fullmatch(text):
        sign, top, bottom = match.groups()
        return _divide(_signed(sign, _exact(top)), _exact(bottom))
    if match := _FRAC.fullmatch(text):
        outer, inner, top, bottom = match.groups()
        return _divide(_signed(outer, _signed(inner, _exact(top))), _exact(bottom))
    return None


def _exact(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").rstrip("."))


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _divide(top: Fraction, bottom: Fraction) -> Fraction | None:
    return top / bottom if bottom else None
