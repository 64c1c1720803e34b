"""Runs that hang, and one that collapses, through the command line: how they end and go on."""

from pathlib import Path

import pytest
import yaml
from commands import read_lines, run
from test_processes import run_two

from r1pipe.rollout.store import read_rollouts
from r1pipe.runs.folder import find_steps
from r1pipe.utils.errors import HUNG

LIMIT_S = 90
"""More than vLLM takes to start, which is one piece of work."""


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Path) -> Path:
    """GRPO on a policy from random weights."""
    values = yaml.safe_load(tiny_recipe.read_text())
    stages = {stage.get("name", stage["kind"]): stage for stage in values["stages"]}
    stages["grpo"] |= {"from": "random", "max_completion_length": 8, "prompts_per_step": 4}
    values |= {"name": "hang", "stages": [stages["random"], stages["grpo"]]}
    path = tiny_recipe.with_name("hang.yaml")
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    result = run("init", path)
    assert result.returncode == 0, result.stderr
    return path


def set_reward(name: str) -> tuple[str, str]:
    return "--set", f"stages.grpo.rewards=[{{function: reward_of_tests.{name}}}]"


# (reward, processes, exit code, words of the line, function in the stacks of the last rank)
HANGS = {
    "reward": ("never_returns", 1, HUNG, "scoring", "never_returns"),
    "interpreter": ("backtracks", 1, -14, "interpreter was held", "backtracks"),
    "engine": ("stops_the_engine", 1, HUNG, "sampling", "never_answers"),
    # Either rank may be the first to notice.
    "rank": ("never_returns_on_rank_1", 2, HUNG, "no progress", "never_returns"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", HANGS)
def test_a_hang_ends_resumable(case: str, recipe: Path) -> None:
    reward, num_processes, code, words, function = HANGS[case]
    name = ("--set", f"name=hang-{case}")
    assert run("init", recipe, *name).returncode == 0
    start = run if num_processes == 1 else run_two
    limit = ("--set", f"phase_timeout_s={LIMIT_S}")
    result = start("grpo", recipe, *name, *set_reward(reward), *limit)
    assert result.returncode == code, result.stderr[-3000:]
    lines = [line for line in result.stderr.splitlines() if line.startswith("r1pipe: ")]
    assert len(lines) == 1, result.stderr
    assert words in lines[0]
    assert "the same command resumes" in lines[0]
    stacks = recipe.parent / "runs" / f"hang-{case}" / ".stacks"
    written = [(stacks / f"rank-{rank}.txt").read_text() for rank in range(num_processes)]
    assert all("Thread" in text for text in written)
    assert function in written[-1]
    assert num_processes == 1 or "waiting for other ranks" in written[0]
    again = run("grpo", recipe, *name)
    assert again.returncode == 0, again.stderr[-3000:]
    assert not stacks.exists()


@pytest.mark.slow
def test_a_collapse_goes_back_to_a_checkpoint_that_was_good(recipe: Path) -> None:
    """Step 5's rewards fall to 0: what step 4 has made may be as bad, what step 3 has made is not.
    The count of the reward begins again with the process, so the second one ends well."""
    reward = "{function: reward_of_tests.right_for_so_many_calls, options: {so_many: 128}}"
    command = (
        "grpo", recipe, "--set", "name=collapse", "--set", f"stages.grpo.rewards=[{reward}]",
        "--set", "stages.grpo.max_steps=7", "--set", "stages.grpo.save_steps=1",
        "--set", "stages.grpo.save_total_limit=9", "--set", "stages.grpo.prompts_per_step=32",
    )  # fmt: skip
    assert run("init", recipe, "--set", "name=collapse").returncode == 0
    result = run(*command)
    assert result.returncode == 2, result.stderr[-3000:]
    folder = recipe.parent / "runs" / "collapse"
    partial = folder / ".grpo.partial"
    line = result.stderr.splitlines()[-1]
    assert line.startswith("r1pipe: grpo, step 5: the mean reward lost 100%")
    assert line.endswith(f"r1pipe rollouts {partial} --step 5")
    assert "grpo: step 3 is saved" in result.stderr
    assert find_steps(partial / "checkpoints") == [1, 2, 3]
    assert {row["step"] for row in read_rollouts(partial, [5])} == {5}
    result = run(*command, "--set", "stages.grpo.breaker.reward_collapse.action=warn")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "grpo: resumes after step 3" in result.stderr
    events = read_lines(folder / "grpo" / "events.jsonl")
    assert [e["step"] for e in events if e["check"] == "reward_collapse"] == [5]
    assert [row["step"] for row in read_lines(folder / "grpo" / "metrics.jsonl")] == [*range(1, 8)]
