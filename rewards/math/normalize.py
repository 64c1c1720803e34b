"""Normalise an answer's spelling: Unicode, LaTeX markup, punctuation. The meaning stays.

Everything here is linear in the length of the text.
"""

import re
import unicodedata

from rewards.text.phrases import spell_numbers

# Characters with one LaTeX or ASCII spelling. NFKC would turn some into something else (a
# superscript two into a plain 2), so these are replaced before it.
_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "÷": "/", "∕": "/",
    "⁄": "/", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ", "∗": "*",
    "±": r"\pm ", "∓": r"\mp ", "≤": r"\le ", "≥": r"\ge ", "≦": r"\le ", "≧": r"\ge ",
    "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≅": r"\approx ",
    "≡": r"\equiv ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ",
    "∈": r"\in ", "∅": r"\emptyset ", "√": r"\sqrt ", "∛": r"\sqrt[3]", "°": r"^\circ ",
    "º": r"^\circ ", "′": "'", "’": "'", "‘": "'", "∑": r"\sum ", "∏": r"\prod ",
    "∫": r"\int ", "→": r"\to ", "…": r"\ldots ", "⋯": r"\ldots ", "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "⟨": r"\langle ",
    "⟩": r"\rangle ", "∠": r"\angle ", "△": r"\triangle ", "¢": r"\text{ cents}",
    "、": ",", "。": ".", "【": "[", "】": "]", "∣": "|", "∥": r"\|", "℃": r"^\circ C",
    "€": r"\text{ euros}", "£": r"\text{ gbp}", "¥": r"\text{ yuan}", "￥": r"\text{ yuan}",
    "∶": ":", "꞉": ":", "∧": r"\land ", "∨": r"\lor ", "㎡": "m^2", "㎥": "m^3", "㎠": "cm^2",
    "Ω": r"\Omega ", "∴": " ", "⇒": r"\Rightarrow ", "″": "''", "≔": "=", "﹣": "-",
    "⟹": r"\Rightarrow ",
    "\ufe6a": "%", "٪": "%", "٫": ".", "٬": ",",
}  # fmt: skip
_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "θ": "theta",
    "λ": "lambda", "μ": "mu", "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi",
    "ϕ": "phi", "ω": "omega", "Δ": "Delta", "Ω": "Omega", "ξ": "xi", "η": "eta", "ψ": "psi",
}  # fmt: skip
_TABLE = str.maketrans(_SYMBOLS | {letter: f"\\{name} " for letter, name in _GREEK.items()})

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_CIRCLED = "①②③④⑤⑥⑦⑧⑨⑩"

