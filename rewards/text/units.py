"""Units of measurement: their spellings, and what each is in base units.

A unit is a tuple of names and powers in alphabetical order: ``(("meter", 1), ("second", -1))``.
"""

# Tables: a line of Chinese is wide for its number of characters.
# ruff: noqa: E501

from fractions import Fraction
from itertools import product

Unit = tuple[tuple[str, int], ...]

_PREFIXES = {
    "k": 3, "M": 6, "G": 9, "T": 12, "c": -2, "m": -3, "u": -6, "μ": -6, "n": -9, "p": -12,
}  # fmt: skip
_PREFIX_WORDS = {
    "kilo": "k", "mega": "M", "giga": "G", "centi": "c", "deci": "d", "milli": "m", "micro": "u",
    "nano": "n", "pico": "p",
}  # fmt: skip
# Symbol, and the words for it.
_PREFIXED = {
    "m": "meter metre", "g": "gram", "s": "second", "A": "ampere amp", "V": "volt", "W": "watt",
    "J": "joule", "N": "newton", "Pa": "pascal", "Hz": "hertz", "L": "liter litre", "mol": "mole",
    "eV": "electronvolt", "Ω": "ohm", "F": "farad", "T": "tesla", "Wb": "weber", "B": "byte",
    "cal": "calorie", "Wh": "watthour", "bar": "bar",
}  # fmt: skip
_SPELLINGS = {
    "dm": "dm 分米", "mm": "毫米", "cm": "厘米 公分", "km": "千米 公里", "m": "米", "um": "微米",
    "nm": "纳米", "inch": "inch inches in 英寸", "foot": "foot feet ft 英尺", "yard": "yard yards yd",
    "mile": "mile miles mi 英里", "mg": "毫克", "g": "克", "kg": "kgs 千克 公斤", "jin": "斤",
    "pound": "pound pounds lb lbs", "ounce": "ounce ounces oz", "ton": "ton tons tonne tonnes 吨",
    "s": "sec secs 秒 秒钟", "minute": "minute minutes min mins 分钟", "fen": "分",
    "hour": "hour hours hr hrs h 小时 时 个小时 点 点钟", "day": "day days 天 日", "week": "week weeks 周",
    "month": "month months 月 个月", "year": "year years yr yrs 年",
    "dollar": "dollar dollars usd bucks 美元", "cent": "cent cents", "euro": "euro euros eur 欧元",
    "sterling": "gbp sterling 英镑", "pence": "pence penny", "yen": "yen jpy 日元",
    "rupee": "rupee rupees inr rs", "yuan": "yuan rmb cny 元 块 块钱 元钱", "jiao": "角 毛",
    "l": "升", "ml": "毫升", "gallon": "gallon gallons gal 加仑", "degree": "degree degrees deg degs 度",
    "radian": "radian radians rad rads", "mph": "mph", "kph": "kph kmh", "%": "percent pct",
    "celsius": "celsius 摄氏度", "fahrenheit": "fahrenheit 华氏度", "kelvin": "kelvin kelvins",
    "unit": "unit units 单位", "am": "am", "pm": "pm", "hectare": "hectare hectares ha 公顷",
    "acre": "acre acres", "mu": "亩", "N": "牛 牛顿", "J": "焦 焦耳", "W": "瓦 瓦特", "kW": "千瓦",
    "V": "伏 伏特", "A": "安 安培", "mA": "毫安", "Pa": "帕 帕斯卡", "Hz": "赫兹", "Ω": "欧姆 欧 Omega",
    "kWh": "千瓦时", "molar": "M", "coulomb": "C coulomb coulombs", "rpm": "rpm", "arcminute": "arcmin",
}  # fmt: skip

# The base units that a name may stand for, and how many of them it is.
_BASE = {
    "m": "m", "g": "g", "s": "s", "A": "A", "mol": "mol", "B": "B", "kelvin": "K",
    "V": "1000 g m2 s-3 A-1", "W": "1000 g m2 s-3", "J": "1000 g m2 s-2", "N": "1000 g m s-2",
    "Pa": "1000 g m-1 s-2", "Hz": "s-1", "L": "1/1000 m3", "Ω": "1000 g m2 s-3 A-2",
    "F": "1/1000 g-1 m-2 s4 A2", "T": "1000 g s-2 A-1", "Wb": "1000 g m2 s-2 A-1",
    "coulomb": "A s", "eV": "eV", "cal": "523/125*1000 g m2 s-2", "Wh": "3600000 g m2 s-2",
    "bar": "100000000 g m-1 s-2", "dm": "1/10 m", "inch": "127/5000 m", "foot": "381/1250 m",
    "yard": "1143/1250 m", "mile": "201168/125 m", "jin": "500 g", "ton": "1000000 g",
    "ounce": "45359237/1600000 g", "minute": "60 s", "hour": "3600 s", "day": "86400 s",
    "week": "604800 s", "month": "1/12 year", "mph": "1397/3125 m s-1", "kph": "5/18 m s-1",
    "pence": "1/100 sterling", "jiao": "1/10 yuan", "hectare": "10000 m2",
    "mu": "2000/3 m2", "molar": "1000 mol m-3",
}  # fmt: skip
_AMBIGUOUS = {
    "pound": ("45359237/100000 g", "sterling"),
    "fen": ("60 s", "1/100 yuan"),
    "cent": ("1/100 dollar", "1/100 euro"),
}
# Joined names: what a temperature or an area is in words.
POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "平方": 2, "立方": 3}
AFTER_POWER_WORDS = {"squared": 2, "cubed": 3}

