"""Bring an answer's many spellings to one: Unicode, LaTeX dress, punctuation. Meaning untouched.

Everything here is linear in the length of the text.
"""

import re
import unicodedata

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
    "€": r"\text{ euros}", "£": r"\text{ pounds}", "¥": r"\text{ yuan}", "￥": r"\text{ yuan}",
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
    r"|\\(?:textcolor|color|hspace|vspace|phantom|label|tag)\*?\{[^{}]*\}"
    r"|\\(?:quad|qquad|enspace|thinspace|medspace|thickspace|left|right|middle|[bB]igg?[lrm]?"
    r"|displaystyle|textstyle|limits|nolimits|mathstrut|hfill|newline)(?![a-zA-Z])"
)
_CURRENCY_FIRST = re.compile(
    r"(\\text\{ (?:dollars|euros|pounds|yuan)\})\}?\s*(\d[\d,]*(?:\.\d+)?|\.\d+)"
)
_ORDINAL = re.compile(
    r"(?<=\d)\s*\^\s*(?:\{\s*)?(?:\\(?:text|mathrm|textrm|rm)\s*\{?)?\s*(?:st|nd|rd|th)\b\s*\}{0,2}"
)
_OPEN_SYSTEM = re.compile(r"\\left\s*\\\{\s*(?=\\begin\s*\{(?:array|aligned|cases|matrix))")
_DAY_HALF = re.compile(r"\b([ap])\.\s?m\b\.?", re.IGNORECASE)
_LEADING_ABOUT = re.compile(r"^\s*\\(?:approx|simeq|sim)(?![a-zA-Z])")
_EMPHASIS = re.compile(r"(?<![\w)}*])(\*{1,3})([^*]+)\1(?![\w(])[.,]?")
# A single letter is a unit only where it stands apart, at the end, after a number.
_BARE_UNIT = re.compile(
    r"(?<=\d)\s+((?:k?m|cm|g|s|h|L|N|J|W|V|A|K|Hz|Pa|kg)(?:\^\{?[23]\}?)?(?:/(?:s|h|min|kg|L)(?:\^\{?2\}?)?)?)$"
)
# What is written so in plain text, and how LaTeX writes it.
_PLAIN_NOTATIONS = [
    (re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))"), r"\\times "),
    (re.compile(r"\+/-"), r"\\pm "),
    (re.compile(r"\blog(\d+)\s*(?=\()"), r"\\log_{\1}"),
    (re.compile(r"(?<!\d)(\d+)\s*\(?\s*base[\s-]*(\d+)\s*\)?\s*$"), r"\1_{\2}"),
    (re.compile(r"^\s*(\d+)\s+to\s+(\d+)\s*$"), r"\1:\2"),
    (re.compile(r"^\s*<(?=[^<>]*,)([^<>]*)>\s*$"), r"\\langle \1\\rangle "),
    (re.compile(r"^\s*Matrix\((.*)\)\s*$", re.DOTALL), r"\1"),
]
_HALF_LINE = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?\s*[\^_]\s*\{?\s*([+-])\s*\}?")
_HALF_LINES = {"+": r"(0,\infty)", "-": r"(-\infty,0)"}
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
        text = re.sub(
            "[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text
        )
        text = re.sub(
            "[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m.group().translate(_SUBSCRIPTS) + "}", text
        )
        text = re.sub("[¼½¾⅐-⅞]", _spell_fraction, text)
        text = re.sub(r"√\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}", text)  # all of the digits
        text = unicodedata.normalize("NFKC", text.translate(_TABLE)).translate(_TABLE)
    return "".join(_visible(char) for char in text) if not text.isprintable() else text


def _spell_fraction(match: re.Match) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match.group()).partition("\u2044")
    return rf"\frac{{{top}}}{{{bottom}}}"


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
    text = text.replace("{,}", ",").replace(r"\!", "")
    text = text.replace(r"\text{\$}", r"\$").replace(r"\$", r"\text{ dollars}")
    text = text.replace(r"\left.", " ").replace(r"\right.", " ")
    text = _OPEN_SYSTEM.sub("", text)
    text = _DAY_HALF.sub(r"\1m", text)
    text = _CURRENCY_FIRST.sub(r"\2\1", text)
    text = _ORDINAL.sub("", text)
    text = _MATH_MARKS.sub(" ", text)
    text = _SPACING.sub(" ", text)
    text = re.sub(r"\\(?:boxed|fbox)\s*\{", "{", text)
    text = _LEADING_ABOUT.sub("", text)
    for pattern, latex in _PLAIN_NOTATIONS:
        text = pattern.sub(latex, text)
    text = _HALF_LINE.sub(lambda m: _HALF_LINES[m.group(1)], text)
    text = text.lstrip(' \t`",:;=').rstrip(' \t`".,:;\\')
    text = _EMPHASIS.sub(r"\2", text)
    return _BARE_UNIT.sub(r"\\text{ \1}", text)


def spell(text: str) -> str:
    """Return ``text`` without what never counts: fonts, needless braces and spaces.

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
