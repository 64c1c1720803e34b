"""Find the values in a text, with what is said of them, and the last one that it states.

A value that the text denies, doubts, bounds or offers beside another is not its answer, or guessing
would be rewarded.
"""

import re
from typing import NamedTuple

from rewards.text.units import find_unit

TAIL_CHARS = 2_000  # searched for a last formula or number
MIN_LISTED_CHARS = 80
NEAR_CHARS = 80
MAX_SKIPPED = 8  # values that are denied or asked for, before the one that is stated

# --- what a sentence is made of ---

SENTENCE_END = re.compile(r"[.!?](?=\s|$|[*_]{1,2}(?:\s|$))|[。！？]|\n|【[解详分点]")
MATH_SPAN = re.compile(
    r"\$\$(?P<a>[^$]{1,2000})\$\$|\$(?P<b>(?:\\\$|[^$]){1,500})\$"
    r"|\\\((?P<c>(?:(?!\\\)).){1,1000})\\\)|\\\[(?P<d>(?:(?!\\\]).){1,2000})\\\]",
    re.DOTALL,
)
_POWER = r"(?:\s?\^\s?(?:\{\s?[-−]?\d+\s?\}|[-−]?\d+)|\*\*[-−]?\d+|[⁻⁰¹²³⁴-⁹]+)"
_SUPERSCRIPT = re.compile("[⁻⁰¹²³⁴-⁹]+")
_PLAIN_DIGITS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_UNIT_NAME = r"(?:\\?[a-zA-Zµμ°Ω]{1,10})"
NUMBER = re.compile(
    r"(?:(?<![\w.,])[-−–]?\\?[$€£]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
    # 1.5e8; 1.5 x 10^8; 2^10; 3 1/2; 3/4 and 2:1; 1 in 3
    rf"(?:[eE][-+−]?\d{{1,3}}(?!\d|\.\d)|\s?(?:[x×*·]|\\times|\\cdot)\s?10{_POWER}|{_POWER}"
    r"|\s\d+\s?/\s?\d+|\s?/\s?\d+|(?::\d+)+|\s(?:in|out of)\s\d+(?=[.!)*]*(?:\s*$|\s*\n)))?"
    r"(?:\s?\\?%|\s?(?:π|\\pi\b))?"
    r"|(?<![\w.])[-−–]?\.\d+|\d+(?:\.\d+)?(?:[eE][-+−]?\d{1,3}(?!\d|\.\d)|/\d+)?)"
    # thousands; units that are formulas: m/s^2, cm^{2}
    r"(?:\s?[kKMB](?![\w'’/^])|\s(?:hundred|thousand|million|billion|trillion|dozen)\b|[十百千万亿]+(?![克米瓦卡升分]))?"
    rf"(?P<unit>\s?{_UNIT_NAME}(?:[\s·]{_UNIT_NAME}(?={_POWER}))?(?:{_POWER}(?:\s?[/·]\s?{_UNIT_NAME}{_POWER}?)*"
    rf"|(?:/{_UNIT_NAME}{_POWER}?)+))?"
)
# An inequality after its letter, a tuple or an interval that stand in the text without dollars.
_INEQUALITY = re.compile(
    r"[<>≤≥≠!](?:(?<=\b[A-Za-z].)|(?<=\b[A-Za-z]\s.))(?:(?<!!)=?|=)\s?[-−]?\d+(?:\.\d+)?(?:/\d+)?"
)
_TUPLE = re.compile(r"[\[(](?<![\w)].)\s*[-−]?[\d.][^()\[\]\n]{0,80},[^()\[\]\n]{1,80}[)\]]")
_UNIT_AFTER = re.compile(
    r"\s?(?!in\b)((?:(?:square|cubic|sq|cu)\s(?!in\b)(?=[a-zA-Z]))?[a-zA-Z]{2,12})\b(?:\s+per\s+(?:second|minute|hour|day|week|month|year)\b)?"
)
_LETTERS_AFTER = re.compile(r"(?!(?:st|nd|rd|th|[mgshLNJWVAK])\b)[a-zA-Z]{1,2}\b")
_MINUS = re.compile(r"(?:^|[^\d\s]\s+)(?:minus|negative)\s+$", re.IGNORECASE)
_OUT_OF = re.compile(r" (?:in|out of) (?=\d)")
_MINUS_WORDS = ("minus", "negative")

