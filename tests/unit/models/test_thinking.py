"""Thinking and answer taken apart while they arrive."""

import pytest

from r1pipe.models.thinking import ThinkingSplitter, close_tag, drop_opening, find_opened_tag

CASES = [
    # completion, what the prompt has opened, thinking, answer
    ("<think>a < b</think>4", "", "a < b", "4"),
    ("\n<think>\nso</think>\n\\boxed{4}", "", "\nso", "\n\\boxed{4}"),
    ("so</think>4", "<think>\n", "so", "4"),
    ("so</think>, or</thinking>4", "<thinking>", "so</think>, or", "4"),
    ("so<|end_of_thought|>4", "<|begin_of_thought|>\n", "so", "4"),
    ("just 4", "", "", "just 4"),
    ("<thin is no tag", "", "", "<thin is no tag"),
    ("<think>cut off </thi", "", "cut off </thi", ""),
    ("<think></think>4</think>5", "", "", "4</think>5"),
    ("", "", "", ""),
    ("<th", "", "", "<th"),
]


@pytest.mark.parametrize(("completion", "opened", "thinking", "answer"), CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_pieces_of_any_size(
    completion: str, opened: str, thinking: str, answer: str, size: int
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


OPENED = [
    # a prompt's end, what the template writes before answers that are given, what is opened
    ("2 + 2?<|assistant|><think>\n", "<|assistant|>", "<think>\n"),
    ("2 + 2?<|assistant|><think>", "<|assistant|><think>\n\n</think>\n\n", "<think>"),
    ("<|im_start|>assistant\n<thinking>\n\n", "<|im_start|>assistant\n", "<thinking>\n\n"),
    ("[/INST][THINK]", "[/INST]", "[THINK]"),
    ("<|assistant|>◁think▷", "<|assistant|>", "◁think▷"),
    ("<|assistant|><|begin_of_thought|>\n", "<|assistant|>", "<|begin_of_thought|>\n"),
    ("<|assistant|><scratch>", "<|assistant|>", "<scratch>"),  # any tag that begins no turn
    ("Assistant: <think>", "", "<think>"),  # a template without answers
    ("2 + 2?<|assistant|>", "<|assistant|>", ""),
    ("2 + 2?<|assistant|>", "", ""),
    ("2 + 2?<|assistant|>", "<|user|>", ""),  # a template that shows answers otherwise
    ("2 + 2?<assistant>\n", "user: ", ""),
    ("<|start_header_id|>assistant<|end_header_id|>\n\n", "assistant<|end_header_id|>\n\n", ""),
    ("[INST] 2 + 2? [/INST]", "[/INST]", ""),
    ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_start|>assistant\n", ""),
    ("What is <b", "<|assistant|>", ""),
]


@pytest.mark.parametrize(("prompt", "header", "opened"), OPENED)
def test_what_a_prompt_has_opened(prompt: str, header: str, opened: str) -> None:
    assert find_opened_tag(prompt, header) == opened


@pytest.mark.parametrize(
    ("solution", "opening", "rest"),
    [
        ("<think>\nso\n</think>\n4", "<think>\n", "so\n</think>\n4"),
        ("<think>so</think>4", "<think>\n", "so</think>4"),
        ("\n<think>\nso</think>4", "<think>", "\nso</think>4"),
        ("<think>\nso</think>4", "", "<think>\nso</think>4"),
        ("so</think>4", "<think>\n", "so</think>4"),  # begins inside already
        ("<reasoning>so</reasoning>4", "<reasoning>", "so</reasoning>4"),
        ("<reasoning>so</reasoning>4", "<think>", "<reasoning>so</reasoning>4"),
        ("4 < 5 and [1]", "<think>\n", "</think>\n\n4 < 5 and [1]"),  # an answer without thoughts
    ],
)
def test_a_trace_goes_on_where_its_prompt_ends(solution: str, opening: str, rest: str) -> None:
    assert drop_opening(solution, opening) == rest


@pytest.mark.parametrize(
    ("tag", "closed"),
    [
        ("<think>", "</think>"),
        ("[THINK]", "[/THINK]"),
        ("◁think▷", "◁/think▷"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ],
)
def test_the_tag_that_closes(tag: str, closed: str) -> None:
    assert close_tag(tag) == closed
