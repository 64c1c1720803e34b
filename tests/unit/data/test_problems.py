"""Data recipes as files, and their rows."""

import asyncio
import json
import re
from pathlib import Path

import pytest

import rewards
from r1pipe.config.base import ProblemSet
from r1pipe.data.problems import check_row, load_problems
from r1pipe.envs.tools import ToolEnvironment
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError


def load_arithmetic(**options: object) -> list[Problem]:
    split = options.pop("split", "train")
    return load_problems(ProblemSet(recipe="arithmetic", split=split, options=options))


def test_arithmetic_is_reproducible_and_right() -> None:
    problems = load_arithmetic(size=200, guess_share=0.5)
    assert problems == load_arithmetic(size=200, guess_share=0.5)
    assert problems != load_arithmetic(size=200, guess_share=0.5, seed=1)
    for problem in problems:
        *steps, _, box = problem.solution.removeprefix("<think>\n").split("\n")
        assert box == f"\\boxed{{{problem.answer}}}"
        for step in steps:
            event, _, sum_ = step.partition(": ")
            assert f" {event}." in problem.question
            left, _, right = sum_.partition("=")
            first, sign, second = left.partition("+") if "+" in left else left.partition("-")
            assert int(right) == int(first) + (1 if sign == "+" else -1) * int(second)


def test_guess_share_changes_solutions_only() -> None:
    thinking, guessing = load_arithmetic(size=300), load_arithmetic(size=300, guess_share=1.0)
    assert [p.prompt for p in thinking] == [p.prompt for p in guessing]
    assert all(len(a.solution) > len(b.solution) for a, b in zip(thinking, guessing, strict=True))


def test_mixed_and_plain_traces() -> None:
    """Shares of them as asked for; the problems, and what else is drawn, stay as they are."""
    pure = load_arithmetic(size=1000, guess_share=0.5)
    mixed = load_arithmetic(size=1000, guess_share=0.5, mixed_share=0.4, plain_share=0.8)
    assert [(p.prompt, p.answer) for p in mixed] == [(p.prompt, p.answer) for p in pure]
    traces = [problem.solution for problem in mixed]
    assert [t.count("=") for t in traces] == [p.solution.count("=") for p in pure]
    plain = [trace for trace in traces if "<think>" not in trace]
    assert sum(rewards.format(completions=plain)) == 0
    assert 0.75 < len(plain) / 1000 < 0.85  # four standard errors around 0.8
    shares = rewards.language_consistency(completions=[t for t in traces if "=" in t])
    assert 0.25 < sum(share < 0.9 for share in shares) / len(shares) < 0.4
    assert set(rewards.language_consistency(completions=[p.solution for p in pure])) == {0.0, 1.0}
    right = rewards.math_correct(completions=traces, answer=[p.answer for p in mixed])
    assert right == [1.0] * 1000


def test_facts_are_asked_for_and_stand_in_the_story() -> None:
    sums, facts = load_arithmetic(size=300), load_arithmetic(size=300, fact_share=1.0)
    for problem, fact in zip(sums, facts, strict=True):
        story, _, _ = problem.question.rpartition(". ")
        question = fact.question.removeprefix(f"{story}. ")
        assert question != fact.question
        told = re.match(r"How many (at first|on (?P<day>\w+))\?$", question)
        (sentence,) = (
            s for s in story.split(". ") if s.startswith(told["day"] or f"{story[:3]} has")
        )
        assert fact.answer == re.search(r"\d+", sentence).group()
        assert fact.solution == f"The answer is {fact.answer}."
    right = rewards.math_correct(
        completions=[fact.solution for fact in facts], answer=[fact.answer for fact in facts]
    )
    assert right == [1.0] * 300
    some = [problem.category for problem in load_arithmetic(size=1000, fact_share=0.2)]
    assert 0.15 < some.count("fact") / 1000 < 0.25  # four standard errors around 0.2