# --- what is said of a value ---

_CLAUSE = re.compile(
    r"[.!?](?=\s)|[\n;:。！？；：]|,\s+(?:so|but|and|then|thus|hence|therefore|which|that|it|we|he|she|they|you|there|this|the)\b|，"
    r"|(?<!all )(?<!thing )\bbut\b|\b(?:so|then|thus|hence|therefore|because|since|leaving)\b",
    re.IGNORECASE,
)
_DENIED_STEMS = (
    "not", "no ", "nobody", "non", "nor", "never", "neither", "\\ne", "n't", "n’t", "isnt",
    "arent", "wasnt", "cant", "doesnt", "dont", "couldnt", "wouldnt", "hardly", "scarcely",
    "instead", "from", "than", "unequal", "unlike", "but", "rul", "reject", "exclud", "discard",
    "doubt", "false", "wrong", "correct", "true", "impossible", "pas", "nicht", "não", "не", "if",
    "不", "非", "除", "≠",
)  # fmt: skip
_COPULA = r"\b(?:is|are|was|were|equals|gives|makes|leaves|totals|becomes|has)\b|="
DENIED = re.compile(
    r"\b(?:never|nothing|nobody|none|no (?:one|value|number|answer))\b[^\d,;]*$|"
    rf"(?:\b(?:not|never|cannot|neither|nor|hardly|scarcely)\b|n['’]t\b|\b(?:is|are|was|ca|does|do|could|would)nt\b)"
    rf"(?:(?!{_COPULA}|\d|\b(?:hard|difficult|only|just|merely)\b).)*$"
    r"|\b(?:different from|differs? from|other than|unequal to|unlike|(?:any|every)thing but"
    r"|all but|instead of|rather than|distinct from|far from|rul(?:e|es|ed|ing) out|reject\w*"
    r"|exclud\w*|discard\w*)"
    r"(?:\s+\w+){0,2}\W*$"
    r"|(?:n['’]t|\bnot|\bnever)\s+(?:think|believe|say|claim|agree|sure|certain|true|possible"
    r"|the case)\b"
    r"|\b(?:doubt|deny|false|wrong|incorrect|untrue|impossible)\s+(?:that|to say|if|whether)\b"
    r"|\b(?:wrong|incorrect|false)\s+\w+[^\Ws]\s+(?:is|was|would be)\b|\bno way\b"
    r"|\b(?:no (?:es|son)|(?:n['’]est )?pas|nicht|non (?:è|sono)|não (?:é|são)|не)\s+"
    r"(?:(?:igual a|égal à|gleich|uguale a|равно)\s+)?$"
    rf"|\bif\s+(?:it|the\s+(?:\w+\s+)?answer)\s*(?:is|['’]s|was|were)\s*$"
    r"|(?:不(?:会|可能|应该)?是|不等于|不为|并非|绝非|非|除了?|排除)\s*$|(?:≠|\\neq?)\s*$",
    re.IGNORECASE | re.DOTALL,
)
_BE_WRONG = (
    r"(?:wrong|incorrect|false|impossible|invalid|excluded|rejected|eliminated|discarded"
    r"|ruled out|out|a mistake)\b"
)
# If not 41, then 42; unless it is 41, 42: an alternative, and no statement.
_IT = r"(?:(?:it|that|this|the\s+(?:\w+\s+)?(?:answer|result|solution))\s*)"
_IS_NOW = r"(?:['’]s|is|was|were|be)\s+"
_ANY_VALUE = r"[-−$\\(]{0,3}(?:\d|[A-Za-z]\b|\\)"
_CONDITIONAL = re.compile(
    rf"\b(?:if|unless)\s+{_IT}?(?:{_IS_NOW})?(?:(?:is|was)n['’]?t|not)(?:\s+{_ANY_VALUE}|,)"
    rf"|\b(?:if|unless)\s+(?:{_IT}|[-−$]?\d\S*\s){_IS_NOW}{_BE_WRONG}|\bunless\s+{_IT}{_IS_NOW}{_ANY_VALUE}"
    r"|(?:不是|不为|不等于)[^，,。\d]{0,2}\d\S{0,10}?[，,]?\s*(?:那?就|则|便|而?是)|否则|不然",
    re.IGNORECASE,
)
_CONDITIONAL_STEMS = ("if", "unless", "不", "否则")
DENIED_AFTER = re.compile(
    r"[\s)*'\"”\]$]{0,4}+(?:"
    r"\s*\b(?:is|was|are|were|would be|(?:can|must|should) be|ha(?:s|ve) been|seems|looks)\s+"
    r"(?:\w+ly\s+|also\s+)*"
    rf"(?:{_BE_WRONG}"
    r"|too (?:large|small|big|high|low|much|many|few)\b|the wrong\b|an? (?:wrong|incorrect)\b)"
    r"|\s*\b(?:is|was|would)(?:\s+(?:\w+ly\s+)?not\b|n['’]?t\b)"
    r"|\s*\b(?:can(?:not|['’]?t| not)|could(?:n['’]?t| not)|wo(?:n['’]?t|uld not))\s+(?:\w+ly\s+)?"
    r"(?:be|work|hold)\b|\s*\b(?:fails?\b|does(?:n['’]?t| not)\s+(?:work|hold|fit|satisfy|solve)\b)"
    r"|\s*(?:değil|以[外上下内]|之外)|\s*[,(]\s*(?:wrong|incorrect|nope)\b|\s*(?:不对|不正确|不是答案|是错|错误|ではない|ではありません|[이가은는]\s?아[니닙])"
    r"|\s*[❌✗✘])",
    re.IGNORECASE,
)
RETRACTED = re.compile(
    r"[^.\n]{0,40}?[.!,;)]*\s*(?:(?:oh|no|wait|but|hmm|actually)\b[,.!…\s]*)*"
    r"\b(?:that|this|it|which)(?:['’]s|\s+(?:is|was|can['’]?t be|cannot be|must be|seems|looks))\s+"
    rf"(?:\w+ly\s+)?(?:not (?:right|correct|it|true|the answer)\b|{_BE_WRONG})",
    re.IGNORECASE,
)
_BOUNDED = re.compile(
    r"(?:\b(?:(?:no|not)\s+)?(?:at\s+)?(?:not|never|least|most|than|over|under|above|below|exceeds?"
    r"|either|without|except|(?<!round )(?<!rounds )(?<!rounded )up to|n't)\s+"
    r"(?:or equal(?: to)?\s+|be\s+|exactly\s+|only\s+|just\s+|merely\s+)?"
    r"|n['’]t\s+(?:only|just|merely)\s+"
    r"|(?:^|[.:]\s|\b(?:is|are|was|were|be)\s)an?\s(?:maximum|minimum)\sof\s"
    r"|(?:至少|至多|最多|最少|不?大于|不?小于|不?超过|不?多于|不?少于|不足|不到|高于|低于)\s*(?:或等于|等于|[是为有])?\s*)$",
    re.IGNORECASE,
)
_BOUNDED_AFTER = re.compile(
    r"(?:\s[a-z]{1,15})?,?\s(?:"
    r"(?:more|less|fewer|larger|smaller|greater|higher|lower) than (?:that|this|it)\b"
    r"|(?:at (?:most|least)|or (?:more|less|fewer|above|below|over|under"
    r"|higher|lower)"
    r"|and (?:above|over|up|below|under|a half))\b(?!\sthan))",
    re.IGNORECASE,
)
_UPWARDS = re.compile(r"\s(?:up|on)(?:wards?)?(?=[\s.!]*$)", re.IGNORECASE)
_LISTED = re.compile(
    r"(?:[-−–]?\$?[\d.,/]*\d%?\s*(?:,|\bor\b|\band\b|\b(?:to|through)\b|/|[或到至])\s*(?:or|and|maybe|perhaps)?\s*)+$"
)
_BOUND_ENDS = (
    "not", "never", "least", "most", "than", "over", "under", "above", "below", "exceed", "exceeds",
    "either", "without", "except", "to", "n't", "equal", "be", "exactly",
    "only", "just", "merely", "of",
    *"少多于过足到是为有",
)  # fmt: skip
_LIST_ENDS = ("or", "and", "to", "through", "maybe", "perhaps", ",", "/", "或", "到", "至")
# --- several values ---

