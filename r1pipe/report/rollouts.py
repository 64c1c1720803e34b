"""Kept rollouts for people to read: `r1pipe rollouts RUN`."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1pipe.evals.tables import draw_table
from r1pipe.rollout.store import list_steps, read_rollouts


def describe_steps(stage_dir: Path) -> str:
    """A table of the kept steps."""
    rows = [["step", "rollouts", "reward", "best", "unjudged", "tokens", "truncated"]]
    for step in list_steps(stage_dir):
        columns = ("reward", "num_tokens", "finish_reason")
        rollouts = list(read_rollouts(stage_dir, [step], columns))
        rewards = [row["reward"] for row in rollouts if row["reward"] is not None]
        cut = sum(row["finish_reason"] == "length" for row in rollouts)
        rows.append(
            [
                str(step),
                str(len(rollouts)),
                f"{sum(rewards) / len(rewards):.3f}" if rewards else "-",
                f"{max(rewards):.3f}" if rewards else "-",
                str(len(rollouts) - len(rewards)),
                f"{sum(row['num_tokens'] for row in rollouts) / len(rollouts):.1f}",
                f"{cut / len(rollouts):.1%}",
            ]
        )
    return draw_table(rows)


def describe_step(
    stage_dir: Path, step: int, best: int | None = None, worst: int | None = None
) -> Iterator[str]:
    """A step's rollouts: the `best` and `worst` ones by reward, unjudged ones last; or all in the
    order of sampling."""
    rollouts = list(read_rollouts(stage_dir, [step]))
    if best is None and worst is None:
        yield from map(format_rollout, rollouts)
        return
    judged = sorted(
        (row for row in rollouts if row["reward"] is not None), key=lambda row: -row["reward"]
    )
    ranked = judged + [row for row in rollouts if row["reward"] is None]
    shown = [*range(best or 0), *range(len(ranked) - (worst or 0), len(ranked))]
    for place in dict.fromkeys(place for place in shown if 0 <= place < len(ranked)):
        yield format_rollout(ranked[place])


def format_rollout(row: dict[str, Any]) -> str:
    rewards = {name.rpartition(".")[2]: value for name, value in row["rewards"].items()}
    parts = ", ".join(f"{name} {format_reward(value)}" for name, value in rewards.items())
    unused = "" if row["used"] else ", not used"
    head = (
        f"step {row['step']}, {row['problem_id']}, sample {row['sample']}: reward "
        f"{format_reward(row['reward'])} ({parts}), advantage {row['advantage']:+.3f}{unused}, "
        f"{row['num_tokens']} tokens, {row['finish_reason']}"
    )
    blocks = {"prompt": row["prompt"], "answer": row["answer"]}
    if episode := row.get("episode"):
        head += f", {len(episode['messages'])} messages, ended: {episode['ended']}"
        said = [f"{m['role']}: {m['content']}" for m in episode["messages"]]
        blocks["episode"] = "\n".join(said)
    else:
        blocks["completion"] = row["completion"]
    blocks |= {name: str(value) for name, value in (row.get("extra") or {}).items()}
    lines = [f"  {name}:\n{textwrap.indent(text, '    ')}" for name, text in blocks.items() if text]
    return "\n".join([head, *lines, ""])


def format_reward(value: float | None) -> str:
    return "unjudged" if value is None else f"{value:g}"
