"""Find what a text without a box states as its answer: "the answer is 5", "C is correct", "12 km."

What is said about a value is read with it (``values.py``).
"""

import re

from rewards.text.values import (
    DENIED,
    DENIED_AFTER,
    MATH_SPAN,
    NUMBER,
    RETRACTED,
    SENTENCE_END,
    Value,
    find_any,
    find_last,
    is_conditional,
    qualify,
    take_clause,
    take_tail,
)

MAX_SENTENCE_CHARS = 2_000
MAX_MARKERS = 8
_LONG_GAP = re.compile(r"(\s)\1{2,}")  # patterns with \s* are quadratic in its length
_LONG_GAPS = tuple(3 * chr(code) for code in range(0x3001) if chr(code).isspace())
_EMPHASIS = re.compile(
    r"(\*(?<![\w*]\*)\*{0,2}|_(?<![\w*]_)_)(?=[^*_\s])([^*\n]{0,200}?[^*_\s])\1(?![\w*])"
)
_PROSE_WORD = re.compile(r"(?<![\\\w])(?!(?:sin|cos|tan|ln|log|exp|sqrt|pi|and|or)\b)[^\W\d_]{2,}")
_WORD = re.compile(rf"{_PROSE_WORD.pattern}|[\u4e00-\u9fff]{{2}}")
_THOUSANDS = re.compile(
    r"(?:(?<=\$)|(?<=\$ )|(?=[\d,.]+\s?k\s(?:dollars|euros|USD)))"
    r"(\d[\d,.]*)\s?([kKmMbB])(?![\w'’/^])"
)
_THOUSANDS_WORDS = {"k": "thousand", "m": "million", "b": "billion"}
_CURRENCIES = ("$", "€", "£", "¥", "dollars", "euros", "元", "yuan")

# --- where a statement begins ---