_NAME = r"(?:[A-Za-z](?:_\{?\w{1,3}\}?|\d)?(?:\s*=\s*|\s+is\s+)|[A-Z][a-z]+\s?[:=]\s*)"
_NAMED = re.compile(rf"(?<![\w\\]){_NAME}$")
_AND = re.compile(rf"\s*(?:,|;|&|、|,?\s*\band\b)\s*{_NAME}?", re.IGNORECASE)
_OR = re.compile(
    r"(?!.*(?:\b(?:so|then|thus|hence|therefore|more|less|fewer)\b|=.*=))(?:\W{1,3}[\w'’]+){0,3}?\W{0,4}"
    r"(?:\b(?:or|vs\.?|versus|maybe|perhaps|possibly|alternatively|otherwise|unless|oder|ou|или|atau|hoặc|veya)\b"
    r"|\b(?:could|might|may)\s+(?:\w+\s+)?be\b|或[者是]?|还是|要么|也?可能是|또는|または)"
    rf"(?:\W{{1,3}}[\w'’]+){{0,6}}?\W{{0,4}}{_NAME}?",
    re.IGNORECASE,
)
_BULLET = r"(?:(?:[-*•]|\(?[a-zA-Z\d]{1,2}[.)])\s+)?"
_LINE = re.compile(rf"\s*\n\s*{_BULLET}({_NAME}?)")
_ALONE_BEFORE = re.compile(rf"(?:^|\n)\s*{_BULLET}({_NAME}?)$")
_LABEL = re.compile(r"(?:^|\n)[ \t]*\(?(\d{1,2})[.)][ \t]+(?=[^\n]*\d)")
_GUESS = re.compile(
    r"\b(?:guess|option|candidate|possibility|alternative)(?:\s+#?(?:\d+|[a-z]))?\s*(?::|=|\bis\b)",
    re.IGNORECASE,
)
_GUESS_STEMS = ("guess", "option", "candidate", "possibility", "alternative")
_REST_OF_LINE = re.compile(r"[ .]*(?:\n|$)")
_NUMBER_ONLY = re.compile(r"\W*[\d.,]*")
_TWO_UNITS = re.compile(r"\s?([a-zA-Z]{2,10})(?:,?\s+and|,)?\s+")
_IN_FORMULA_BEFORE = re.compile(
    r"(?:√\s?|(?<![a-zA-Z])\\?(?:a?(?:sin|cos|tan)|ln|log|lg|sqrt|exp)\s*|\b(?:twice|half|double|triple)\s+(?:of\s+)?|\b(?:square|cube|root|reciprocal|inverse"
    r"|opposite|factorial|logarithm|multiple|factor|divisor|power)\s+of\s+|\bor\s+|或[者是]?\s*"
    r"|\d\s?[−–]\s?|[{^_\\(\[|!]|\\[a-zA-Z]+\s*|[\w)}\]][^\S\n]?[-+*/^]\s?|__\w*)$"
)
_IN_FORMULA_AFTER = re.compile(
    r"\s(?:squared|cubed|factorial)\b|\s?[\^!}|)\]\\('\"]|\s[-+*/]\s|\s(?:if|else|for)\s\S*\("
)
_FORMULA_ENDS = (
    "sin", "cos", "tan", "ln", "log", "lg", "sqrt", "exp", "twice", "half", "double", "triple",
    "of", "or", *"或者是√–−{^_\\([|!-+*/",
)  # fmt: skip
_QUESTION = re.compile(r"[^.!?。！？\n]{0,200}[?？]")


