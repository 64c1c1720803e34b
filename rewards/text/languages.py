"""Tell which language words are in, well enough for a reward: by script, then by function words.

No model and no dependency: scripts separate Chinese, Japanese, Korean, Russian and others from
each other and from the Latin alphabet; a sentence in the Latin alphabet belongs to the language
whose function words ("the", "der", "que") it uses most.
"""

import re

MAX_CHARS = 200_000  # of a text that are read

_FUNCTION_WORDS = {
    "en": "the of and to is that it for this with we are as be on by so have from not can which "
    "then if at will an there what let need because but has if all now when i you",
    "fr": "le la les des une est et que dans pour qui sur avec nous donc alors il elle sont pas "
    "cette ce aux du plus par au être avons",
    "de": "der die das und ist nicht ein eine wir mit für auf dem den des sich auch es wird dann "
    "also sind wenn haben von zu",
    "es": "el la los las que y es en una por con para del se como entonces más pero son está al "
    "tenemos lo su hay",
    "it": "il la che di è un una per con non sono come del della più quindi allora si lo gli nel "
    "abbiamo anche questo",
    "pt": "o a os as que é um uma para com não do da em então mais temos são como por se isso "
    "também na no",
}
_WORDS_OF = {code: frozenset(words.split()) for code, words in _FUNCTION_WORDS.items()}

# Letters of each script, as a character class. Japanese is judged with its Han characters.
_SCRIPTS = {
    "han": "\u3400-\u4dbf\u4e00-\u9fff",
    "kana": "\u3040-\u30ff",
    "hangul": "\u1100-\u11ff\uac00-\ud7af",
    "cyrillic": "\u0400-\u04ff",
    "arabic": "\u0600-\u06ff",
    "devanagari": "\u0900-\u097f",
    "thai": "\u0e00-\u0e7f",
    "hebrew": "\u0590-\u05ff",
    "latin": "A-Za-z\u00c0-\u024f'",
}
_SCRIPTS_OF = {
    "zh": ("han",),
    "ja": ("kana", "han"),
    "ko": ("hangul",),
    "ru": ("cyrillic",),
    "ar": ("arabic",),
    "hi": ("devanagari",),
    "th": ("thai",),
    "he": ("hebrew",),
}
LANGUAGES = (*_WORDS_OF, *_SCRIPTS_OF)

_RUN = re.compile("|".join(f"(?P<{name}>[{letters}]+)" for name, letters in _SCRIPTS.items()))
_SENTENCE = re.compile(r"[.!?:;\n。！？；：]+")
_NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$[^$]*\$\$|\$[^$\n]*\$"
    r"|\\\(.{0,500}?\\\)|\\\[.{0,500}?\\\]"
    r"|\\boxed\{[^{}]*\}|\\[a-zA-Z]+|https?://\S+|</?[a-zA-Z]+>",
    re.DOTALL,
)


def language_share(text: str, language: str) -> float:
    """Return the share of the words of ``text`` that are in ``language``; 0.0 if it has none.

    Raises ``ValueError`` for a language that is not in ``LANGUAGES``.
    """
    if language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}; known are {', '.join(LANGUAGES)}")
    total = ours = 0.0
    text = text[:MAX_CHARS]
    for sentence in _SENTENCE.split(_NOT_PROSE.sub(" ", text)):
        counts = _count_words(sentence)
        total += sum(counts.values())
        if language in _SCRIPTS_OF:
            if "han" in _SCRIPTS_OF[language] and (language == "ja") != ("kana" in counts):
                continue  # Han characters are Japanese in a sentence with kana, Chinese without
            ours += sum(counts.get(script, 0.0) for script in _SCRIPTS_OF[language])
        elif counts.get("latin") and _is_latin_language(sentence, language):
            ours += counts["latin"]
    return ours / total if total else 0.0


def _count_words(sentence: str) -> dict[str, float]:
    """Count the words in each script. Scripts without spaces: two characters to a word."""
    counts: dict[str, float] = {}
    for run in _RUN.finditer(sentence):
        script, length = str(run.lastgroup), len(run.group())
        if script in ("han", "kana", "thai"):
            counts[script] = counts.get(script, 0.0) + length / 2
        elif length > 1 or run.group() in "aIàéoyе":  # other single letters are variables
            counts[script] = counts.get(script, 0.0) + 1
    return counts


def _is_latin_language(sentence: str, language: str) -> bool:
    """Say whether a sentence may be in ``language``: no other has more of its function words."""
    words = re.findall(f"[{_SCRIPTS['latin']}]+", sentence.casefold())
    hits = {code: sum(word in known for word in words) for code, known in _WORDS_OF.items()}
    return hits[language] == max(hits.values())
