"""From judged samples to figures: tables and comparisons against numbers counted by hand."""

import pytest

from r1pipe.config.evals import EvalSampling
from r1pipe.evals.metrics import (
    ProblemResult,
    compare_paired,
    default_num_samples,
    find_right,
    list_ks,
    measure,
    split_by_length,
    sum_up_problems,
)
from r1pipe.evals.tables import format_report, format_table, list_rewards
from r1pipe.types import Episode, Problem, Rollout, Score

REWARD, FORMAT = "rewards.math_correct", "rewards.format"


def make_problem(name: str, kind: str = "math", category: str = "") -> Problem:
    prompt = [{"role": "user", "content": f"{name.rstrip('+')}: 1 + 1?"}]
    return Problem(name, kind, prompt, answer="2", source="set", category=category)


def make_samples(
    problem: Problem, answers: list[str], reward: list[float | None], length: int = 3
) -> tuple[list[Rollout], list[Score]]:
    rollouts = [
        Rollout(problem.id, n, [], [0] * length, [], f"\\boxed{{{answer}}}", "stop")
        for n, answer in enumerate(answers)
    ]
    return rollouts, [Score({REWARD: value, FORMAT: 1.0}) for value in reward]


def sum_up(groups: list[tuple[Problem, list[str], list[float | None]]], k: int) -> dict:
    rollouts, scores = [], []
    for problem, answers, reward in groups:
        new_rollouts, new_scores = make_samples(problem, answers, reward)
        rollouts, scores = rollouts + new_rollouts, scores + new_scores
    problems = [problem for problem, _, _ in groups]
    results = sum_up_problems(problems, rollouts, find_right(scores, REWARD), k)
    return measure(results, rollouts, scores, EvalSampling(), k, REWARD, FORMAT)


def test_figures_of_two_problems() -> None:
    easy, hard = make_problem("a", category="easy"), make_problem("b", category="hard")
    entry = sum_up(
        [
            (easy, ["2", "2", "3", "2"], [1.0, 1.0, 0.0, 1.0]),
            (hard, ["5", "2", "5", "x"], [0.0, 1.0, 0.0, None]),
        ],
        k=4,
    )
    assert entry["pass_at_1"] == 0.5
    # Of 6 pairs of samples, 6 and 3 have a right one.
    assert entry["pass_at"] == {"1": 0.5, "2": 0.75, "4": 1.0}
    assert entry["pass_at_k"] == 1.0
    assert entry["maj_at_k"] == 0.5
    assert entry["unjudged"] == 0.125
    assert entry["temperature"] == 0.6
    assert entry["top_p"] == 0.95
    assert [(r["category"], r["num_problems"], r["pass_at_1"]) for r in entry["by_category"]] == [
        ("easy", 1, 0.75),
        ("hard", 1, 0.25),
    ]


def test_calls_of_tools_have_columns_where_there_are_some() -> None:
    problem = make_problem("a")
    entries = []
    for name, calls in (("sft", 0), ("grpo", 2)):
        rollouts, scores = make_samples(problem, ["2", "3"], [1.0, 0.0])
        for rollout, malformed in zip(rollouts, (0, calls), strict=True):
            rollout.episode = Episode([], [], "done", None, None, calls - malformed, malformed)
        results = sum_up_problems([problem], rollouts, [True, False], 1)
        entry = measure(results, rollouts, scores, EvalSampling(), 1, REWARD, FORMAT)
        entries.append({"stage": name, "dataset": "set", "wall_s": None, "overlap": 0.0, **entry})
    assert [entries[1][n] for n in ("tool_calls", "malformed_calls", "calling")] == [1.0, 1.0, 0.5]
    header, _, *rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in format_table(entries).splitlines()[:4]
    ]
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    assert [[c[n] for n in ("calls", "calling", "malformed")] for c in cells] == [
        ["0.00", "0.0%", "0.00"],
        ["1.00", "50.0%", "1.00"],
    ]
    assert "calling" not in format_table(entries[:1])


def test_rewards_that_judged_nothing_are_not_told_of() -> None:
    """Such as those of an environment that gives none."""
    rows = [
        {"rewards/rewards.format/mean": 0.5, "rewards/environment/mean": None},
        {"rewards/rewards.format/mean": None, "rewards/environment/mean": None},
    ]
    assert list_rewards(rows) == {"rewards/rewards.format/mean": "format"}


