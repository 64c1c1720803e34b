"""The circuit breaker's checks: pure functions of what a step shows, and the table of them.

A check is one function and one line in CHECKS; its limit and its action can then be set under
`breaker:` in a stage that trains on its own samples. The function gets the step's facts so far and
those of the `breaker.window` steps before it, and returns a value to compare with the limit, or
None where there is nothing to judge. Imports no torch.

Facts are numbers by name: the step's metrics, and what `breaker.describe_batch` adds to them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

Facts = Mapping[str, float]
Measure = Callable[[Facts, Sequence[Facts]], float | None]

Action = Literal["ignore", "warn", "skip", "stop", "rollback"]
Moment = Literal["rollouts", "update", "step"]
"""When a check is made: on the rollouts, before anything is trained on them; before each optimizer
step, on its gradient; after the step, when there is nothing left to skip."""


@dataclass(frozen=True)
class Check:
    measure: Measure
    at: Moment
    limit: float
    """Default limit."""
    action: Action
    says: str
    """The message, with {value}."""
    hint: str
    floor: bool = False
    """The limit is the least that is allowed, not the most."""

    def trips(self, value: float, limit: float) -> bool:
        """NaN trips whatever the limit."""
        return not (value >= limit if self.floor else value <= limit)


def read(name: str) -> Measure:
    """A check of one fact."""
    return lambda facts, past: facts.get(name)


# --- Rewards ------------------------------------------------------------------------------------

SIGNIFICANT = 4.0
"""Standard errors beyond which a move of a mean reward is not chance: once in 30,000 steps."""


@dataclass(frozen=True)
class Move:
    """Change of a mean reward against the median of the previous steps."""

    size: float
    error: float
    """Standard error of `size`, the prompts being what varies."""
    above: float
    """From the lowest value that any rollout was given up to the median: what can be lost."""
    below: float
    """From the median up to the highest value: what can be gained."""

    @property
    def up(self) -> bool:
        return self.size > 2 * self.error

    @property
    def could_rise(self) -> bool:
        return self.below > 2 * self.error


def measure_move(name: str, facts: Facts, past: Sequence[Facts]) -> Move | None:
    """`name`: `reward` or `rewards/FUNCTION`. None without previous steps or judged rollouts."""
    now = facts.get(f"{name}/mean", math.nan)
    before = [row for row in past if not math.isnan(row.get(f"{name}/mean", math.nan))]
    if math.isnan(now) or not before:
        return None
    base = median(row[f"{name}/mean"] for row in before)
    base_error = median(row[f"{name}/stderr"] for row in before)
    # At 0 or 1 a batch's own error vanishes: it is no surer for that.
    error = math.hypot(base_error, max(base_error, facts[f"{name}/stderr"]))
    rows = (*before, facts)
    return Move(
        size=now - base,
        error=error,
        above=base - min(row[f"{name}/low"] for row in rows),
        below=max(row[f"{name}/high"] for row in rows) - base,
    )


def measure_reward_fall(facts: Facts, past: Sequence[Facts]) -> float | None:
    """The share of the mean reward, counted from the lowest reward that any rollout was given, that
    is gone; 0 if chance explains it."""
    move = measure_move("reward", facts, past)
    if move is None:
        return None
    is_chance = -move.size <= SIGNIFICANT * move.error
    return 0.0 if is_chance or move.above <= 0 else -move.size / move.above


def measure_lone_rise(facts: Facts, past: Sequence[Facts]) -> float | None:
    """The largest rise of a reward function, as a share of its range, if no other function rose
    with it although one could have; else 0. None if there is one function only."""
    names = [name.removesuffix("/mean") for name in facts if name.startswith("rewards/")]
    moves = [m for name in dict.fromkeys(names) if (m := measure_move(name, facts, past))]
    if len(moves) < 2:
        return None
    highest = max(moves, key=lambda move: move.size)
    others = [move for move in moves if move is not highest]
    is_chance = highest.size <= SIGNIFICANT * highest.error
    if is_chance or any(m.up for m in others) or not any(m.could_rise for m in others):
        return 0.0
    return highest.size / (highest.above + highest.below)


# --- The update ---------------------------------------------------------------------------------

MUST_BE_FINITE = ("loss", "grad_norm", "entropy", "kl", "update_kl", "mtp/loss")
DETERMINISTIC = 0.02
"""Nats per token: below it a policy hardly varies, and a further fall says nothing."""


def count_nonfinite(facts: Facts, past: Sequence[Facts]) -> float:
    return sum(not math.isfinite(facts.get(name, 0.0)) for name in MUST_BE_FINITE)


def measure_entropy_share(facts: Facts, past: Sequence[Facts]) -> float | None:
    """Entropy over its median in the steps before."""
    before = [row["entropy"] for row in past if "entropy" in row]
    if "entropy" not in facts or not before or median(before) < DETERMINISTIC:
        return None
    return facts["entropy"] / median(before)


# --- The table ----------------------------------------------------------------------------------

CHECKS: dict[str, Check] = {
    # Anything but a number or None is a mistake in a reward function.
    "nonfinite_rewards": Check(
        read("nonfinite_rewards"), "rollouts", 0.0, "stop",
        "{value:.0%} of the rollouts have a reward that is NaN or infinite",
        "a reward function must return a number, or None for what it cannot judge",
    ),
    "unjudged": Check(
        read("reward_unjudged"), "rollouts", 0.5, "stop",
        "the rewards could not judge {value:.0%} of the rollouts",
        "look at the problems' answers",
    ),
    "reward_collapse": Check(
        measure_reward_fall, "rollouts", 0.5, "rollback",
        "the mean reward lost {value:.0%} of what it was in the steps before",
        "a lower learning_rate, or a reward function that fails",
    ),
    # An optimised proxy drifts from what was meant: Gao et al. 2023, arXiv:2210.10760.
    "reward_hacking": Check(
        measure_lone_rise, "rollouts", 0.3, "warn",
        "one reward function rose by {value:.0%} of its range and no other with it",
        "read what these rollouts do to please it",
    ),
    # Cut completions are noise to the reward: DAPO, arXiv:2503.14476, section 3.4.
    "truncated": Check(
        read("completions/truncated"), "rollouts", 0.5, "warn",
        "{value:.0%} of the completions were cut at max_completion_length",
        "raise max_completion_length, or mask_truncated_completions",
    ),
    # Fu et al. 2025 (AReaL), arXiv:2505.24298, section 7.4: up to 8 versions cost no accuracy.
    "staleness": Check(
        read("staleness/mean"), "rollouts", 8.0, "warn",
        "these tokens were sampled {value:.1f} versions of the policy ago, on average",
        "a smaller max_staleness, or more devices for the trainer",
    ),
    "identical_groups": Check(
        read("identical_groups"), "rollouts", 0.9, "warn",
        "in {value:.0%} of the groups all completions are the same text",
        "nothing is explored: a higher temperature, or harder problems",
    ),
    "same_completion": Check(
        read("same_completion"), "rollouts", 0.9, "rollback",
        "{value:.0%} of the completions are one and the same text, whatever the prompt",
        "the policy has collapsed: a lower learning_rate, or a reward that this text pleases",
    ),
    # What loss scaling does: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.
    "nonfinite": Check(
        count_nonfinite, "update", 0.0, "skip",
        "loss, gradient or log-probabilities are NaN or infinite",
        "if it comes back: a lower learning_rate, or float32",
    ),
    # The limit for float32; a bf16 sampler differs by about 1e-2 (Yao et al. 2025, "Your efficient
    # RL framework secretly brings you off-policy RL training").
    "logprob_diff": Check(
        read("sampler/logprob_diff_mean"), "update", 1e-4, "stop",
        "sampler and trainer disagree: mean |log-prob difference| {value:.2e}",
        "in float32 an error of the weight sync or of the model's code in vLLM; in bf16 raise the "
        "limit",
    ),
    "kl": Check(
        read("kl"), "update", 1.0, "warn",
        "the KL to the reference policy is {value:.2f} nats per token",
        "a higher beta, or a lower learning_rate",
    ),
    # PPO's early stopping, which is at 0.015 in Spinning Up (target_kl 0.01).
    "update_kl": Check(
        read("update_kl"), "update", 0.1, "warn",
        "these optimizer steps have moved the policy by a KL of {value:.2f} nats per token",
        "a lower learning_rate, or fewer steps_per_generation",
    ),
    # DAPO, section 3.1; Cui et al. 2025, arXiv:2505.22617.
    "entropy": Check(
        read("entropy"), "update", 1e-3, "warn",
        "the policy's entropy is {value:.1e} nats per token: it hardly varies",
        "epsilon_high (clip-higher), a higher temperature, or harder problems",
        floor=True,
    ),
    "entropy_collapse": Check(
        measure_entropy_share, "update", 0.1, "rollback",
        "the policy's entropy fell to {value:.1%} of what it was in the steps before",
        "a lower learning_rate, or epsilon_high (clip-higher)",
        floor=True,
    ),
    # A run without a mistake otherwise, whose checkpoint is the one that it has started from.
    "steps_in_vain": Check(
        read("steps_in_vain"), "step", 0.0, "warn",
        "{value:.0f} step(s) in a row taught nothing: no prompt's samples differ in reward, or no "
        "token was trained on",
        "other problems, neither all solved nor all failed, or a reward that tells samples apart",
    ),
    # Routing collapse: Wang et al. 2024, arXiv:2408.15664, section 1.
    "dead_experts": Check(
        read("experts/dead"), "step", 0.5, "warn",
        "{value:.0%} of the experts get less than a hundredth of their share of the tokens",
        "bias_update_rate or seq_aux_loss_coef",
    ),
}  # fmt: skip