_NOUN = (
    r"(?:answer|result|solution|(?:correct|right|best|my|final) (?:option|choice)|r[ée]ponse"
    r"|respuesta|resposta|antwort|risposta|ответ|jibu|đáp án)s?"
)
_NOUN_STEMS = (
    "answer", "result", "solution", "option", "choice", "ponse", "respuesta", "resposta", "antwort",
    "risposta", "ответ", "jibu", "đáp", "####", "答", "结果", "답", "คำตอบ", "উত্তর", "సమాధానం",
    "选", "正确的", "الإجابة",
)  # fmt: skip
_CLAIM_STEMS = ("correct", "right", "best", "answer", "go", "choose", "pick", "select", "正确")
_NOT = r"(?:\s+(?:\w+ly\s+)?not|\s?not|n['’]?t)\b"
# "The answer is", "Answer:", and their like in some other languages; then what they deny.
_MARKER = re.compile(
    rf"\b{_NOUN}\b\W{{0,3}}"
    rf"(?:(?P<no>\b(?:is|are|was|were|would|could|can|must|should|will|may|might|does|do|did){_NOT}"
    r"(?:\s+(?:be|equal)\b(?:\s+to\b)?)?|\b(?:no es|non è|não é|n['’]est pas|не)\b)"
    r"|(?P<maybe>\b(?:could|might|may|can)\s+(?:\w+\s+)?be\b)"
    r"|\b(?:is|are|est|es|ist|lautet|è|é|ni|là|(?:would|must|should|will|has to) be"
    r"|comes (?:out )?to|equals|becomes|turns out to be)\b|['’]s\b|:|=)[\s*_:：]*"
    r"|\banswer\b(?=\s*(?:\$|\\\(|\\\[))[\s*_:：]*"
    r"|(?:^|\n)[^\w\n]{0,8}(?:final\s+)?answer[^\w\n]{0,8}\n\s*(?=\S{1,40}\s*(?:\n|$))"  # a heading
    r"|\banswer\s[-–—]+\s|####[\s*_:：]*"
    r"|(?:答案|结果|答え|答|답|정답|คำตอบ|উত্তর|సమాధానం)\s*(?:应该|应当|应|就|便|即|显然|一定)?"
    r"(?:(?P<zh_no>(?:并?不(?:会|可能|应该)?是|不为|不等于|并非))"
    r"|可能[是为]|[是为為：:=]|は|은|คือ)[\s*_:：]*"
    r"|【答案】[\s*_:：]*"
    r"|(?<![不别])(?<!不能)(?<!不应)(?:选项?|选择|正确的(?:选项|答案)?)\s*[是为：:]?\s*"
    r"(?=[(（]?[A-J]+\s*[)）]?\s*(?:项|选项)?(?:[。．.,，；;、\s]|$))"
    r"|الإجابة(?:\s+هي|\s*:)[\s*_:：]*",
    re.IGNORECASE,
)
# If the answer is 3; the wrong answer is 3.
_SUPPOSED = re.compile(
    r"\b(?:if|whether|suppose|assum\w+|unless|were)\s+(?:that\s+)?(?:\w+\s+)?$", re.I
)
_SUPPOSED_STEMS = ("if", "whether", "suppose", "assum", "unless", "were")
_WRONG_NOUN = re.compile(
    r"\b(?:wrong|incorrect|false|not (?:the|an?))\s+(?:final\s+)?(?=\w+[^\Ws]\W)"
    r"|(?:n['’]t|\bnot|\bnever)\s+(?:think|believe|say|claim|agree|sure|certain|true)\b[^.\n]*$"
    r"|\b(?:doubt|deny|false|untrue)\s+(?:that\s+)?(?:the\s+)?(?:\w+\s+)?$",
    re.IGNORECASE,
)
_WRONG_STEMS = ("wrong", "correct", "false", "not", "n't", "n’t", "never", "doubt", "deny", "true")
_ANOTHER = re.compile(r"\b(?:another|other|alternative|possible|plausible)\s+(?:\w+\s+)?$", re.I)
# 41 is the answer.
_REVERSED = re.compile(
    r"\s(?:is|are|was|were|must be|would be|has to be)\s+(?:\w+ly\s+|thus\s+|therefore\s+)?"
    r"(?:the|my|our)\s+(?:(?:final|correct|right|best|only|desired|required)\s+)*"
    r"(?:answers?|solutions?|results?)\b(?!\s*(?:is|:|=|to|of)\b)",
    re.IGNORECASE,
)
_LETTER = r"\(?\b(?P<{}>[A-J])\b\)?"
_IS = r"\s+(?:is|must be|would be|has to be)\s+(?:\w+ly\s+)?(?:the\s+)?"
# Option C is correct. I'd go with C.
_CLAIM = re.compile(
    rf"\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer|[Aa]lternative)\s*{_LETTER.format('a')}{_IS}"
    r"(?:correct|right|true|best)\b"
    rf"|(?<![\w'’]){_LETTER.format('b')}{_IS}(?:correct|right|best|answer)\b"
    r"|\b(?:[Gg]o(?:ing)? with|[Cc]hoose|[Pp]ick|[Ss]elect)\s+(?:option |choice |answer )?"
    rf"{_LETTER.format('c')}(?=[*_\s]*(?:[.,;!)]|$|\n|because|since))"
    r"|(?<![A-Za-z])(?P<d>[A-J])\s*(?:选?项)?\s*(?:是|为)?正确(?:的|答案|选项)*(?=[。．.,，;；\s]|$)"
)
_LETTER_END = re.compile(r"[A-J][.\s]*$")
_LAST_LETTER = re.compile(
    r"\b(?:option|choice|therefore|thus|hence|so|(?:it|this)(?:['’]s| is| must be| has to be))"
    r"[,:]?\s+\(?((?-i:[A-J]))\)?[.\s]*$",
    re.IGNORECASE,
)
_UNCLAIMED = re.compile(
    r"\b(?:if|whether|not|never|neither|nor|unless|or|doubt|wrong|false)\b"
    r"|n['’]t\b|/\s*$|[不或]",
    re.I,
)
_OPTION_FIRST = re.compile(
    r"\s*\(?([A-J])(?:(?:\)|[.:,])(?=\s|$)|\)?\s+is\s+(?:the\s+)?(?:correct|right|true|best|answer)\b)"
)
_YES_FIRST = re.compile(
    r"\s*(yes|no|true|false)\b(?:[.!]?\s*$|[.,!]?\s+(?:because|since|as)\b)", re.I
)

# --- what follows a statement ---