def find_any(text: str, stems: tuple[str, ...]) -> int | None:
    """Return where the first of some words may stand; ten times as fast as patterns for them."""
    lower = text.lower()
    found = [at for stem in stems if (at := lower.find(stem)) >= 0]
    return (min(found) if len(lower) == len(text) else 0) if found else None


# --- the last value ---


class Value(NamedTuple):
    start: int
    end: int
    text: str
    is_number: bool


def _is_unit(word: str) -> bool:
    return find_unit(word.split()[-1]) is not None


def _as_value(number: re.Match[str]) -> Value:
    text = number.group()
    if unit := number["unit"]:
        words = re.findall(r"[a-zA-Z]{3,}", unit)
        text = text if all(map(_is_unit, words)) else text.removesuffix(unit)  # 5 hats/person
    text = text.strip()
    if not text.isascii():
        text = _SUPERSCRIPT.sub(lambda m: "^" + m.group().translate(_PLAIN_DIGITS), text)
    return Value(*number.span(), text, True)


def find_last(text: str) -> str | None:
    """Return the last formula or number that the text does not deny, with what qualifies it."""
    text = take_tail(text)
    if (guesses := _read_guesses(text)) is not None:
        return guesses
    start = max(0, text.rfind(".\n", 0, -MIN_LISTED_CHARS))  # no number goes beyond that
    answer, first = _find_last(text, _list_values(text, start))
    return answer if first or not start else _find_last(text, _list_values(text))[0]


