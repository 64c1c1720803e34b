"""One process computes as a sharded run of several does."""

import copy

import pytest
import torch
from tiny_models import MODELS
from transformers import (
    PreTrainedTokenizerBase,
)

from r1pipe.models.model import build_model
from r1pipe.models.routing import route_in_float32
from r1pipe.trainer.fsdp import shard
from r1pipe.trainer.packing import Sample, pack
from r1pipe.trainer.policy import Policy

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", MODELS)
def test_one_process_computes_its_layers_in_bf16(
    tokenizer: PreTrainedTokenizerBase, samples: list[Sample], name: str
) -> None:
    """As a copy whose parameters are bf16 does, to the bit, experts included; what is held, and its
    gradient, is float32."""
    model = build_model(MODELS[name], tokenizer, seed=0).eval()
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data = parameter.data.bfloat16()
    route_in_float32(other)
    batch = pack(samples[:8], CPU)
    expected = Policy(other)(batch, 1.0).logprobs_C
    policy = shard(Policy(model), model, CPU, dtype="bfloat16")
    now = policy(batch, 1.0).logprobs_C
    assert torch.equal(now, expected)
    now.mean().backward()
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is None or parameter.grad.dtype == torch.float32
    assert sum(parameter.grad is not None for parameter in model.parameters()) > 5
