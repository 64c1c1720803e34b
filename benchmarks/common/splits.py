"""Which bound of staleness and which split of GPUs between sampling and training pay off, by
simulation. Imports no torch."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from common.simulation import Lengths, Outcome, Plan, Rates, draw_again, draw_lognormal, simulate

from r1pipe.rollout.store import find_rollouts, read_rollouts

GPUS = (8, 64, 512)
BOUNDS = (0, 1, 2, 4, 8)
PROMPTS, SAMPLES = 512, 16
MEAN, SIGMA, LONGEST = 4_000, 1.0, 32_768

BANDWIDTH = 0.7 * 3.35e12
WEIGHTS = 16.1e9
KEY_VALUES = 32 * 8 * 128 * 2 * 2
FREE_KEY_VALUES = 56e9
SEQUENCE_S = 75e-6
READ_S = 2 * 8e9 / (0.5 * 989e12)
TOKEN_S = 0.2e-3
OPTIMIZER_STEP_S = 2.2
COLOCATED_S = 11.0
SYNC_S = 4.4
ASSUMPTIONS = f"""\
Llama-3.1-8B in bf16 on H100s, an engine on each GPU that samples; {PROMPTS} x {SAMPLES} samples.
- An engine's step: {WEIGHTS / 1e9:g} GB of weights, and each sequence's keys and values
  ({KEY_VALUES >> 10} KiB a token), at 70% of 3.35 TB/s; {1e6 * SEQUENCE_S:g} us more for each of
  them. At most 256, as many as {FREE_KEY_VALUES / 1e9:g} GB hold.
- Training: {1e3 * TOKEN_S:g} ms a token and GPU, and {OPTIMIZER_STEP_S:g} s an optimizer step, of
  which there is one: the part of verl's update that more GPUs do not shorten (35 s of 16 steps:
  its docs/advance/fully_async.md has 314, 157 and 113 s on 16, 32 and 64). The {1e3 * TOKEN_S:g} ms
  and the {1e6 * SEQUENCE_S:g} us are chosen so that both published steps of NeMo-RL 0.5 on 16 GPUs
  come out (its docs/about/performance-summary.md, and recipes).
- Colocated: {COLOCATED_S:g} s a step to change sides, as verl's have beside sampling and training.
- A sync: {SYNC_S:g} s (verl, Qwen3-30B-A3B, 16 + 16 GPUs, checkpoint-engine; a 7B model 0.02 s,
  Qwen3-235B on 64 + 64 23.7 s; without checkpoint-engine 0.12, 15.8 and 58.6 s). MoonshotAI's own
  checkpoint-engine: GLM-4.5-Air on 8 GPUs 3.5 s, DeepSeek-V3.1 on 256 11.3 s, Kimi-K2 16.0 s.
- Reading again what runs, after a sync in flight: {1e6 * READ_S:.0f} us a token, half of the peak.
- Not counted: scoring, prompts (short, and cached within a group), failures, and what staleness
  costs in learning."""
PUBLISHED = (
    # What, GPUs that sample and train, mean length, bound, seconds of a sync and of a step,
    # optimizer steps.
    ("on-policy, 16 GPUs in turns", 16, 16, 1_019, 0, COLOCATED_S, 92.8, 4),
    ("1 step off, 8 + 8 GPUs, in flight", 8, 8, 1_123, 1, 0.12, 64.8, 1),
)


class Split(NamedTuple):
    sampling: int
    """GPUs; the trainer's are the same ones if the plan is `in turns`."""
    training: int
    plan: Plan
    outcome: Outcome

    def describe(self, name: str, base: float) -> str:
        """A row of the table; `base`: seconds of a step in turns."""
        plan, out = self.plan, self.outcome
        weights = "in flight" if plan.in_flight else "drained" if plan.staleness else "-"
        return (
            f"| {name} | {plan.staleness} | {weights} | {self.sampling} + {self.training} "
            f"| {out.step_s:.0f} | {base / out.step_s:.2f} x | {out.trainer_idle:.0%} "
            f"| {out.engine_idle:.0%} | {out.staleness:.1f}, {out.max_staleness} |"
        )