# Dimensions with their powers, and the size in base units.
Measure = tuple[frozenset[tuple[str, int]], Fraction]


def _read_base(text: str) -> Measure:
    dimensions: dict[str, int] = {}
    factor = Fraction(1)
    for part in text.split():
        if part[0].isdigit():
            for term in part.split("*"):
                factor *= Fraction(term)
        else:
            name = part.rstrip("-0123456789")
            dimensions[name] = int(part[len(name) :] or 1)
    return frozenset(dimensions.items()), factor


def _build() -> tuple[dict[str, str], dict[str, str], dict[str, tuple[Measure, ...]]]:
    """Return symbols (case counts), words (it does not), and what every name measures."""
    symbols: dict[str, str] = {}
    words: dict[str, str] = {}
    bases = {name: (base,) for name, base in _BASE.items()} | _AMBIGUOUS
    measures = {name: tuple(map(_read_base, texts)) for name, texts in bases.items()}
    for symbol, spelled in _PREFIXED.items():
        symbols[symbol] = symbol
        for prefix, exponent in _PREFIXES.items():
            name = ("u" if prefix == "μ" else prefix) + symbol
            dimensions, factor = measures[symbol][0]
            measures[name] = ((dimensions, factor * Fraction(10) ** exponent),)
            symbols[prefix + symbol] = name
            symbols |= {prefix + "ohm": name} if symbol == "Ω" else {}
        for word in spelled.split():
            plural = word if word == "hertz" else word + "s"
            words |= {word: symbol, plural: symbol}
            for prefix_word, prefix in _PREFIX_WORDS.items():
                words |= {prefix_word + w: prefix + symbol for w in (word, plural)}
    for taken in ("pm", "min", "cT", "cd"):  # words of their own
        symbols.pop(taken, None)
    measures["l"], measures["ml"] = measures["L"], measures["mL"]
    for name, spellings in _SPELLINGS.items():
        for text in spellings.split():
            (symbols if len(text) == 1 and text.isascii() else words)[text] = name
    symbols |= {"l": "l", "K": "kelvin", "ml": "ml", "h": "hour"}
    for symbol in [
        "cm",
        "mm",
        "km",
        "kg",
        "mg",
        "ml",
        "hz",
        "khz",
        "mhz",
        "kj",
        "kpa",
        "kw",
        "kwh",
    ]:
        cased = next(s for s in symbols if s.lower() == symbol)
        words.setdefault(symbol, symbols[cased])
    return symbols, words, measures


SYMBOLS, WORDS, MEASURES = _build()
LONGEST_CJK = 4
# Symbols that are units without a text macro, where they follow a number and end the text.
_BARE = (
    "mm cm dm km nm um mg kg mL dL ms ns us mA uA kA mV kV MV kW MW GW kJ MJ mJ kN MN Pa kPa MPa "
    "GPa Hz kHz MHz GHz eV keV MeV GeV mol mmol cal kcal kWh Wh Wb pF nF uF mF mT kB MB GB"
)
BARE_SYMBOLS = set(_BARE.split())


def find_unit(word: str) -> str | None:
    """Return the name of the unit that ``word`` spells, None if it spells none."""
    return SYMBOLS.get(word) or WORDS.get(word.lower())


def make_unit(parts: list[tuple[str, int]]) -> Unit:
    powers: dict[str, int] = {}
    for name, power in parts:
        powers[name] = powers.get(name, 0) + power
    if "degree" in powers and powers.keys() & {"celsius", "fahrenheit"}:
        del powers["degree"]
    return tuple(sorted((name, power) for name, power in powers.items() if power))


def find_scales(unit: Unit, other: Unit) -> list[Fraction]:
    """How many of ``unit`` one ``other`` is, for every reading in which they measure the same."""
    scales = []
    for a, b in product(_measure(unit), _measure(other)):
        if a[0] == b[0]:
            scales.append(b[1] / a[1])
    return scales


def _measure(unit: Unit) -> list[Measure]:
    """What a unit measures, in each reading, and its size in base units."""
    readings: list[tuple[dict[str, int], Fraction]] = [({}, Fraction(1))]
    for name, power in unit:
        choices = MEASURES.get(name) or ((frozenset({(name, 1)}), Fraction(1)),)
        readings = [
            (_multiply(dimensions, more, power), factor * size**power)
            for dimensions, factor in readings
            for more, size in choices
        ]
    return [(frozenset(dimensions.items()), factor) for dimensions, factor in readings]


def _multiply(
    dimensions: dict[str, int], more: frozenset[tuple[str, int]], power: int
) -> dict[str, int]:
    total = dict(dimensions)
    for name, exponent in more:
        total[name] = total.get(name, 0) + exponent * power
    return {name: exponent for name, exponent in total.items() if exponent}


def names_no_unit(unit: Unit) -> bool:
    """Say whether a unit leaves the measure to the question, as "5 square units" does."""
    return any(name == "unit" for name, _ in unit)


def is_rate_of(unit: Unit, other: Unit) -> bool:
    """Say whether one is the other per something: "5 dollars" an hour may leave out the hour."""
    above = [tuple(p for p in u if p[1] > 0) for u in (unit, other)]
    below = [any(power < 0 for _, power in u) for u in (unit, other)]
    return above[0] == above[1] and below[0] != below[1] and bool(above[0])
