"""Thinking and answer taken apart while they arrive."""

import pytest

from r1pipe.thinking import ThinkingSplitter

CASES = [
    # completion, whether the prompt opened the thinking, thinking, answer
    ("<think>a < b</think>4", False, "a < b", "4"),
    ("\n<think>\nso</think>\n\\boxed{4}", False, "\nso", "\n\\boxed{4}"),
    ("so</think>4", True, "so", "4"),
    ("just 4", False, "", "just 4"),
    ("<thin is no tag", False, "", "<thin is no tag"),
    ("<think>cut off </thi", False, "cut off </thi", ""),
    ("<think></think>4</think>5", False, "", "4</think>5"),
    ("", False, "", ""),
    ("<th", False, "", "<th"),
]


@pytest.mark.parametrize(("completion", "opened", "thinking", "answer"), CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_pieces_of_any_size(
    completion: str, opened: bool, thinking: str, answer: str, size: int
) -> None:
    splitter = ThinkingSplitter(opened)
    parts = []
    for start in range(0, len(completion), size):
        parts += splitter.feed(completion[start : start + size])
    parts += splitter.finish()
    assert "".join(text for thinks, text in parts if thinks) == thinking
    assert "".join(text for thinks, text in parts if not thinks) == answer


def test_what_is_certain_comes_at_once() -> None:
    splitter = ThinkingSplitter()
    assert list(splitter.feed("<think>one")) == [(True, "one")]
    assert list(splitter.feed(" two <")) == [(True, " two ")]
    assert list(splitter.feed("/think>")) == []
    assert list(splitter.feed("3")) == [(False, "3")]
