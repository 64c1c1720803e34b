"""math-verify: for golds that our grammar cannot parse, and as the bench's baseline.

Imported in worker processes only. Its own timeouts are signals, which are switched off here: the
pool's clock is the limit.
"""

import re

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify


def judge_symbolically(answer: str, gold: str) -> bool:
    """Say whether math-verify finds two LaTeX answers equal that it read as mathematics.

    Only True means something: what it cannot read, it compares as text or by a number that it
    found inside.
    """
    golds, answers = (
        parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)
        for text in (gold, answer)
    )
    if not golds or not answers or isinstance(golds[0], str) or isinstance(answers[0], str):
        return False
    if _lost_letters(golds[0], gold) or _lost_letters(answers[0], answer):
        return False
    return bool(verify(golds, answers, timeout_seconds=None))


def _lost_letters(expression: object, text: str) -> bool:
    """Say whether a text has variables, and what was read from it has none."""
    letters = re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+|\{[a-z]+matrix\}|[ei]", "", text))
    return bool(letters) and not getattr(expression, "free_symbols", None)


def judge_as_peer(answer: str, gold: str, is_completion: bool) -> bool | None:
    """Judge as math-verify's documentation has it: both boxed; None if the gold does not parse."""
    configs = [LatexExtractionConfig(), ExprExtractionConfig()]
    golds = parse(f"\\boxed{{{gold}}}", configs, parsing_timeout=None)
    if not golds:
        return None
    text = answer if is_completion else f"\\boxed{{{answer}}}"
    answers = parse(text, configs, parsing_timeout=None)
    return bool(verify(golds, answers, timeout_seconds=None))
