"""Numbers, fractions and phrases that are written in words, as LaTeX."""

import re

_ENGLISH = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SMALL = {word: number for number, word in enumerate(_ENGLISH)}
_SMALL |= {word: 20 + 10 * number for number, word in enumerate(_TENS)}
_SCALES = {"hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9}
_PARTS = {
    "half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6,
    "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10, "twelfth": 12, "hundredth": 100,
}  # fmt: skip
_PARTS |= {word + "s": number for word, number in _PARTS.items() if word != "halves"}

_DIGITS = {c: n for n, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}
_CJK_SCALES = {"十": 10, "百": 100, "千": 1_000, "万": 10**4, "亿": 10**8}
_NUMERAL = "[零〇一二三四五六七八九十百千万亿两]{1,12}"
_CJK_NUMBER = rf"(?:{_NUMERAL}|\d{{1,9}}(?:\.\d{{1,9}})?)"
_CJK_PERCENT = re.compile(rf"(负?)百分之({_CJK_NUMBER})(?:点({_NUMERAL}))?")
_CJK_FRACTION = re.compile(rf"(?<!百)({_CJK_NUMBER})分之({_CJK_NUMBER})")
# A numeral alone, or with the word that counts: 十二个, not 三角形.
_CJK_COUNT = re.compile(
    rf"(负?)({_NUMERAL})(?:点({_NUMERAL}))?"
    r"((?:[个只名种位本张条人次天元岁件支辆棵朵块组步页台米克吨秒年月度分]|千克|厘米|分米|千米|公里|分钟|小时|平方米|立方米)?)"
)
_WORDS = re.compile(r"[a-z]+(?:[ -][a-z]+){0,12}", re.IGNORECASE)


def spell_numbers(text: str) -> str:
    """Return ``text`` with a number in words as digits: "two thirds", 百分之五, 十二个."""
    if text.isascii():
        return _read_english(text) or text if _WORDS.fullmatch(text) else text
    text = _CJK_PERCENT.sub(lambda m: _minus(m) + _read_cjk(m.group(2), m.group(3)) + "\\%", text)
    text = _CJK_FRACTION.sub(
        lambda m: rf"\frac{{{_read_cjk(m.group(2))}}}{{{_read_cjk(m.group(1))}}}", text
    )
    text = re.sub(r"(?:零下|负)\s?(?=\d)", "-", text)
    if match := _CJK_COUNT.fullmatch(text):
        return _minus(match) + _read_cjk(match.group(2), match.group(3)) + match.group(4)
    return text


def _minus(match: re.Match[str]) -> str:
    return "-" if match.group(1) else ""


def _read_cjk(numeral: str, decimals: str | None = None) -> str:
    """``二百零五`` is 205, ``二〇二四`` is 2024."""
    if numeral.isascii():
        return numeral
    if all(char in _DIGITS for char in numeral):
        whole = "".join(str(_DIGITS[char]) for char in numeral)
    else:
        total = section = digit = 0
        for char in numeral:
            if char in _DIGITS:
                digit = _DIGITS[char]
            elif _CJK_SCALES[char] >= 10**4:
                total, section, digit = (total + section + digit) * _CJK_SCALES[char], 0, 0
            else:
                section, digit = section + (digit or 1) * _CJK_SCALES[char], 0
        whole = str(total + section + digit)
    return whole + ("." + "".join(str(_DIGITS.get(c, 0)) for c in decimals) if decimals else "")


def _read_english(text: str) -> str | None:
    """``twenty-one``, ``three quarters``, ``two and a half``; None if it is no number alone."""
    words = text.lower().replace("-", " ").split()
    sign = ""
    if words[0] in ("minus", "negative"):
        sign, words = "-", words[1:]
    if words and words[-1] in _PARTS and words[-1] not in ("second", "seconds"):
        part = _PARTS[words.pop()]
        if "and" in words:
            split = len(words) - 1 - words[::-1].index("and")
            whole, top = _read_whole(words[:split]), _read_whole(words[split + 1 :] or ["one"])
            if whole is None or top is None or top >= part:
                return None
            return rf"{sign}\frac{{{whole * part + top}}}{{{part}}}"
        top = _read_whole(words) if words else (1 if part == 2 else None)
        return None if top is None else rf"{sign}\frac{{{top}}}{{{part}}}"
    value = _read_whole(words) if words and words[0] not in ("a", "an") else None
    return None if value is None else f"{sign}{value}"


def _read_whole(words: list[str]) -> int | None:
    total = section = 0
    last = 10**12  # what the next word must be smaller than, within a section
    for index, word in enumerate(words):
        if word in ("a", "an") and index == 0:
            section, last = 1, 1
        elif word in _SMALL:
            number = _SMALL[word]
            if (last < 20 and last != 10**12) or (last < 100 and number >= 10) or number >= last:
                return None
            section, last = section + number, number or 1
        elif word in _SCALES and section:
            scale = _SCALES[word]
            if scale == 100:
                section, last = section * 100, 100
            else:
                total, section, last = total + section * scale, 0, 10**12
        elif word != "and" or not index or index == len(words) - 1:
            return None
        elif last < 100 and section:
            return None  # three and four
    return total + section if words else None