def test_stories_in_chinese() -> None:
    """Told and worked out so, under a source of their own."""
    english, chinese = (
        load_arithmetic(size=200, guess_share=0.5, language=code) for code in ("en", "zh")
    )
    assert {problem.source for problem in chinese} == {"arithmetic-zh"}
    assert {problem.id for problem in english}.isdisjoint(problem.id for problem in chinese)
    traces = [problem.solution for problem in chinese]
    right = rewards.math_correct(completions=traces, answer=[p.answer for p in chinese])
    assert right == [1.0] * 200
    for problem in chinese:
        assert not re.search(r"[A-Za-z]", problem.question)
        for line in problem.solution.split("\n")[1:-2]:
            event, _, sum_ = line.partition(": ")
            assert f"。{event}。" in problem.question
            left, _, result = sum_.partition("=")
            first, sign, second = re.split(r"([+-])", left)
            assert int(result) == int(first) + int(sign + second)
    with pytest.raises(UserError, match="are of problems in English"):
        load_arithmetic(language="zh", fact_share=0.5)
    with pytest.raises(UserError, match="language"):
        load_arithmetic(language="fr")


def test_splits_share_no_sum() -> None:
    def sums(split: str) -> set[str]:
        return {p.solution for p in load_arithmetic(size=2000, split=split)}

    assert not sums("train") & sums("test")


def test_products_are_for_a_calculator() -> None:
    """Their calls, by the tool itself, give the result and the answer that the trace has."""
    problems = load_problems(ProblemSet(recipe="products", options={"size": 300}))
    assert problems == load_problems(ProblemSet(recipe="products", options={"size": 300}))
    for problem in problems:
        call, result, last = problem.trace
        (called,) = call["tool_calls"]
        turn = asyncio.run(ToolEnvironment(problem).step({**call, "tool_calls": [written(called)]}))
        assert turn.messages == [result]
        assert last["content"] == f"\\boxed{{{result['content']}}}"
        assert problem.tools == ToolEnvironment(problem).tools
        told = re.findall(r"\d+", problem.question)
        assert told == re.findall(r"\d+", called["function"]["arguments"]["expression"])
    right = rewards.math_correct(
        completions=[p.trace_text for p in problems], answer=[p.answer for p in problems]
    )
    assert right == [1.0] * 300