# Up to "is", with no number on the way but in formulas: "the largest $n$ with $n^2 < 50$ is 7".
_PROSE_LEAD = re.compile(
    r"(?=[A-Za-z$\\(])(?:[^\d$]|\$[^$]{0,200}\$){0,200}?\b(?:is|are|equals|be)\b(?!n['’]|\s+not\b)\s*:?\s*"
)
_ADVERB = re.compile(
    r"^\s*(?:for sure|surely|clearly|simply|just|therefore|definitely|indeed|thus|hence|donc|:)\s*",
    re.IGNORECASE,
)
_AFTERTHOUGHT = re.compile(
    r",\s+(?!and\b|or\b)(?=[a-z]{2})|\s+(?:because|since|as|so)\s"
    r"|\s[-–—]{1,3}\s(?=(?:I|[a-zA-Z]{2,})['’]?\w*\s+[a-zA-Z])|[，,]\s*(?:因为|由于|所以|其中|即)"
)
_REASONS = ("because", "since", "as", "so", "因为", "由于", "所以", "其中", "即")
_REMARK = re.compile(r"(?<=[\w})$])\s+\((?:(not\s)[^()]*|[^()]*[a-z]{3,}[^()]*)\)$")
_DRESSED = re.compile(r"<([^<>,\s]{1,30})>|[(（]?([A-J]+)[)）]?\s*选?项")
# Another value, offered in the rest of the sentence or in the next one.
_HEDGING = re.compile(
    r"\b(?:or|maybe|perhaps|possibly|alternatively|otherwise|either|could|might|may|if|unless|no"
    r"|not|wait|actually|rather|sorry)\b|或|可能|也许",
    re.IGNORECASE,
)
_VALUE = re.compile(r"\d|\$|\\[a-z(\[]|\b[A-J]\b")
_CONTINUED = re.compile(
    r"[.!;]*\s*((?:(?:or|alternatively|maybe|perhaps|possibly|otherwise)\b"
    r"|(?:it|that|this|x|the answer)\s+(?:could|might|may)\s+(?:\w+\s+)?be\b)[^.\n]{0,80})",
    re.IGNORECASE,
)
# The answer is 5... no, 6.
_CORRECTED = re.compile(
    r"[.!;…\s]*(?:(?:no|wait|actually|sorry|oops)[,.!…]|wait\b|no wait|correction\b|scratch that"
    r"|just kidding|i mean\b|my mistake)",
    re.IGNORECASE,
)


def find_statement(text: str) -> str | None:
    """Return the answer that a text states without a box, as ``extract_answer`` says (3 to 5)."""
    if find_any(text, _LONG_GAPS) is not None:
        text = _LONG_GAP.sub(r"\1\1", text)
    if "*" in text or "__" in text:
        text = _EMPHASIS.sub(r"\2", text)
    answer = _find_stated(text) or _find_option(text) or _find_bare(text) or find_last(text)
    return _THOUSANDS.sub(_spell_thousands, answer) if answer else None


def _spell_thousands(match: re.Match[str]) -> str:
    return f"{match[1]} {_THOUSANDS_WORDS[match[2].lower()]}"


# --- statements ---


def _find_stated(text: str) -> str | None:
    start = find_any(text, _NOUN_STEMS)
    if start is None:
        return None
    markers = list(_MARKER.finditer(text, max(0, start - 20)))[-MAX_MARKERS:]
    for index in reversed(range(len(markers))):
        marker = markers[index]
        before = text[max(0, marker.start() - 80) : marker.start()]
        sentence, end = _take_sentence(text, marker.end())
        if text[end : end + 1] in ("?", "？") or _is_supposed(before):
            continue
        answer = _clean_statement(sentence)
        if not answer:
            continue
        after = text[end : end + 120]
        is_denied = (
            marker["no"]
            or marker["zh_no"]
            or _has_wrong_noun(before + marker.group())
            or _has_wrong_noun(before)
        )
        if is_denied or answer.startswith("not ") or RETRACTED.match(after):
            answer = answer.removeprefix("not ")
            value = NUMBER.search(answer)
            later = find_last(text[marker.end() :])
            is_other = later and later not in (answer, value and value.group().strip())
            return later if is_other else f"not {answer}"
        if correction := _CORRECTED.match(after):
            later = find_last(text[end + correction.end() :][:400])
            return later or f"not {answer}"
        if is_conditional(before):
            return f"otherwise {answer}"
        if (more := _CONTINUED.match(after)) and _VALUE.search(more[1]):
            return f"{answer} or {more[1]}"
        if index and (marker["maybe"] or _ANOTHER.search(before)):
            earlier = _clean_statement(_take_sentence(text, markers[index - 1].end())[0])
            return f"{earlier} or {answer}" if earlier != answer else answer
        return answer
    return _find_reversed(text)


def _is_supposed(before: str) -> bool:
    return find_any(before, _SUPPOSED_STEMS) is not None and bool(_SUPPOSED.search(before))


def _has_wrong_noun(text: str) -> bool:
    return find_any(text, _WRONG_STEMS) is not None and bool(_WRONG_NOUN.search(text))


def _find_reversed(text: str) -> str | None:
    """Return what stands before the last "is the answer"."""
    matches = list(_REVERSED.finditer(text))
    if not matches:
        return None
    end = matches[-1].start()
    head = text[max(0, end - 200) : end]
    letter = re.search(r"(?:^|[\s*])\(?([A-J])\)?$", head)
    if letter:
        return None if _UNCLAIMED.search(take_clause(head[: letter.start()])) else letter[1]
    near = next(re.finditer(r"[^\n.!?]*(?:\.\d[^\n.!?]*)*$", head)).group()
    return find_last(near) if re.search(r"[\d$)\]}]\W*(?:\w+\s?){0,2}$", near) else None