_SPACING = re.compile(
    r"(?<!\\)\\[,;:> \t\n]|~|&(?:nbsp|ensp|emsp);"
    r"|\\(?:textcolor|color|hspace|vspace|[hv]?phantom|label|tag|colorbox|bbox|scalebox)\*?"
    r"(?:\[[^\[\]]*\]|\{[^{}]*\})(?:\{[^{}]*\}(?=\{))?"
    r"|\\(?:quad|qquad|enspace|thinspace|medspace|thickspace|left|right|middle|[bB]igg?[lrm]?"
    r"|displaystyle|textstyle|scriptstyle|limits|nolimits|mathstrut|strut|hfill|newline|noindent"
    r"|tiny|small|footnotesize|normalsize|large|Large|LARGE|huge|Huge|bfseries|itshape|centering"
    r"|checkmark|blacksquare|square|Box|qed|qedhere|therefore|bigstar|heartsuit|ensuremath"
    r"|mathop|mathbin|mathrel|mathord|mathclose|mathopen|mathinner|smash|protect|relax"
    r"|underbrace|overbrace|framebox|boldmath|boxed|fbox|pmb|nonumber|notag)(?![a-zA-Z])"
)
# Decoration beside an answer. Not a cross: "41 ❌" does not say 41.
_ORNAMENT = re.compile(
    "[\u2611\u2705\u2713\u2714\u2728\u2b50\u2605\u2606\u220e\u25a0\u25a1\u25aa\u25ab\u25fb-\u25fe\u2b1b\u2b1c\u25b6\u27a1\u27a4"
    "\ufe0e\ufe0f\u20e3\U0001f300-\U0001f44d\U0001f44f-\U0001f594\U0001f597-\U0001f6aa\U0001f6ac-\U0001faff]"
)
_ROW_SPACE = re.compile(
    r"\\\\\*?\s*\[\s*-?[\d.]+\s*\\?(?:pt|em|ex|mm|cm|in|mu|pc|px|baselineskip)\s*\]|\\\\\*"
)
# A time of day: 8时20分 is 8:20, 9点半 is 9:30.
_CJK_CLOCK = re.compile(r"(?<![\d.:])(\d{1,2})\s*[时時点點](?:\s*(\d{1,2})\s*分|(半))$")
# ]0, 1[ and [2; 3[ as written in France.
_FRENCH_INTERVAL = re.compile(
    r"(?<![\w)\]}.])([\[\]])(\s*(?:[^\s\[\]();,]|\([^()]{0,40}\))(?:[^\[\]();,]|\([^()]{0,40}\)){0,80})([;,])"
    r"((?:[^\[\]();,]|\([^()]{0,40}\)){1,80})([\[\]])"
)
_CURRENCY_FIRST = re.compile(
    r"(\\text\{ (?:dollars|euros|gbp|yuan)\})\}?\s*(\d[\d,]*(?:\.\d+)?|\.\d+)"
)
_ORDINAL = re.compile(
    r"(?<=\d)\s*\^\s*(?:\{\s*)?(?:\\(?:text|mathrm|textrm|rm)\s*\{?)?\s*(?:st|nd|rd|th)\b\s*\}{0,2}"
)
_OPEN_SYSTEM = re.compile(r"\\left\s*\\\{\s*(?=\\begin\s*\{(?:array|aligned|cases|matrix))")
_DAY_HALF = re.compile(r"\b([ap])\.\s?m\b\.?", re.IGNORECASE)
_LEADING_ABOUT = re.compile(r"^\s*\\(?:approx|simeq|sim)(?![a-zA-Z])")
_EMPHASIS = re.compile(r"(?<![\w)}*])(\*{1,3})([^*]+)\1(?![\w(])[.,]?")
# A single letter is a unit only where it stands apart, at the end, after a number.
_SYMBOL = (
    r"(?:[kMmμnc]?m|mi|ft|[kmμ]?g|[mμn]?s|min|hr?|[mk]?L|[kM]?[NJ]|[kMm]?W|[kmM]?V|[mμk]?A|K|[kMG]?Hz"
    r"|[kMG]?Pa|mol|gal|C|T|k?cal|[kMG]?eV|lbs?|M)"
)
_SYMBOL_POWER = rf"{_SYMBOL}(?![a-zA-Z])(?:\^\{{?-?\d\}}?)?"
_BARE_UNIT = re.compile(
    rf"(?<=\d)(?P<space>\s*)(?P<unit>(?:(?:k?m|cm|g|s|h|L|N|J|W|V|A|K|Hz|Pa|kg)(?:\^\{{?[23]\}}?)?"
    rf"|{_SYMBOL_POWER}(?:(?:\s*(?:/|\\cdot|\*)\s*|\s+){_SYMBOL_POWER}){{1,3}}"
    rf"|{_SYMBOL_POWER}\s*/\s*\({_SYMBOL_POWER}(?:(?:\s*(?:\\cdot|\*)\s*|\s+){_SYMBOL_POWER}){{0,2}}\)))$"
)
_UNIT_LAST = re.compile(r"[a-zA-Z](?:\^\{?-?\d\}?)?\)?$")
_UNIT_GAP = re.compile(r"(?<=[\w}])(?<!\\cdot)\s+(?=[a-zA-Z])")
_HOURS = re.compile(r"(?<=\d)\s?([hdm])\s?(?=\d+(?:\.\d+)?\s?(?:min|m|s|sec|h|cm|mm)\b)")
_MICRO = re.compile(
    r"\\(?P<macro>text|mathrm)\s*\{\s*\\mu\s*\}\s*(?:\\(?:text|mathrm)\s*\{\s*(?P<a>[a-zA-Z]{1,3})\s*\})?"
    r"|\\mu\s*\\(?:text|mathrm|rm)\s*\{\s*(?P<b>[a-zA-Z]{1,3})"
    r"|\\(?:text|mathrm)\s*\{\s*\\mu\s*(?P<c>[a-zA-Z]{1,3})"
    r"|(?<=\d)\s*\\mu\s*(?P<d>m|g|s|A|V|F|L|C|W|J|H)(?![a-zA-Z])"
)
_SIUNITX = re.compile(r"\\(?:SI|qty)\s*(?:\[[^\[\]]*\])?\{([^{}]*)\}\s*\{([^{}]*)\}")
_MINUTES = re.compile(
    r"(\d+)\s*\^\s*\{?\s*\\circ\s*\}?\s*(\d+)\s*(?:'|\^\s*\{?\s*\\prime\s*\}?)(?!')"
    r"(?:\s*(\d+)\s*(?:''|\"|\^\s*\{?\s*\\prime\s*\\prime\s*\}?))?"
)
_DOTTED = re.compile(r"(\d+\.\d*)\\dot\s*\{?(\d)\}?(\d*)(?:\\dot\s*\{?(\d)\}?)?")
_GOES_ON = re.compile(r"(\d+\.\d+)\s*(?:\.{3}|\\l?c?dots[cob]?(?![a-zA-Z]))\s*$")
_BASES = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
    "nine": "9", "ten": "10", "twelve": "12", "sixteen": "16", "bin": "2", "oct": "8",
    "dec": "10", "hex": "16",
}  # fmt: skip
_BASE = re.compile(
    r"(?<=[0-9A-Fa-f)}])_\s*\{?\s*\(?\s*(?:\\(?:text|mathrm)\s*\{\s*)?\(?\s*(\d+|[a-z]{3,7})\s*\)?\s*\}?\s*\)?\s*\}?\s*$"
)
_CHOOSE = re.compile(
    r"(?<![\w}])(?:\\mathrm\s*\{\s*C\s*\}|\\text\s*\{\s*C\s*\}|C)\s*_\s*\{?(?P<n>\d+)\}?\s*\^\s*\{?(?P<k>\d+)\}?(?![\w^])"
    r"|(?:\{\})?\s*[\^_]\s*\{?(?P<n2>\d+)\}?\s*(?:\\(?:mathrm|text)\s*\{\s*C\s*\}|C)\s*_\s*\{?(?P<k2>\d+)\}?"
    r"|(?<![\w}])(?P<n3>\d+)\s*(?:C|choose|\\choose)\s*(?P<k3>\d+)(?![\w^])"
)
# A pattern of plain text, its LaTeX, and a substring that every match has: testing for that takes
# a tenth of the pattern's time.
_PLAIN_NOTATIONS = [
    ("10", re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))"), r"\\times "),
    ("+/-", re.compile(r"\+/-"), r"\\pm "),
    ("<>", re.compile(r"<>"), r"\\ne "),
    (":=", re.compile(r"(?<![<>:]):="), "="),
    ("coloneqq", re.compile(r"(?<![<>:])\\coloneqq"), "="),
    ("up to", re.compile(r"\bup to\b"), "at most"),
    ("square root of", re.compile(r"\bsquare root of\b"), r"\\sqrt "),
    ("cube root of", re.compile(r"\bcube root of\b"), r"\\cbrt "),
    (
        " of ",
        re.compile(
            r"\b(?:third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth)s?\s+of\s+(?=\d)"
        ),
        "half of ",
    ),
    ("minus ", re.compile(r"(?<![\w.])minus\s+(?=[\d\\$])"), "-"),
    ("negative ", re.compile(r"(?<![\w.])negative\s+(?=[\d\\$])"), "-"),
    (" ", re.compile(r"^\s*(\d+)\s+(?:out\s+of|in)\s+(\d+)\s*$"), r"\\frac{\1}{\2}"),
    ("{", re.compile(r"(?<=\d)\s*\\(?:text|mathrm|rm)\s*\{\s*[eE]\s*\}\s*(?=[+-]?\d)"), "e"),
    ("^", re.compile(r"(?<=\d)\s*\^\s*(?:\\(?:text|mathrm)\s*)?\{?\s*o\s*\}?(?!\w)"), r"^\\circ "),
    ("'", re.compile(r"^\s*(\d+)\s*'\s*(\d+(?:\.\d+)?)\s*(?:''|\")\s*$"), r"\1 feet \2 inches"),
    ("0b", re.compile(r"^\s*0b([01]+)\s*$"), r"\1_{2}"),
    ("0o", re.compile(r"^\s*0o([0-7]+)\s*$"), r"\1_{8}"),
    ("0x", re.compile(r"^\s*0x([0-9a-fA-F]+)\s*$"), r"\1_{16}"),
    ("\\num", re.compile(r"\\num\s*\{([^{}]*)\}"), r"\1"),
    ("\\ang", re.compile(r"\\ang\s*\{([^{}]*)\}"), r"\1^\\circ "),
    ("frac", re.compile(r"\\(?:nice|s|x)frac(?![a-zA-Z])"), r"\\frac"),
    ("erset", re.compile(r"\\(?:under|over)set\s*\{[^{}]*\}"), ""),
    ("(", re.compile(r"^\s*(\d+\.\d*)\((\d+)\)\s*$"), r"\1\\overline{\2}"),
    ("olon", re.compile(r"\\[cC]olon"), ":"),
    ("\\", re.compile(r"\\([RZNQC])(?![a-zA-Z])"), r"\\mathbb{\1}"),
    ("log", re.compile(r"\blog(\d+)\s*(?=\()"), r"\\log_{\1}"),
    ("base", re.compile(r"(?<!\d)(\d+)\s*\(?\s*base[\s-]*(\d+)\s*\)?\s*$"), r"\1_{\2}"),
    (" to ", re.compile(r"^\s*(\d+)\s+to\s+(\d+)\s*$"), r"\1:\2"),
    ("<", re.compile(r"^\s*<(?=[^<>]*,)([^<>]*)>\s*$"), r"\\langle \1\\rangle "),
    ("Matrix", re.compile(r"^\s*Matrix\((.*)\)\s*$", re.DOTALL), r"\1"),
]
_HALF_LINE = re.compile(
    r"\\mathbb\s*\{?\s*R\s*\}?\s*[\^_]\s*\{?\s*([+-](?!\w)|(?:>|<|\\geq?(?:slant)?|\\leq?(?:slant)?|>=|<=|\\gt|\\lt)\s*0)\s*\}?"
    r"(\s*[\^_]\s*\{?\s*0\s*\}?)?"
)
_NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?(?:/\d+)?|\\[dt]?frac\{\d+\}\{\d+\})", re.ASCII)
_FONT = re.compile(r"\\(?:text|math)(?:rm|bf|it|sf|tt|normal|up)?\s*\{([^{}]*)\}")
_MATH_MARKS = re.compile(r"(?<!\\)\$|(?<!\\)\\[()\[\]]")


