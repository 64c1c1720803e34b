"""What tests of the trainer's half begin with: a tokenizer, a tiny model, samples."""

import random
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from r1pipe.trainer.packing import Sample


# torch is imported in the fixtures: most tests of the rewards and the config need none.


@pytest.fixture(scope="module")
def tokenizer() -> "PreTrainedTokenizerBase":
    from tiny_models import PROBLEMS

    from r1pipe.models.tokenizer import build_tokenizer

    return build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)


@pytest.fixture
def model(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
    from tiny_models import TINY

    from r1pipe.models.model import build_model

    return build_model(TINY, tokenizer, seed=0)


@pytest.fixture(scope="module")
def samples(tokenizer: "PreTrainedTokenizerBase") -> "list[Sample]":
    """Rollouts of many lengths, with advantages of both signs and some of zero."""
    from tiny_models import PROBLEMS, make_rollout

    from r1pipe.trainer.packing import Sample

    rng = random.Random(0)
    rows = []
    for problem in PROBLEMS[:20]:
        rollout = make_rollout(tokenizer, problem, rng.randint(3, 40))
        rows.append(Sample(rollout, rng.choice([-1.0, 0.0, 0.5, 2.0])))
    return rows