def test_programs_have_no_majority() -> None:
    entry = sum_up([(make_problem("a", kind="code"), ["2", "2"], [1.0, 1.0])], k=2)
    assert entry["maj_at_k"] is None
    assert entry["by_category"][0]["category"] == "set"


def test_ks() -> None:
    assert list_ks(8, 8) == [1, 2, 4, 8]
    assert list_ks(6, 6) == [1, 2, 4, 6]
    assert list_ks(6, 3) == [1, 2, 3, 4]
    assert list_ks(1, 1) == [1]


def test_lengths_fall_into_bins_that_double() -> None:
    rollouts = [
        Rollout("a", n, [], [0] * length, [], "", "length" if length == 128 else "stop")
        for n, length in enumerate([0, 31, 32, 63, 64, 127, 128])
    ]
    right = [True, False, True, True, False, False, True]
    rows = split_by_length(rollouts, right)
    assert [(r["tokens_from"], r["tokens_to"], r["samples"], r["right"]) for r in rows] == [
        (0, 32, 2, 0.5),
        (32, 64, 2, 1.0),
        (64, 128, 2, 0.0),
        (128, 256, 1, 1.0),
    ]
    assert rows[-1]["truncated"] == 1.0


@pytest.mark.parametrize(("size", "samples"), [(30, 64), (198, 64), (500, 16), (1319, 8)])
def test_samples_by_the_size_of_the_set(size: int, samples: int) -> None:
    assert default_num_samples(size) == samples


def make_results(*num_right: int) -> list[ProblemResult]:
    return [ProblemResult(str(i), "", 4, count, None, 1.0) for i, count in enumerate(num_right)]


def test_comparison_pairs_problems_by_their_ids() -> None:
    before, after = make_results(0, 2, 4, 1), make_results(1, 4, 4, 0)
    pair = compare_paired(before, [*after[::-1], ProblemResult("new", "", 4, 4, None, 1.0)])
    assert (pair["num_problems"], pair["better"], pair["worse"]) == (4, 2, 1)
    assert pair["difference"] == 0.125
    assert pair["ci_low"] < 0 < pair["ci_high"]


def test_report_has_every_table() -> None:
    entries = []
    for name, reward in (("sft", [1.0, 0.0]), ("grpo", [1.0, 1.0])):
        groups = [(make_problem("a", category="easy"), ["2", "3"], reward)]
        groups += [(make_problem("b", category="hard"), ["3", "3"], [0.0, 0.0])]
        entries.append({"stage": name, "dataset": "set", "overlap": 0.0, "wall_s": 1.0})
        entries[-1] |= {"compared_with": None, **sum_up(groups, 2)}
    entries[1]["compared_with"] = {"difference": 0.25, "ci_low": -0.1, "ci_high": 0.6}
    entries[0]["wall_s"] = None  # made by no stage of this run
    table = format_table(entries)
    assert [row.split("|")[-2].strip() for row in table.splitlines()[2:4]] == ["-", "1 s"]
    assert "| grpo       | 50.0% | " in table.replace("50.0%  ", "50.0% ")
    assert "+25.0 (-10.0 to +60.0)" in table
    assert "set: 2 problems x 2 samples, T = 0.6, top-p = 0.95, k = 2" in table
    report = format_report(entries)
    for line in ("| k | sft   | grpo  |", "| easy (1) | 50.0%", "| 0 - 31 | 25.0% of 4 |"):
        assert line in report, report


def test_a_problem_that_is_there_five_times_counts_once_for_the_intervals() -> None:
    names = ["a", "b", "c", "d"]
    entries = [
        sum_up(
            [
                (make_problem(name + "+" * copy), ["2"], [float(name < "c")])
                for name in names
                for copy in range(copies)
            ],
            k=1,
        )
        for copies in (1, 5)
    ]
    once, five = ((e["pass_at_1"], e["ci_low"], e["ci_high"]) for e in entries)
    assert once == five
    rows = [entry["by_category"][0] for entry in entries]
    assert (rows[0]["ci_low"], rows[0]["ci_high"]) == (rows[1]["ci_low"], rows[1]["ci_high"])