def normalize_text(text: str) -> str:
    """Return ``text`` with Unicode mathematics written as LaTeX and invisible dress removed.

    Full-width forms become ASCII, superscripts become ``^{...}``, runs of circled digits become
    lists; bidirectional and zero-width characters vanish and control characters become spaces, so
    that they can neither hide nor forge an answer.
    """
    if not text.isascii():
        text = re.sub(rf"(?<=[{_CIRCLED}])(?=[{_CIRCLED}])", ",", text)
        text = re.sub(rf"[{_CIRCLED}](?=\s*[^\s,，、;；.。和与及{_CIRCLED}])", _spell_circled, text)
        text = re.sub(
            "[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text
        )
        text = re.sub(
            "[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m.group().translate(_SUBSCRIPTS) + "}", text
        )
        text = re.sub("[¼½¾⅐-⅞]", _spell_fraction, text)
        text = re.sub(r"((?:\d[\u0305\u0304\u0307])+)", _overline_marked, text)
        text = re.sub(r"√\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}", text)  # all of the digits
        text = unicodedata.normalize("NFKC", text.translate(_TABLE)).translate(_TABLE)
    return "".join(_visible(char) for char in text) if not text.isprintable() else text


def _spell_circled(match: re.Match[str]) -> str:
    return f"({unicodedata.normalize('NFKC', match.group())}) "  # the label of a part


