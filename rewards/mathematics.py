"""Judge mathematical answers."""

from collections.abc import Sequence

from rewards.completions import Completion, completion_text
from rewards.extract import extract_answer
from rewards.numbers import parse_number


def grade_answer(answer: str, gold: str) -> bool | None:
    """Say whether ``answer`` equals ``gold``; None if the gold cannot be judged against."""
    if not isinstance(gold, str) or not gold.strip():
        return None
    if not isinstance(answer, str) or not answer.strip():
        return False
    if "".join(answer.split()) == "".join(gold.split()):
        return True
    return _same_number(answer, gold)


def _same_number(answer: str, gold: str) -> bool:
    wanted = parse_number(gold)
    return wanted is not None and wanted == parse_number(answer)


def math_correct(
    completions: Sequence[Completion], answer: Sequence[str | None], **kwargs
) -> list[float | None]:
    """Return 1.0 where a completion's final answer equals the row's ``answer``, else 0.0.

    ``answer`` is the dataset column of gold answers, one per completion. None where the gold is
    missing or unusable. Raises ``ValueError`` if the two lists differ in length.
    """
    if len(completions) != len(answer):
        raise ValueError(f"{len(completions)} completions but {len(answer)} gold answers")
    return [_score(completion_text(c), gold) for c, gold in zip(completions, answer, strict=True)]


def _score(text: str, gold: str | None) -> float | None:
    verdict = grade_answer(extract_answer(text) or "", gold or "")
    return None if verdict is None else float(verdict)