def written(call: dict) -> dict:
    """As a parser gives it: the arguments are JSON text."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"])}}


def test_products_guess_as_often_as_asked_and_splits_share_none() -> None:
    def load(**options: object) -> list[Problem]:
        return load_problems(ProblemSet(recipe="products", **options))

    calling, mixed = load(options={"size": 1000}), load(options={"size": 1000, "guess_share": 0.7})
    assert [(p.prompt, p.answer) for p in mixed] == [(p.prompt, p.answer) for p in calling]
    guesses = [p for p in mixed if len(p.trace) == 1]
    assert 0.64 < len(guesses) / 1000 < 0.76  # four standard errors around 0.7
    assert all(p.trace_text == f"The answer is {p.answer}." for p in guesses)
    heldout = load(split="test", options={"size": 300})
    assert not {p.trace_text for p in calling} & {p.trace_text for p in heldout}


SAID = {"role": "assistant", "content": "2"}
# a solution, words of the error
UNREADABLE = [
    (3, '"solution" is int, not a string or messages'),
    (["2"], "message 1 of the solution: no role of"),
    ([{"role": "oracle", "content": "2"}], "message 1 of the solution: no role of"),
    ([SAID, {"role": "tool", "content": 3}, SAID], "message 2 of the solution: its content is not"),
    ([{"role": "tool", "content": "2"}, SAID], "begins and ends with the assistant's messages"),
    ([SAID, {"role": "tool", "content": "2"}], "begins and ends with the assistant's messages"),
    ([{**SAID, "tool_calls": [{"x": {1}}]}], "cannot be written as JSON"),
]


@pytest.mark.parametrize(("solution", "words"), UNREADABLE)
def test_a_trace_of_several_turns_is_checked(solution: object, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        check_row({**ROW, "solution": solution})


def test_gsm8k_reads_the_hub_s_rows_and_separate_columns(tmp_path: Path) -> None:
    hub = {"question": "2 x 600?", "answer": "2*600=<<2*600=1200>>1200 books.\n#### 1,200"}
    ours = {"question": "1+1?", "solution": "1+1=<<1+1=2>>2\n#### 2", "answer": "2"}
    (tmp_path / "train.jsonl").write_text(json.dumps(hub) + "\n" + json.dumps(ours) + "\n")
    source = ProblemSet(recipe="gsm8k", options={"path": str(tmp_path)})
    first, second = load_problems(source)
    assert (first.answer, second.answer) == ("1200", "2")
    assert first.solution == "<think>\n2*600=1200 books.\n</think>\n\\boxed{1,200}"
    assert (first.question, second.question) == ("2 x 600?", "1+1?")


ROW = {"id": "1", "kind": "math", "prompt": [{"role": "user", "content": "1+1"}], "answer": "2"}

TALK = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]

# (rows of a recipe, words of the error)
BAD_ROWS = [
    ([ROW, {**ROW, "id": "2", "answer": None}], ["row 2", "id 2", '"answer"']),
    ([{k: v for k, v in ROW.items() if k != "answer"}], ["row 1", '"answer"']),
    ([{**ROW, "answer": 2}], ["row 1", "not a string"]),
    ([{**ROW, "anwser": "2"}], ["row 1", "anwser"]),
    ([{**ROW, "prompt": "1+1"}], ["row 1", "prompt"]),
    ([{**ROW, "kind": "code"}], ["row 1", '"tests"']),
    ([ROW, ROW], ["row 2", "twice, first in row 1"]),
    ([{**ROW, "prompt": TALK}], ["row 1", "ends with the assistant's answer"]),
    ([{**ROW, "prompt": [{**TALK[0], "role": "usr"}]}], ['no role "usr"; did you mean user?']),
    ([{**ROW, "prompt": [{**TALK[0], "role": "human"}]}], ['no role "human"']),
    ([{**ROW, "prompt": [{**TALK[0], "content": " "}]}], ["the prompt is empty"]),
    ([{**ROW, "prompt": [TALK[1] | {"tool_calls": [1]}, TALK[0]]}], ["tool calls"]),
    ([{**ROW, "answer": " "}], ['no "answer"']),
    ([{**ROW, "kind": "code", "tests": {}}], ['no "tests"']),
    ([{**ROW, "tests": {1, 2}}], ["row 1", "JSON"]),
    ([{**ROW, "id": 0}], ['"id" is int']),
    ([{**ROW, "category": 3}], ['"category" is int']),
    (["text"], ["row 1", "dict"]),
    ([], ["no rows"]),
]


@pytest.mark.parametrize(("rows", "words"), BAD_ROWS, ids=lambda x: str(x)[-30:])
def test_bad_row_is_named(rows: list, words: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text(f"def load(split):\n    return {rows!r}\n")
    with pytest.raises(UserError) as error:
        load_problems(ProblemSet(recipe=str(recipe)))
    assert "mine.py" in str(error.value)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_bad_recipe_names_and_options(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean arithmetic"):
        load_problems(ProblemSet(recipe="aritmetic"))
    with pytest.raises(UserError, match="did you mean size"):
        load_arithmetic(sise=3)
    with pytest.raises(UserError, match="train"):
        load_arithmetic(split="valid")
    with pytest.raises(UserError, match=r"recipe arithmetic: options\.size: .* valid integer"):
        load_arithmetic(size="3")
    with pytest.raises(UserError, match="different problems"):
        load_arithmetic(min_steps=1, max_steps=1, max_value=3)
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_like_this\n")
    with pytest.raises(UserError, match=r"broken\.py: cannot be imported"):
        load_problems(ProblemSet(recipe=str(broken)))


# what a recipe's file holds, words of the error
RAISING = [
    (f"    yield {ROW!r}\n    raise TypeError('boom\\nx')\n", "line 3, after 1 rows: TypeError: b"),
    ("    raise ValueError('no such file here')\n", "mine.py: no such file here"),
    ("    raise SystemExit(3)\n", "line 2, after 0 rows: SystemExit: 3"),
    ("    return None\n", "after 0 rows: TypeError"),
    (f"    yield {ROW!r}\n    assert False\n", "line 3, after 1 rows: AssertionError"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "words"), RAISING)
def test_recipe_that_raises(body: str, words: str, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text(f"def load(split):\n{body}")
    with pytest.raises(UserError) as error:
        load_problems(ProblemSet(recipe=str(recipe)))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_recipe_that_is_data_or_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data recipe; for rows use recipe columns"):
        load_problems(ProblemSet(recipe=str(tmp_path / "mine.jsonl")))
    with pytest.raises(UserError, match=re.escape(f"looked for in {Path.cwd()}")):
        load_problems(ProblemSet(recipe="my/recipe.py"))