def _find_last(text: str, values: list[Value]) -> tuple[str | None, int]:
    """Return the last value that is not denied, and the index of the first that was looked at."""
    denied: list[str] = []
    first = len(values)
    for index in range(len(values) - 1, max(-1, len(values) - 1 - MAX_SKIPPED), -1):
        value, first = values[index], index
        if _QUESTION.match(text, value.end):
            continue
        first, joined = _join_values(text, values, index)
        start = values[first].start
        clause, after = take_clause(text[max(0, start - 200) : start]), text[value.end :][:160]
        if value.text in denied:
            break
        is_denied = find_any(clause, _DENIED_STEMS) is not None and DENIED.search(clause)
        if is_denied or DENIED_AFTER.match(after) or RETRACTED.match(after):
            denied.append(value.text)
            continue
        if not joined and is_conditional(text[max(0, start - 200) : start]):
            return f"otherwise {value.text}", first
        if joined or not value.is_number:
            return joined or value.text, first
        return qualify(text, value), first
    return f"not {denied[0]}" if denied else None, first


def take_tail(text: str) -> str:
    """Return the end of a text from the start of a line, so that no formula is cut."""
    if len(text) <= TAIL_CHARS:
        return text
    tail = text[-TAIL_CHARS:]
    return tail[tail.find("\n") + 1 :] or tail


def is_conditional(before: str) -> bool:
    """Say whether what follows holds only if another answer does not."""
    if find_any(before, _CONDITIONAL_STEMS) is None:
        return False
    end = max((match.end() for match in SENTENCE_END.finditer(before)), default=0)
    return bool(_CONDITIONAL.search(before, end))


def _read_guesses(text: str) -> str | None:
    """Return all values that the text puts up ("guess 1: 41, guess 2: 42"), None if it does not."""
    if find_any(text, _GUESS_STEMS) is None:
        return None
    ends = [guess.end() for guess in _GUESS.finditer(text)]
    values = _list_values(text) if len(ends) > 1 else []
    if len(ends) < 2 or sum(value.start >= ends[-1] for value in values) != 1:
        return None  # something is worked out from them
    first = (next((v.text for v in values if v.start >= end), None) for end in ends[:MAX_SKIPPED])
    return " or ".join(text for text in first if text) or None


def _list_values(text: str, start: int = 0) -> list[Value]:
    """Return formulas that hold more than a name, and the numbers outside of them, in order.

    From ``start`` on; from the beginning if that is within a formula.
    """
    spans = list(MATH_SPAN.finditer(text)) if "$" in text or "\\" in text else []
    if any(span.start() < start < span.end() for span in spans):
        start = 0
    found = [
        Value(*span.span(), content, False)
        for span in spans
        if span.start() >= start and (content := _formula(span))
    ]
    for match in _INEQUALITY.finditer(text, start):
        at = match.start() - (1 if text[match.start() - 1].isalpha() else 2)
        found.append(Value(at, match.end(), text[at : match.end()], False))
    found += [Value(*m.span(), m.group(), False) for m in _TUPLE.finditer(text, start)]
    labels = {label.start(1) for label in _LABEL.finditer(text, start)}
    numbers = [_as_value(m) for m in NUMBER.finditer(text, start) if m.start() not in labels]
    if not found:
        return numbers
    values: list[Value] = []
    for value in sorted(found + numbers, key=lambda v: (v.start, v.is_number)):
        if not values or values[-1].end <= value.start:
            values.append(value)
    return values


