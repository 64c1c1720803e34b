"""YaRN in settings and on the card; tests/pipeline/test_long_context.py has the sampler."""

import copy
import re

import pytest
from tiny_models import TINY
from transformers import PreTrainedTokenizerBase

from r1pipe.doctor.model_config import make_config
from r1pipe.models.model import build_model
from r1pipe.models.yarn import describe_yarn, find_yarn
from r1pipe.utils.errors import UserError

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_a_new_model_has_it(tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """And the recipe's own dict, which its record is compared with, stays as it is."""
    settings = {**TINY, "rope_theta": 500.0, key: YARN}
    given = copy.deepcopy(settings)
    config = build_model(settings, tokenizer, 0).config
    assert find_yarn(config) == {**YARN, "rope_theta": 500.0}
    assert settings == given
    assert "128 tokens, by YaRN with a factor of 4 over 32:" in describe_yarn(config.to_dict())


def test_none() -> None:
    assert find_yarn({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}) is None
    assert not describe_yarn({"rope_scaling": None})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"original_max_position_embeddings": None}, "yarn needs original_max_position_embeddings"),
        ({"factor": None, "type": "yarn", "rope_type": None}, "yarn needs factor"),
        ({"factor": "4x"}, 'model: factor of yarn is "4x": give a number'),
        ({"beta_fats": 8}, 'yarn has no "beta_fats"; it has attention_factor, beta_fast,'),
    ],
)
def test_what_transformers_would_guess(
    tokenizer: PreTrainedTokenizerBase, changes: dict, words: str
) -> None:
    """It takes the whole context for the original one, leaves unknown keys out, and computes with
    what is no number. The doctor knows it as well."""
    scaling = {k: v for k, v in {**YARN, **changes}.items() if v is not None}
    settings = {**TINY, "rope_parameters": scaling}
    with pytest.raises(UserError, match=re.escape(words)):
        build_model(settings, tokenizer, 0)
    with pytest.raises(UserError, match=re.escape(words)):
        make_config(settings)