def _take_sentence(text: str, start: int) -> tuple[str, int]:
    """Return the sentence after ``start`` and where it ends; ends inside a formula do not count."""
    rest = text[start : start + MAX_SENTENCE_CHARS]
    lead = len(rest) - len(rest.lstrip())
    rest, position = rest[lead:], 0
    spans = None
    while end := SENTENCE_END.search(rest, position):
        spans = spans if spans is not None else [s.span() for s in MATH_SPAN.finditer(rest)]
        inside = next((e for s, e in spans if s < end.start() < e), None)
        if inside is None:
            return rest[: end.start()], start + lead + end.start()
        position = inside
    return rest, start + lead + len(rest)


def _clean_statement(sentence: str) -> str:
    """Reduce "the largest $n$ is 34" to "34", "for sure D, it can't be A" to "D"."""
    sentence = _ADVERB.sub("", sentence.strip(" \t*_"))
    sentence = _cut_afterthought(sentence)
    if re.match(r"(?:the|an?|there|it|this|that)\b|\$[^$]*\$\s+\w+\s+is\b", sentence, re.I):
        while lead := _PROSE_LEAD.match(sentence):
            sentence = sentence[lead.end() :]
    remark = _REMARK.search(sentence)
    if remark and (remark[1] or not _HEDGING.search(remark.group())):
        sentence = sentence[: remark.start()]
    sentence = sentence.strip(" \t*_")
    if dressed := _DRESSED.fullmatch(sentence):
        return dressed[1] or dressed[2]
    value = NUMBER.search(sentence)
    if value and DENIED.search(sentence[: value.start()]):
        return _deny(sentence[value.start() :])
    if value and DENIED_AFTER.match(sentence[value.end() :]):
        return _deny(value.group())
    if len(_PROSE_WORD.findall(sentence)) >= 3 and "\\" not in sentence:
        return _find_only_number(sentence) or sentence
    return sentence


def _deny(value: str) -> str:
    number = NUMBER.match(value)
    return "not " + (number.group() if number else value).strip()


def _cut_afterthought(sentence: str) -> str:
    """Cut off what explains the answer; what offers another one is part of it."""
    for cut in _AFTERTHOUGHT.finditer(sentence):
        tail = sentence[cut.end() :]
        is_reason = cut.group().strip(" ,，").startswith(_REASONS)
        if is_reason or not (_HEDGING.search(tail) and _VALUE.search(tail)):
            return sentence[: cut.start()]
        if re.match(r"not\b", tail):  # C, not B
            return sentence[: cut.start()]
    return sentence


def _find_only_number(sentence: str) -> str | None:
    """Return the only number of a sentence, or its only sum of money, if there is one."""
    numbers = list(NUMBER.finditer(sentence))
    money = [number for number in numbers if _is_money(sentence, number)]
    found = next((few for few in (numbers, money) if len(few) == 1), None)
    return (
        qualify(sentence, Value(*found[0].span(), found[0].group().strip(), True))
        if found
        else None
    )


def _is_money(sentence: str, number: re.Match[str]) -> bool:
    before, after = sentence[: number.start()].rstrip(), sentence[number.end() :].lstrip()
    return before.endswith(_CURRENCIES) or "$" in number.group() or after.startswith(_CURRENCIES)


def _find_option(text: str) -> str | None:
    """Return the option that opens a short text, or that is called right; Yes or No likewise."""
    letters: dict[str, None] = {}
    tail = take_tail(text)
    claims = list(_CLAIM.finditer(tail)) if find_any(tail, _CLAIM_STEMS) is not None else []
    for claim in claims[-MAX_MARKERS:]:
        clause = take_clause(tail[max(0, claim.start() - 100) : claim.start()])
        if not _UNCLAIMED.search(clause):
            letters[claim["a"] or claim["b"] or claim["c"] or claim["d"]] = None
    if letters:
        return ", ".join(letters)
    last = _LETTER_END.search(tail, max(0, len(tail) - 60))
    last = last and _LAST_LETTER.search(tail, max(0, len(tail) - 60))
    if last and not _UNCLAIMED.search(take_clause(tail[: last.start()][-100:])):
        return last[1]
    first = (_OPTION_FIRST.match(text) or _YES_FIRST.match(text)) if len(text) < 300 else None
    return first[1] if first else None


def _find_bare(text: str) -> str | None:
    """Return the whole text if it is one short line of mathematics: "x = 3", "B"."""
    text = text.strip()
    is_bare = len(text) <= 200 and "\n" not in text and not _WORD.search(text)
    return text or None if is_bare else None
