"""A stage's judges (rewards.judge): their file in the run's folder, agreement, cost."""

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from r1pipe.config.base import Reward, Stage
from r1pipe.rollout.scoring import Scorer, start_event_loop
from r1pipe.utils.errors import UserError
from r1pipe.utils.phases import phase
from r1pipe.utils.progress import log_line
from rewards.judges.judge import find_judge
from rewards.judges.settings import JudgeError

CACHE = "judge.sqlite"


def bind_judges(stage: Stage, run_dir: Path) -> Stage:
    """The stage with its judges' requests booked under RUN/STAGE in the run's folder, where the
    recipe leaves that open."""
    defaults = {"cache": str(run_dir / CACHE), "account": f"{run_dir.name}/{stage.name}"}

    def bind(rewards: list[Reward]) -> list[Reward]:
        return [
            reward.model_copy(update={"options": {**defaults, **reward.options}})
            if reward.is_judge
            else reward
            for reward in rewards
        ]

    if not any(reward.is_judge for reward in stage.rewards_used()):
        return stage
    if hasattr(stage, "traces"):
        traces = stage.traces.model_copy(update={"rewards": bind(stage.traces.rewards)})
        return stage.model_copy(update={"traces": traces})
    return stage.model_copy(update={"rewards": bind(stage.rewards_used())})


@phase("asking the judge")
def begin_judges(stage: Stage) -> None:
    """Print how the judges agree with their labelled rows; asked once, like everything else.

    Raises UserError for less than `min_agreement`, which NaN is, too.
    """
    rewards = [reward for reward in stage.rewards_used() if reward.is_judge]
    for call in Scorer(rewards).calls:
        judge = find_judge(call.reward.options)
        if not judge.labelled:
            continue
        asking = asyncio.run_coroutine_threadsafe(judge.measure_agreement(), start_event_loop())
        try:
            agreement = asking.result()
        except JudgeError as error:
            raise call.explain(error) from error
        log_line(f"{stage.name}: {call.name}: {agreement}")
        least = judge.settings.min_agreement
        if least is not None and not agreement.correlation >= least:
            raise UserError(
                f'{stage.name}: reward "{call.name}": Spearman {agreement.correlation:.2f} with '
                f"{agreement.num_judged} labelled rows is less than min_agreement {least:g}: "
                "another model or a clearer rubric"
            )


def count_requests(rewards: Iterable[Reward]) -> dict[str, Any] | None:
    """What the judges of a bound stage have asked so far, in all attempts; None without any."""
    options = [reward.options for reward in rewards if reward.is_judge]
    booked = {(o["cache"], o["account"]): find_judge(o) for o in options}
    spent = [judge.count_spent() for judge in booked.values()]
    if not spent:
        return None
    names = spent[0].__annotations__
    return {name: sum(getattr(part, name) for part in spent) for name in names}