def _formula(span: re.Match[str]) -> str | None:
    """Return a formula's content, None if it is only a name such as ``ABC`` or prose."""
    content = next(group for group in span.groups() if group is not None).strip()
    worth = re.search(r"\d|[=<>]|\\(?:frac|sqrt|pi|lt|gt|le|ge|in|begin|infty|cup)", content)
    prose = re.search(r"(?<!\\)\b[a-z]{2,} [a-z]{2,} [a-z]{2,}\b", content)
    return content if worth and not prose else None


def take_clause(before: str) -> str:
    """Return what stands before a value in its own clause."""
    line = before.rfind("\n")
    end = 0 if before[:line].rstrip().endswith(",") else line + 1
    for match in _CLAUSE.finditer(before, end):
        end = match.end()
    return before[end:]


def _join_values(text: str, values: list[Value], index: int) -> tuple[int, str | None]:
    """Return the first of the values that the text lists or offers up to this one, and all."""
    first, joined = index, ""
    while first:
        before, value = values[first - 1], values[first]
        link = _read_link(text, before, value)
        if not link:
            break
        if first == index:
            unit = _UNIT_AFTER.match(text, value.end)
            joined = _with_name(text, value)
            joined += unit.group() if unit and _is_unit(unit[1]) else ""
        first -= 1
        if _only_number(before) != _only_number(value):
            joined = _with_name(text, before) + link + joined  # 5 rings, or 5 years
    return (index, None) if first == index else (first, joined)


def _only_number(value: Value) -> str:
    return next(_NUMBER_ONLY.finditer(value.text))[0] if value.is_number else value.text


def _with_name(text: str, value: Value) -> str:
    name = _NAMED.search(text[max(0, value.start - 12) : value.start])
    return (name.group() if name else "") + value.text


def _read_link(text: str, before: Value, value: Value) -> str | None:
    """Return what joins two values, None if nothing does: "3, 5", "3 or it could be 5"."""
    between = text[before.end : value.start]
    if len(between) > 80:
        return None
    if between.isspace() and before.is_number and value.is_number and "\n" not in between:
        return " "
    if _AND.fullmatch(between):
        return ", "
    if _OR.fullmatch(between):
        return " or "
    if (line := _LINE.fullmatch(between)) and _REST_OF_LINE.match(text, value.end):
        alone = _ALONE_BEFORE.search(text[max(0, before.start - 30) : before.start])
        return ", " if alone and alone[1] == line[1] else None
    if (unit := _TWO_UNITS.fullmatch(between)) and _is_unit(unit[1]):
        last = _UNIT_AFTER.match(text, value.end)
        return between if last and _is_unit(last[1]) else None
    return None


def qualify(text: str, value: Value) -> str | None:
    """Return a number with the words before it that make it another answer than the number."""
    before, after = text[max(0, value.start - 200) : value.start], text[value.end :][:60]
    near = before[-NEAR_CHARS:]  # enough for the patterns, which end at the value
    words = before.rstrip().lower()
    may_go_on = words.endswith(_FORMULA_ENDS) or "\\" in near or "__" in near
    if (may_go_on and _IN_FORMULA_BEFORE.search(near)) or _IN_FORMULA_AFTER.match(after):
        return None
    number = _OUT_OF.sub("/", value.text)
    if not _UNIT_AFTER.match(after) and (letters := _LETTERS_AFTER.match(after)):
        return number + letters.group()  # 5x, 3i
    if words.endswith(_MINUS_WORDS) and _MINUS.search(before):
        number = "-" + number
    unit = _UNIT_AFTER.match(after)
    if unit and _is_unit(unit[1]):
        number += unit.group()
    if words.endswith("from") and (open_end := _UPWARDS.match(after)):
        return f"from {number}{open_end.group()}"
    if bound := _BOUNDED_AFTER.match(after):
        return number + bound.group()
    is_listed = words.endswith(_LIST_ENDS)
    qualifier = words.endswith(_BOUND_ENDS) and _BOUNDED.search(near)
    qualifier = qualifier or (_LISTED.search(before) if is_listed else None)
    return (qualifier.group() if qualifier else "") + number
