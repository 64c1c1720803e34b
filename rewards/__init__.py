"""Rewards by rules, pure functions from completions to numbers, and by a model (`judge`).

Every reward follows one contract, TRL's: it is called by keyword as
``fn(prompts=..., completions=..., completion_ids=..., **dataset_columns)``, takes completions as
strings or as message lists, ignores the arguments it does not know and returns one value per
completion. ``None`` means "this cannot be judged" (no usable gold, grader timed out) and is never
the same as 0.0, "judged, and not right". The functions are module-level and picklable, so
``trl grpo --reward_funcs rewards.math_correct`` works as it stands.

Importing this package is cheap: sympy and math-verify live in the worker processes only.
"""

from rewards.code.extract import extract_code
from rewards.code.judge import CodeVerdict, code_passes, count_code_verdicts, judge_code
from rewards.judges.judge import judge
from rewards.judges.settings import JudgeBudgetError, JudgeError
from rewards.math.verify import (
    Verdict,
    count_verdicts,
    grade_answer,
    judge_math,
    judge_pairs,
    math_correct,
)
from rewards.sandbox.choice import configure_sandbox, sandbox_in_use
from rewards.sandbox.client import SandboxError
from rewards.shaping import cosine_length, format, language_consistency, repetition, soft_overlong
from rewards.tasks.countdown import countdown_correct
from rewards.tasks.reasoning_gym import reasoning_gym_score
from rewards.text.answers import extract_answer
from rewards.workers.pool import configure_workers, shut_down_workers

__all__ = [
    "CodeVerdict", "JudgeBudgetError", "JudgeError", "SandboxError", "Verdict", "code_passes",
    "configure_sandbox", "configure_workers", "cosine_length", "count_code_verdicts",
    "count_verdicts", "countdown_correct", "extract_answer", "extract_code", "format",
    "grade_answer", "judge", "judge_code", "judge_math", "judge_pairs", "language_consistency",
    "math_correct", "reasoning_gym_score", "repetition", "sandbox_in_use", "shut_down_workers",
    "soft_overlong",
]  # fmt: skip
