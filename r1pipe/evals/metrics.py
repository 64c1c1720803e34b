"""Metrics of judged samples: pass@k, cons@k, splits by category and length, comparisons.

Pure functions over the samples of one checkpoint on one set of problems, grouped by problem.
"""

import hashlib
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from r1pipe.config.evals import EvalSampling
from r1pipe.evals.statistics import clustered_interval, estimate_pass_at_k, paired_interval, vote
from r1pipe.rollout.scoring import mean
from r1pipe.types import Episode, Problem, Rollout, Score
from rewards import extract_answer

R1_NUM_SAMPLES = ((200, 64), (500, 16), (math.inf, 8))
"""(problems of a set at most, samples of each). R1 draws 64 for AIME (30 problems) and GPQA diamond
(198), 16 for MATH-500, 8 for LiveCodeBench; for others it says "between 4 and 64, depending on the
test set size" (arXiv:2501.12948, section D.1)."""

SHORTEST_BIN = 32
"""Tokens in the first bin of completion lengths; each further bin is twice as long."""


def default_num_samples(num_problems: int) -> int:
    return next(count for most, count in R1_NUM_SAMPLES if num_problems <= most)


@dataclass(frozen=True, slots=True)
class ProblemResult:
    """One checkpoint on one problem: a row of problems.jsonl."""

    problem_id: str
    category: str
    num_samples: int
    num_right: int
    majority_right: bool | None
    """None where answers cannot be compared, as with programs."""
    mean_tokens: float
    question_sha256: str = ""
    """Hash of the prompt: a problem that is in a set twice counts once for the intervals. Empty in
    files of older versions."""

    @property
    def text(self) -> str:
        return self.question_sha256 or self.problem_id

    @property
    def pass_rate(self) -> float:
        return self.num_right / self.num_samples


def find_right(scores: list[Score], reward: str) -> list[bool]:
    """Which samples have the full reward. An unjudged one is not right."""
    return [(score.rewards[reward] or 0.0) >= 1.0 for score in scores]


def sum_up_problems(
    problems: list[Problem], rollouts: list[Rollout], right: list[bool], k: int
) -> list[ProblemResult]:
    """One result per problem; the majority is that of its first `k` samples."""
    num_samples = len(rollouts) // len(problems)
    results = []
    for place, problem in enumerate(problems):
        samples = slice(place * num_samples, (place + 1) * num_samples)
        results.append(
            ProblemResult(
                problem_id=problem.id,
                category=problem.category or problem.source,
                num_samples=num_samples,
                num_right=sum(right[samples]),
                majority_right=None
                if problem.kind == "code"
                else is_majority_right(rollouts[samples][:k], right[samples][:k]),
                mean_tokens=round(mean([r.num_tokens for r in rollouts[samples]]), 1),
                question_sha256=hash_question(problem),
            )
        )
    return results


def hash_question(problem: Problem) -> str:
    """Ignores whitespace; 16 digits are enough for millions of problems."""
    text = "\0".join(f"{m['role']} {' '.join(m['content'].split())}" for m in problem.prompt)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure_interval(results: list[ProblemResult]) -> tuple[float, float]:
    """95% interval of pass@1, rounded as in files."""
    interval = clustered_interval([r.pass_rate for r in results], [r.text for r in results])
    return round(interval[0], 4), round(interval[1], 4)


def is_majority_right(rollouts: list[Rollout], right: list[bool]) -> bool:
    answers = [extract_answer(rollout.completion) for rollout in rollouts]
    winner = vote(answers)
    return winner is not None and right[answers.index(winner)]


