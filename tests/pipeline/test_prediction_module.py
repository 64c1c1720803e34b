"""A policy's module for multi-token prediction in a real engine, which it drafts with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_engine import CPU, LIMIT, logprob_diff
from test_speculative import (
    PROBLEMS,
    SAMPLINGS,
    make_module,
    make_peaked,
    save_with_module,
    speculating,
)
from transformers import PreTrainedModel

from r1pipe.config.base import Sampling
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import export_weights, save_checkpoint
from r1pipe.rollout.engine import Sampler
from r1pipe.utils.errors import UserError


def test_a_model_without_a_module_is_sampled_without_drafts(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)
    save_checkpoint(make_peaked("llama", tokenizer), tokenizer, tmp_path)
    sampler = Sampler(str(tmp_path), speculating(None), "float32", CPU)
    assert "sampled without drafts" in capfd.readouterr().err
    sampler.generate(PROBLEMS[:2], 1, SAMPLINGS[0], (0,))
    assert sampler.drafts.acceptance() is None
    sampler.close()


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PreTrainedModel, Sampler]]:
    """A policy that predicts from the last token's embedding alone, as its module would if the
    module's were not 0."""
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)
    model = make_peaked("deepseek_v3", tokenizer)
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.data.zero_()
    folder = tmp_path_factory.mktemp("simple")
    save_with_module(model, tokenizer, folder, scale=0.0)
    sampler = Sampler(str(folder), speculating(None, trial=False), "float32", CPU)
    assert not sampler.trial
    yield model, sampler
    sampler.close()


def test_a_sync_reaches_the_module(simple: tuple[PreTrainedModel, Sampler]) -> None:
    """vLLM's reload leaves it as it was: drafts of the first policy for all that follow."""
    model, sampler = simple
    greedy = Sampling(max_completion_length=24, temperature=0.0)
    shares = []
    for scale in (1.0, 0.0, 1.0):
        sampler.load_weights([*export_weights(model), *make_module(model, scale).items()])
        sampler.drafts.clear()
        rollouts = sampler.generate(PROBLEMS, 1, greedy, (0,))
        assert logprob_diff(model, rollouts) < LIMIT
        shares.append(sampler.drafts.acceptance())
    assert shares[1] < 0.1
    assert shares[0] == shares[2] > 0.8


def test_without_a_trial_samples_repeat_bit_by_bit(simple: tuple[PreTrainedModel, Sampler]) -> None:
    """Log-probs, too; by a trial they depend on which calls had drafts."""
    model, sampler = simple
    both = []
    for _ in range(2):
        sampler.load_weights([*export_weights(model), *make_module(model).items()])
        sampler.drafts.clear()
        both.append(sampler.generate(PROBLEMS, 2, SAMPLINGS[0], (0,)))
        assert 0 < sampler.drafts.acceptance() < 1
    assert both[0] == both[1]
    assert both[0] != sampler.generate(PROBLEMS, 2, SAMPLINGS[0], (1,))


def test_a_module_without_weights_is_named(simple: tuple[PreTrainedModel, Sampler]) -> None:
    model, sampler = simple
    with pytest.raises(UserError, match=r"no weights of the module for multi-token prediction$"):
        sampler.load_weights(export_weights(model))
    module = {name: w for name, w in make_module(model).items() if "eh_proj" not in name}
    name = rf"model\.layers\.{model.config.num_hidden_layers}\.eh_proj"
    with pytest.raises(UserError, match=f"no weights of {name}$"):
        sampler.load_weights([*export_weights(model), *module.items()])


def test_copies_of_the_head_in_the_module_are_not_loaded(
    simple: tuple[PreTrainedModel, Sampler],
) -> None:
    """DeepSeek's checkpoints have them; in vLLM the policy has the only one."""
    model, sampler = simple
    layer = f"model.layers.{model.config.num_hidden_layers}"
    copies = {
        f"{layer}.shared_head.head.weight": torch.zeros_like(model.lm_head.weight),
        f"{layer}.embed_tokens.weight": torch.zeros_like(model.lm_head.weight),
    }
    sampler.load_weights([*export_weights(model), *make_module(model).items(), *copies.items()])
    rollouts = sampler.generate(PROBLEMS, 1, SAMPLINGS[0], (0,))
    assert logprob_diff(model, rollouts) < LIMIT
