"""Which samples become traces: filters, choice, counts."""

from collections import Counter
from types import SimpleNamespace

import pytest

from r1pipe.config.base import Environment, ProblemSet, Sampling
from r1pipe.config.sft import TraceFilters
from r1pipe.config.traces import FewShot, Traces
from r1pipe.sft.filters import choose_diverse, find_flaw
from r1pipe.sft.rejection import (
    drop_flawed,
    find_rejection,
    make_trace,
    prepend_few_shot,
    select_samples,
)
from r1pipe.types import Episode, Problem, Rollout, Score
from r1pipe.utils.errors import UserError

ENGLISH = "We add the two numbers and then we have the answer that was asked for."
CHINESE = "我们把这两个数字加起来然后得到答案。"
GERMAN = "Wir addieren die beiden Zahlen und dann haben wir auch das Ergebnis für die Aufgabe."


def trace(thinking: str, answer: str = "\\boxed{2}") -> str:
    return f"<think>\n{thinking}\n</think>\n{answer}"


ALL = {"min_language_share": 0.9, "max_paragraph_length": 200, "drop_code_blocks": True}
FORMAT = {"require_format": True}
LONG = "The sum is two. " * 20
# (completion, filters, why it is dropped)
FLAWS = [
    (trace(ENGLISH), ALL, None),
    (trace(GERMAN), ALL, None),
    (trace(CHINESE), ALL, None),
    (trace(f"{ENGLISH}\n{CHINESE}"), ALL, "mixed_language"),
    (trace(f"{ENGLISH}\n{GERMAN}"), ALL, "mixed_language"),
    (trace(f"{ENGLISH}\n{CHINESE}"), {}, None),
    (trace(f"{ENGLISH}\n{CHINESE}"), {"min_language_share": 0.3}, None),
    (trace(GERMAN), {**ALL, "language": "en"}, "mixed_language"),
    (trace(GERMAN), {**ALL, "language": "de"}, None),
    (trace(ENGLISH, answer=CHINESE), ALL, None),  # the chain of thought is what is looked at
    (trace("$1+1=2$"), {**ALL, "language": "en"}, None),  # no words, so none are foreign
    (trace(LONG), ALL, "long_paragraph"),
    (trace(LONG), {}, None),
    (trace(LONG[:150] + "\n\n" + LONG[:150] + "\n \n" + LONG[:150]), ALL, None),
    (trace(ENGLISH, answer=LONG), ALL, None),
    (trace(f"{ENGLISH}\n```python\nprint(1 + 1)\n```"), ALL, "code_block"),
    (trace(f"{ENGLISH}\n```python\nprint(1 + 1)\n```"), {}, None),
    (trace(ENGLISH, answer="```python\nprint(2)\n```"), ALL, None),
    (trace(ENGLISH), FORMAT, None),
    (ENGLISH, FORMAT, "no_format"),
    (ENGLISH, {}, None),
    (f"{ENGLISH} {CHINESE} \\boxed{{2}}", ALL, "mixed_language"),  # nothing marked as thinking
]


@pytest.mark.parametrize(("completion", "filters", "flaw"), FLAWS)
def test_filters(completion: str, filters: dict, flaw: str | None) -> None:
    assert find_flaw(completion, TraceFilters(**filters)) == flaw


def test_given_traces_are_filtered_and_counted() -> None:
    facts, left = {}, []
    context = SimpleNamespace(
        stage_name="sft", facts=facts, record_left=lambda reason, count: left.append(count)
    )
    solutions = [trace(ENGLISH), trace(f"{ENGLISH}\n{CHINESE}"), trace("```\n1\n```"), ENGLISH]
    problems = [
        Problem(str(n), "math", [], answer="2", solution=solution)
        for n, solution in enumerate(solutions)
    ]
    kept = drop_flawed(problems, TraceFilters(**ALL, **FORMAT), context)
    assert kept == problems[:1]
    assert {k: n for k, n in facts.items() if n} == {
        "dropped/mixed_language": 1, "dropped/code_block": 1, "dropped/no_format": 1,
    }  # fmt: skip
    assert left == [1]
    with pytest.raises(UserError, match="no trace is left: 1 no format"):
        drop_flawed(problems[3:], TraceFilters(**FORMAT), context)


