"""A small grpo stage for tests of the loop and its parts."""

from r1pipe.config import Grpo


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
