"""Looks at a recipe before anything is run: its data's rows, its rewards, its run folder."""

from collections.abc import Iterator

from r1pipe.config import Grpo, Recipe, Reward
from r1pipe.problems import load_problems
from r1pipe.scoring import Scorer


def check_recipe(recipe: Recipe) -> Iterator[str]:
    """One line per thing looked at. Raises UserError at the first that is wrong."""
    yield f"{recipe.name}: {len(recipe.stages)} stages, run folder {recipe.run_dir}"
    for stage in recipe.stages:
        rewards = stage.rewards if isinstance(stage, Grpo) else []
        if traces := getattr(stage, "traces", None):
            rewards = traces.rewards
        if reward := getattr(stage, "reward", None):
            rewards = [Reward(function=reward)]
        Scorer(list(rewards))
        source = getattr(stage, "data", None)
        if source is None or source.recipe is None:
            yield f"{stage.name}: ok"
            continue
        problems = load_problems(source)
        yield f"{stage.name}: {source.recipe}/{source.split}: {len(problems)} problems"