def make_settings(**changes: object) -> Traces:
    sampling = Sampling(max_completion_length=100)
    return Traces(num_generations=8, sampling=sampling, **changes)


def select(completions: list[str], **changes: object) -> tuple[list[str], dict[str, int]]:
    """Of samples that are all right; "!" is wrong, "?" unjudged, "..." truncated."""
    rewards = {"!": 0.0, "?": None}
    rollouts = [
        Rollout("p", n, [], [0] * len(text), [], text, "length" if text == "..." else "stop")
        for n, text in enumerate(completions)
    ]
    scores = [Score({"a": 1.0, "b": rewards.get(text, 1.0)}) for text in completions]
    counts: Counter[str] = Counter()
    kept = select_samples(rollouts, scores, make_settings(**changes), counts)
    return [rollout.completion for rollout in kept], {k: n for k, n in counts.items() if n}


# limits, accepted samples of 4, why the problem makes no traces
DIFFICULTIES = [
    ({}, 1, None),
    ({"min_pass_rate": 0.25, "max_pass_rate": 0.75}, 1, None),
    ({"min_pass_rate": 0.3}, 1, "too_hard"),
    ({"max_pass_rate": 0.75}, 3, None),
    ({"max_pass_rate": 0.75}, 4, "too_easy"),
]


@pytest.mark.parametrize(("limits", "num_right", "reason"), DIFFICULTIES)
def test_problems_are_chosen_by_pass_rate(limits: dict, num_right: int, reason: str | None) -> None:
    completions = ["two", "one and one", "a pair", "1 + 1"][:num_right] + ["!"] * (4 - num_right)
    kept, counts = select(completions, **limits)
    assert bool(kept) == (reason is None)
    assert counts.get(reason, 0) == (num_right if reason else 0)


def test_every_sample_is_counted_once() -> None:
    completions = ["1 + 1 = 2", "!", "?", "...", "two", "1 + 1 = 2", "```", "one and one"]
    kept, counts = select(completions, filters={"drop_code_blocks": True})
    assert kept == ["two"]
    assert counts.pop("problems_with_traces") == 1
    reasons = {"wrong": 1, "unjudged": 1, "truncated": 1, "duplicate": 1, "code_block": 1}
    assert counts == {**reasons, "over_cap": 2}
    assert sum(counts.values()) + len(kept) == len(completions)


def test_problem_without_a_right_sample_has_no_trace() -> None:
    assert select(["!", "..."]) == ([], {"wrong": 1, "truncated": 1})


ALIKE = ["a b c d e", "a b c d e f", "a b c d e f g", "v w x y z with more words at its end"]


def test_shortest_and_most_diverse() -> None:
    shuffled = [ALIKE[i] for i in (2, 0, 3, 1)]
    assert select(shuffled, max_per_problem=2)[0] == ALIKE[:2]
    assert select(shuffled, max_per_problem=2, choose="diverse")[0] == [ALIKE[0], ALIKE[3]]
    every = select(shuffled, max_per_problem=9, choose="diverse")[0]
    assert sorted(every) == sorted(ALIKE)


def test_diverse_takes_the_one_least_like_all_chosen() -> None:
    texts = ["a b c d", "a b c e", "x y z w", "x y z a b c d"]
    rollouts = [Rollout("p", n, [], [], [], text, "stop") for n, text in enumerate(texts)]
    chosen = [rollout.completion for rollout in choose_diverse(rollouts, 3)]
    # The last one shares words with both of the first two that were chosen.
    assert chosen == ["a b c d", "x y z w", "a b c e"]


def make_problem(name: str, system: str = "Think.") -> Problem:
    messages = [("system", system), ("user", f"{name}?")]
    prompt = [{"role": role, "content": content} for role, content in messages]
    return Problem(name, "math", prompt, answer="1", solution=f"<think>\n{name}\n</think>\n1")