def _spell_fraction(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match.group()).partition("\u2044")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _overline_marked(match: re.Match[str]) -> str:
    return rf"\overline{{{re.sub('[^0-9]', '', match.group())}}}"


def _visible(char: str) -> str:
    if char.isprintable():
        return char
    # Format characters (zero width, direction) are no part of the text; others separate.
    return "" if unicodedata.category(char) == "Cf" else " "


def strip_dress(text: str) -> str:
    """Return normalised ``text`` without math delimiters, spacing and sizing commands.

    An outer ``\\boxed{...}`` is opened, surrounding white space, emphasis and final punctuation
    go. ``{,}`` and ``,\\!`` (commas that TeX is told not to space) become plain commas. A currency
    before a number moves behind it, ordinal endings (``12^{th}``) go, and what plain text writes
    in its own way (``+/-``, ``3 x 10^8``, ``40 base 9``) is written as LaTeX.
    """
    text = " ".join(text.split())
    if _NUMBER.fullmatch(text):  # as in most golds
        return text
    if r"\\" in text:
        text = _ROW_SPACE.sub(r"\\\\", text)
    text = text.replace("{,}", ",").replace(r"\!", "").replace(r"\#", " ")
    if "$" in text:
        if text.count("$") == 1:  # dollars, not mathematics
            text = re.sub(r"(?<!\\)\$(?=\s?\d)", r"\\$", text)
        text = text.replace(r"\text{\$}", r"\$").replace(r"\$", r"\text{ dollars}")
    if r"\left" in text or r"\right" in text:
        text = text.replace(r"\left.", " ").replace(r"\right.", " ")
        text = _OPEN_SYSTEM.sub("", text)
    if "." in text:
        text = _DAY_HALF.sub(r"\1m", text)
    if r"\text{ " in text:
        text = _CURRENCY_FIRST.sub(r"\2\1", text)
    if "^" in text:
        text = _ORDINAL.sub("", text)
    if "\\" in text or "$" in text:
        text = _MATH_MARKS.sub(" ", text)
    if "\\" in text or "~" in text or "&" in text:
        text = _LEADING_ABOUT.sub("", _SPACING.sub(" ", text))
    for part, pattern, latex in _PLAIN_NOTATIONS:
        if part in text:
            text = pattern.sub(latex, text)
    if r"\mathbb" in text:
        text = _HALF_LINE.sub(_open_half_line, text)
    text = _read_numerals(text)
    text = text.lstrip(' \t`",:;=').rstrip(' \t`".,:;\\')
    if "*" in text:
        text = _EMPHASIS.sub(r"\2", text)
    if not text.isascii() and any(char.isalnum() for char in text):
        text = _CJK_CLOCK.sub(_write_clock, _ORNAMENT.sub(" ", text).strip())
    text = _read_units(spell_numbers(text))
    return _FRENCH_INTERVAL.sub(_turn_brackets, text) if "]" in text or "[" in text else text