class Workload(NamedTuple):
    draw: Callable[[], Iterator[Lengths]]
    prompts: int = PROMPTS
    optimizer_steps: int = 1

    def make_rates(self, training: int, sync_s: float) -> Rates:
        tokens = [length for group in islice(self.draw(), 500) for length in group]
        context = sum(n * n for n in tokens) / (2 * sum(tokens))  # of a sequence while it runs
        return Rates(
            step_s=WEIGHTS / BANDWIDTH,
            sequence_s=SEQUENCE_S + KEY_VALUES * context / BANDWIDTH,
            read_s=READ_S,
            token_s=TOKEN_S / training,
            update_s=OPTIMIZER_STEP_S * self.optimizer_steps,
            sync_s=sync_s,
            max_num_seqs=min(256, int(FREE_KEY_VALUES / (KEY_VALUES * context))),
        )

    def try_split(
        self, sampling: int, training: int, sync_s: float, bound: int = 0, in_flight: bool = False
    ) -> Split:
        plan = Plan(sampling, self.prompts, bound, in_flight)
        rates = self.make_rates(training, sync_s)
        outcome = simulate(rates, plan, self.draw(), num_steps=6)
        return Split(sampling, training, plan, outcome)

    def find_split(self, count: int, sync_s: float, bound: int, in_flight: bool) -> Split:
        """The fastest one in eighths. Those are left out whose sampling or training alone takes as
        long, with all engines full."""
        mean = fmean(length for group in islice(self.draw(), 500) for length in group)
        tokens = mean * SAMPLES * self.prompts
        rates = self.make_rates(1, sync_s)
        token_s = rates.step_s / rates.max_num_seqs + rates.sequence_s
        least = {
            training: max(tokens * token_s / (count - training), tokens * TOKEN_S / training)
            for training in (count * eighths // 8 for eighths in range(1, 8))
        }
        best: Split | None = None
        for training in sorted(least, key=least.get):
            if best is None or least[training] < best.outcome.step_s:
                found = self.try_split(count - training, training, sync_s, bound, in_flight)
                best = min(best or found, found, key=lambda split: split.outcome.step_s)
        return best


def print_splits(gpus: Iterable[int], run: Path | None, sync_s: float = SYNC_S) -> None:
    draw, what = choose_lengths(run)
    print(f"{ASSUMPTIONS}\n- Lengths: {what}.\n")
    print_published()
    print(
        "\n| GPUs | bound | weights | sampling + training | step, s | speed | trainer idle "
        "| engines idle | staleness, mean and max |\n|" + "---|" * 9
    )
    work = Workload(draw)
    for count in gpus:
        turns = work.try_split(count, count, COLOCATED_S)
        base, found = turns.outcome.step_s, [turns]
        print(turns.describe(f"{count} in turns", base), flush=True)
        for bound in BOUNDS:
            for in_flight in (False, True) if bound == 1 else (bound > 1,):
                found.append(work.find_split(count, sync_s, bound, in_flight))
                print(found[-1].describe(str(count), base), flush=True)
        fastest = min(split.outcome.step_s for split in found)
        # The smallest bound that is about as fast as any.
        best = next(split for split in found if split.outcome.step_s < 1.05 * fastest)
        print(best.describe(f"**{count}: pays off**", base), flush=True)


def print_published() -> None:
    for what, sampling, training, mean, bound, sync_s, published, num_steps in PUBLISHED:
        draw = partial(draw_lognormal, mean, SIGMA, 4_096, SAMPLES)
        work = Workload(draw, 2_048 // SAMPLES, num_steps)
        step_s = work.try_split(sampling, training, sync_s, bound, bool(bound)).outcome.step_s
        print(f"NeMo-RL, {what}: {step_s:.1f} s, published {published}")


def choose_lengths(run: Path | None) -> tuple[Callable[[], Iterator[Lengths]], str]:
    if run is None:
        what = (
            f"lognormal, mean {MEAN:,}, sigma {SIGMA:g}, cut at {LONGEST:,}: the 99th percentile "
            "is ten times the median. --run takes the shape of real rollouts"
        )
        return partial(draw_lognormal, MEAN, SIGMA, LONGEST, SAMPLES), what
    groups = read_lengths(run)
    mean = sum(map(sum, groups)) / sum(map(len, groups))
    what = f"{len(groups):,} groups of {run}, times {MEAN / mean:.0f}, so that the mean is {MEAN:,}"
    return partial(draw_again, groups, MEAN / mean), what


def read_lengths(run: Path) -> list[Lengths]:
    """Of each group that the run has kept."""
    by_group: dict[tuple[int, int], Lengths] = {}
    columns = ("step", "group", "num_tokens")
    for row in read_rollouts(find_rollouts(run), columns=columns):
        by_group.setdefault((row["step"], row["group"]), []).append(row["num_tokens"])
    return list(by_group.values())