def test_examples_come_before_the_problem_and_not_into_the_trace() -> None:
    context = SimpleNamespace(
        load_problems=lambda source: [make_problem(n) for n in ("a", "b", "c")]
    )
    few_shot = FewShot(data=ProblemSet(recipe="arithmetic"), num_examples=2)
    settings = make_settings(few_shot=few_shot)
    problems = [make_problem("a", "Own."), make_problem("z", "Own.")]
    asked = prepend_few_shot(problems, settings, context)
    assert [[m["content"] for m in problem.prompt] for problem in asked] == [
        # No problem is shown its own solution.
        ["Own.", "b?", "<think>\nb\n</think>\n1", "c?", "<think>\nc\n</think>\n1", "a?"],
        ["Own.", "a?", "<think>\na\n</think>\n1", "b?", "<think>\nb\n</think>\n1", "z?"],
    ]
    assert problems == [make_problem("a", "Own."), make_problem("z", "Own.")]
    assert prepend_few_shot(problems, make_settings(), context) is problems
    few_shot = FewShot(data=ProblemSet(recipe="arithmetic"), num_examples=4)
    with pytest.raises(UserError, match="no 4 solutions"):
        prepend_few_shot(problems, make_settings(few_shot=few_shot), context)


MESSAGES = [
    {
        "role": "assistant",
        "content": "<tool_call>1+1</tool_call>",
        "tool_calls": [{"function": {"name": "calculator", "arguments": "{}"}}],
    },
    {"role": "tool", "name": "calculator", "content": "2"},
    {"role": "assistant", "content": "odd <tool_call>", "tool_call_error": "no call"},
    {"role": "tool", "content": "error: no call"},
    {"role": "assistant", "content": "\\boxed{2}"},
    {"role": "user", "content": "Right."},
]


def make_episode(**changes: object) -> Rollout:
    episode = Episode([], MESSAGES, **changes)
    return Rollout("p", 3, [], [], [], "\\boxed{2}", "stop", episode=episode)


# rewards of a function and of the environment, why the episode is not accepted
EPISODES = [
    (1.0, None, None),  # an environment of tools gives none
    (1.0, 1.0, None),
    (1.0, 0.5, "wrong"),
    (None, 1.0, "unjudged"),
    (None, None, "unjudged"),
]


@pytest.mark.parametrize(("function", "own", "reason"), EPISODES)
def test_which_episodes_are_accepted(
    function: float | None, own: float | None, reason: str | None
) -> None:
    score = Score({"f": function, "environment": own})
    assert find_rejection(make_episode(), score) == reason
    assert find_rejection(make_episode(error="OSError: gone"), score) in ("unjudged", "wrong")
    alone = {1.0: None, 0.5: "wrong", None: "unjudged"}[own]
    assert find_rejection(make_episode(), Score({"environment": own})) == alone


def test_an_episode_becomes_the_messages_of_a_trace() -> None:
    """As the policy wrote them, up to its last; calls are in its words."""
    problem = Problem("p", "math", [{"role": "user", "content": "1+1?"}], "2", extra={"level": 3})
    settings = Environment(name="tools", options={"tools": ["calculator", "python"]})
    trace = make_trace(problem, make_episode(), settings)
    assert (trace.id, trace.prompt, trace.answer) == ("p#3", problem.prompt, "2")
    said = [(message["role"], message["content"]) for message in MESSAGES[:-1]]
    assert [tuple(message.values()) for message in trace.solution if len(message) == 2] == [
        said[0], said[2], said[3], said[4],
    ]  # fmt: skip
    assert trace.solution[1] == MESSAGES[1]
    assert trace.extra["level"] == 3
    assert [tool["function"]["name"] for tool in trace.tools] == ["calculator", "python"]
    asked = [{"role": "user", "content": "What is one and one?"}]
    assert make_trace(problem, make_episode(prompt=asked), settings).prompt == asked
