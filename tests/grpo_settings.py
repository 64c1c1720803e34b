"""Small stages that train on their own samples, for tests of the loop and its parts."""

from r1pipe.config.rl import Grpo, OnPolicyDistill


def make_grpo(**changes: object) -> Grpo:
    """Twenty samples a step, changed as given."""
    values = {
        "kind": "grpo",
        "from": "x",
        "data": {"recipe": "arithmetic"},
        "rewards": [{"function": "rewards.math_correct"}],
        "max_steps": 2,
        "prompts_per_step": 5,
        "num_generations": 4,
        "max_completion_length": 40,
    }
    return Grpo.model_validate({**values, **changes})


def make_on_policy_distill(**changes: object) -> OnPolicyDistill:
    """Twenty samples a step, changed as given."""
    values = {
        "kind": "on_policy_distill",
        "from": "x",
        "student": "y",
        "data": {"recipe": "arithmetic"},
        "max_steps": 2,
        "prompts_per_step": 20,
        "max_completion_length": 40,
    }
    return OnPolicyDistill.model_validate({**values, **changes})