def measure(
    results: list[ProblemResult],
    rollouts: list[Rollout],
    scores: list[Score],
    sampling: EvalSampling,
    k: int,
    reward: str,
    format_reward: str,
) -> dict[str, Any]:
    """An entry of summary.json: one checkpoint on one set, with the protocol."""
    num_samples = results[0].num_samples
    ci_low, ci_high = measure_interval(results)
    majority = [r.majority_right for r in results if r.majority_right is not None]
    right = find_right(scores, reward)
    return {
        "num_problems": len(results),
        "num_samples": num_samples,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_completion_length": sampling.max_completion_length,
        "pass_at_1": round(mean([result.pass_rate for result in results]), 4),
        "ci_low": ci_low,
        "ci_high": ci_high,
        "k": k,
        "pass_at_k": average_pass_at_k(results, k),
        "pass_at": {str(n): average_pass_at_k(results, n) for n in list_ks(num_samples, k)},
        "maj_at_k": round(mean(majority), 4) if majority else None,
        "format_rate": round(mean(find_right(scores, format_reward)), 4),
        "mean_tokens": round(mean([r.num_tokens for r in rollouts]), 1),
        "truncated": round(mean([r.truncated for r in rollouts]), 4),
        "unjudged": round(mean([s.rewards[reward] is None for s in scores]), 4),
        **describe_calls([r.episode for r in rollouts if r.episode]),
        "by_category": split_by_category(results),
        "by_length": split_by_length(rollouts, right),
    }


def describe_calls(episodes: list[Episode]) -> dict[str, float]:
    """Mean tool calls and malformed ones, and the share of episodes that call; empty outside an
    environment."""
    if not episodes:
        return {}
    return {
        "tool_calls": round(mean([e.num_tool_calls for e in episodes]), 4),
        "malformed_calls": round(mean([e.num_malformed_calls for e in episodes]), 4),
        "calling": round(mean([e.num_tool_calls > 0 for e in episodes]), 4),
    }


def average_pass_at_k(results: list[ProblemResult], k: int) -> float:
    return round(mean([estimate_pass_at_k(r.num_samples, r.num_right, k) for r in results]), 4)


def list_ks(num_samples: int, k: int) -> list[int]:
    """1, 2, 4, ... up to the number of samples, and k."""
    return sorted({2**i for i in range(num_samples.bit_length())} | {k})


def split_by_category(results: list[ProblemResult]) -> list[dict[str, Any]]:
    """pass@1 of the problems of each category."""
    groups: dict[str, list[ProblemResult]] = defaultdict(list)
    for result in results:
        groups[result.category].append(result)
    rows = []
    for category, group in sorted(groups.items()):
        rates = [result.pass_rate for result in group]
        ci_low, ci_high = measure_interval(group)
        rows.append(
            {
                "category": category,
                "num_problems": len(group),
                "pass_at_1": round(mean(rates), 4),
                "ci_low": ci_low,
                "ci_high": ci_high,
                "mean_tokens": round(mean([result.mean_tokens for result in group]), 1),
            }
        )
    return rows


def split_by_length(rollouts: list[Rollout], right: list[bool]) -> list[dict[str, Any]]:
    """Share right among the samples of each length, in bins that double: `tokens_from` (included)
    to `tokens_to` (not).

    Long samples also belong to hard problems: this says where samples end, not what longer thinking
    would gain.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for place, rollout in enumerate(rollouts):
        groups[max(0, (rollout.num_tokens // SHORTEST_BIN).bit_length())].append(place)
    return [
        {
            "tokens_from": SHORTEST_BIN << (number - 1) if number else 0,
            "tokens_to": SHORTEST_BIN << number,
            "samples": len(places),
            "right": round(mean([right[i] for i in places]), 4),
            "truncated": round(mean([rollouts[i].truncated for i in places]), 4),
        }
        for number, places in sorted(groups.items())
    ]


def compare_paired(before: list[ProblemResult], after: list[ProblemResult]) -> dict[str, Any]:
    """pass@1 of `after` minus that of `before` over the problems that both have, with a paired
    interval.

    Raises ValueError if there are none.
    """
    rates = {result.problem_id: result.pass_rate for result in before}
    pairs = [(rates[r.problem_id], r.pass_rate) for r in after if r.problem_id in rates]
    old, new = zip(*pairs) if pairs else ((), ())
    texts = [result.text for result in after if result.problem_id in rates]
    difference, low, high = paired_interval(old, new, texts)
    return {
        "num_problems": len(pairs),
        "difference": round(difference, 4),
        "ci_low": round(low, 4),
        "ci_high": round(high, 4),
        "better": sum(b > a for a, b in pairs),
        "worse": sum(b < a for a, b in pairs),
    }