def _write_clock(match: re.Match[str]) -> str:
    return f"{match[1]}:{(match[2] or '').zfill(2) if not match[3] else 30}"


def _read_numerals(text: str) -> str:
    """Write recurring decimals, numerals with their base and binomials as LaTeX has them."""
    if "." in text:
        text = _GOES_ON.sub(_overline_tail, _DOTTED.sub(_overline_dots, text))
    if "_" in text:
        text = _BASE.sub(lambda m: f"_{{{_BASES.get(m.group(1), m.group(1))}}}", text)
    return _CHOOSE.sub(_write_binomial, text) if "C" in text or "choose" in text else text


def _overline_dots(match: re.Match[str]) -> str:
    """``0.1\\dot{4}28\\dot{5}``: the first dot to the last recurs."""
    whole, first, between, last = match.groups()
    if last is None:
        return rf"{whole}\overline{{{first}}}{between}"
    return rf"{whole}\overline{{{first}{between}{last}}}"


def _overline_tail(match: re.Match[str]) -> str:
    """``0.1666...`` repeats its last digit; ``3.1415...`` is 3.1415."""
    number = match.group(1)
    whole, _, decimals = number.partition(".")
    for length in range(1, min(len(decimals) // 2, 40) + 1):
        block = decimals[-length:]
        if decimals.endswith(block * 2) and (set(block) != {"0"}):
            return rf"{whole}.{decimals[:-length]}\overline{{{block}}}"
    return number


def _write_binomial(match: re.Match[str]) -> str:
    groups = match.groupdict()
    top, bottom = (groups[k] or groups[k + "2"] or groups[k + "3"] for k in "nk")
    if len(top) > 6 or len(bottom) > 6 or int(bottom) > int(top):
        return match.group()
    return rf"\binom{{{top}}}{{{bottom}}}"


def _open_half_line(match: re.Match[str]) -> str:
    sign, zero = match.group(1), bool(match.group(2))
    zero = zero or (sign[0] not in "+-" and any(mark in sign for mark in ("=", "ge", "le")))
    if sign[0] in "+>" or sign.startswith((r"\g",)):
        return ("[" if zero else "(") + r"0,\infty)"
    return r"(-\infty,0" + ("]" if zero else ")")


def _turn_brackets(match: re.Match[str]) -> str:
    opens, low, comma, high, closes = match.groups()
    if opens + closes == "[]":
        return match.group()
    return ("(" if opens == "]" else "[") + low + comma + high + (")" if closes == "[" else "]")


def _read_units(text: str) -> str:
    """Mark units whose letters could be read as variables."""
    if "\\" in text:
        text = _SIUNITX.sub(_read_siunitx, text)
        if "circ" in text:
            text = _MINUTES.sub(_join_minutes, text)
        if r"\mu" in text:
            text = _MICRO.sub(_join_micro, text)
        if "Omega" in text:
            text = re.sub(r"(?<=\d)\s*([kM]?)\\Omega\s*$", r"\\text{ \1ohm}", text)
    text = _HOURS.sub(r"\\text{ \1} ", text)
    return _BARE_UNIT.sub(_mark_unit, text) if _UNIT_LAST.search(text) else text


def _mark_unit(match: re.Match[str]) -> str:
    unit = match.group("unit")
    if not match.group("space") and "/" not in unit:
        return match.group()
    unit = _UNIT_GAP.sub(r"\\cdot ", unit) if "(" in unit else unit
    return rf"\text{{ {unit}}}"


def _join_micro(match: re.Match[str]) -> str:
    letters = match.group("a") or match.group("b") or match.group("c") or match.group("d") or ""
    if match.group("macro") or match.group("d"):
        return rf"\text{{ u{letters}}}"
    return rf"\text{{ u{letters}"  # its closing brace comes later


def _read_siunitx(match: re.Match[str]) -> str:
    unit = re.sub(r"\\([a-z]+)", r" \1 ", match.group(2)).replace(".", " ")
    unit = re.sub(r"\b(kilo|mega|giga|centi|milli|micro|nano)\s+", r"\1", unit)
    return rf"{match.group(1)}\text{{ {unit}}}"


def _join_minutes(match: re.Match[str]) -> str:
    """``30^\\circ 15'`` in degrees alone, as a mixed number."""
    degrees, minutes, seconds = match.groups()
    if len(degrees + minutes + (seconds or "")) > 12:
        return match.group()
    parts = int(minutes) * 60 + int(seconds or 0)
    return rf"{degrees} {parts}/3600^\circ " if 0 < parts < 3600 else rf"{degrees}^\circ "


def spell(text: str) -> str:
    """Return ``text`` without fonts, needless braces and spaces, which never count.

    A space between two digits is kept: 1 8 is not 18.
    """
    text = _FONT.sub(r"\1", text).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    text = re.sub(r"(?<=[\^_d])\{(\w)\}", r"\1", text)
    return re.sub(r"(?<!\d) | (?!\d)", "", " ".join(text.split()))


def normalize_words(text: str) -> str:
    """Return ``text`` as lower-case words for comparing answers that are prose or names.

    LaTeX font commands, punctuation, articles and case do not count.
    """
    text = re.sub(r"\\(?:text|math|operator)?[a-z]{0,10}\s*(?=\{)|\\[a-zA-Z]+", " ", text)
    words = re.sub(r"[^\w+\-*/=<>]+|_", " ", text.casefold()).split()
    return " ".join(word for word in words if word not in {"the", "a", "an", "is"})
