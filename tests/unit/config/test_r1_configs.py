"""The R1 recipes and their small twins: the same stages, and what the paper has of each."""

from pathlib import Path

import pytest

from r1pipe.config.evals import Eval
from r1pipe.config.load import load_recipe
from r1pipe.config.recipe import Recipe
from r1pipe.config.rl import Grpo
from r1pipe.config.sft import Sft
from r1pipe.config.traces import Distill, Reject

CONFIGS = Path(__file__).parents[3] / "configs"
PRETRAINING = ["random", "base"]
"""Of the small ones: what stands for the model from the hub."""
R1 = ["cold_start", "rl", "reject", "sft", "rl_final", "student_small", "student_large", "eval"]
R1_ZERO = ["grpo", "eval"]
SAME = {
    Sft: {"filters", "data.stage", "train.lr_scheduler_type"},
    Grpo: {"beta", "temperature", "loss_type"},
    Reject: {"traces.max_per_problem", "traces.filters", "traces.rewards", "mix.share"},
    Distill: {"traces.rewards", "traces.filters"},
    Eval: {"sampling.temperature", "sampling.top_p", "reward", "format_reward"},
}
"""Of each kind of stage: what makes it that stage of the paper, whatever the size."""


def load(name: str) -> Recipe:
    return load_recipe(CONFIGS / f"{name}.yaml")


def read(stage: object, key: str) -> object:
    for part in key.split("."):
        stage = getattr(stage[0] if isinstance(stage, list) else stage, part)
    return stage


@pytest.mark.parametrize(("large", "stages"), [("r1", R1), ("r1_zero", R1_ZERO)])
def test_small_recipe_has_the_large_one_s_stages(large: str, stages: list[str]) -> None:
    whole, tiny = load(large), load(f"{large}_tiny")
    assert [stage.name for stage in whole.stages] == stages
    assert [stage.name for stage in tiny.stages] == [*PRETRAINING, *stages]
    base = next(stage.from_ for stage in whole.stages)
    for stage, small in zip(whole.stages, tiny.stages[len(PRETRAINING) :], strict=True):
        assert small.kind == stage.kind
        for key in SAME[type(stage)]:
            assert read(small, key) == read(stage, key), f"{stage.name}.{key}"
        if isinstance(stage, Grpo):
            rules = [r.function for r in stage.rewards if not r.is_judge]  # a laptop has no judge
            assert [r.function for r in small.rewards] == rules
        parents = [name for name in stage.parents() if name == base or whole.stage(name)]
        assert small.parents() == ["base" if name == base else name for name in parents]


@pytest.mark.parametrize("name", ["r1", "r1_tiny"])
def test_r1_is_the_paper_s(name: str) -> None:
    recipe = load(name)
    base = recipe.stage("cold_start").from_
    assert base not in R1
    assert recipe.stage("sft").from_ == base
    assert recipe.stage("sft").data[0].stage == "reject"
    assert recipe.stage("cold_start").filters.require_format
    assert recipe.stage("cold_start").filters.min_language_share > 0
    assert recipe.stage("reject").mix.share == 0.25
    for stage in ("rl", "rl_final"):
        rules = [reward for reward in recipe.stage(stage).rewards if not reward.is_judge]
        rewards = {reward.function: reward.weight for reward in rules}
        names = ("math_correct", "format", "language_consistency")
        assert rewards == {f"rewards.{name}": 1.0 for name in names}
    assert {recipe.stage(s).from_ for s in ("student_small", "student_large")} == {"rl_final"}
    assert recipe.stage("eval").checkpoints == [
        base,
        *(s for s in R1 if s not in ("reject", "eval")),
    ]


def test_the_second_rl_stage_keeps_the_first_one_s_parameters() -> None:
    """But for the temperature, how long it takes, and general prompts with a judge of their
    helpfulness (arXiv:2501.12948, its supplement)."""
    (*_, judge) = load("r1").stage("rl_final").rewards
    assert judge.is_judge
    assert judge.options["only_without_gold"]
    first, second = (load("r1").stage(name).model_dump() for name in ("rl", "rl_final"))
    differing = {key for key, value in first.items() if second[key] != value}
    assert differing == {"name", "from_", "data", "rewards", "temperature", "max_steps"}
    assert (second["temperature"], second["epsilon"]) == (0.7, 10.0)
    updates = second["reference_refresh_steps"] * second["steps_per_generation"]
    assert updates == 400


@pytest.mark.parametrize("name", ["r1_zero", "r1_zero_tiny"])
def test_r1_zero_has_no_cold_start_and_no_reward_for_language(name: str) -> None:
    recipe = load(name)
    grpo = recipe.stage("grpo")
    assert recipe.stage("eval").checkpoints == [grpo.from_, "grpo"]
    rewards = {reward.function: reward.weight for reward in grpo.rewards}
    assert rewards["rewards.language_consistency"] == 0.0
    assert rewards["rewards.math_correct"] == 1.0
    assert rewards["rewards.format"] == (1.0 if name == "r1_zero" else 0.2)


def test_general_questions_are_evaluated_where_they_are_mixed_in() -> None:
    recipe = load("r1_tiny")
    sets = {problems.label: problems.options for problems in recipe.stage("eval").data}
    assert list(sets) == ["arithmetic/test", "general"]
    mixed_in = recipe.stage("reject").mix.data.options
    assert sets["general"]["fact_share"] == mixed_in["fact_share"] == 1.0


def test_both_small_recipes_pretrain_alike() -> None:
    r1, zero = load("r1_tiny"), load("r1_zero_tiny")
    for name in PRETRAINING:
        assert r1.stage(name) == zero.stage(name)
