"""Frozen weights that are away while vLLM samples: the same numbers, a layer at a time."""

import copy
from pathlib import Path

import pytest
import torch
from grpo_settings import make_grpo
from tiny_models import MODELS, PROBLEMS, make_rollout
from transformers import PreTrainedTokenizerBase

from r1pipe.models.adapter import NewAdapter
from r1pipe.models.model import build_model
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import export_weights, save_checkpoint
from r1pipe.rl.grpo_update import GrpoUpdater
from r1pipe.trainer.fsdp import load_sharded
from r1pipe.trainer.packing import Sample
from r1pipe.trainer.policy import Policy

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)


@pytest.fixture(scope="module")
def checkpoint(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(build_model(MODELS["deepseek_v3"], tokenizer, 0), tokenizer, folder)
    return folder


def make_updater(checkpoint: Path, offload_base: bool, dtype: str) -> GrpoUpdater:
    settings = make_grpo(beta=0.1, learning_rate=1e-2, adapter={"offload_base": offload_base})
    adapter = NewAdapter(settings.adapter, 0)
    policy = load_sharded(str(checkpoint), CPU, "sdpa", Policy, dtype=dtype, adapter=adapter)
    return GrpoUpdater(policy, policy, settings, dtype=dtype, seed=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_numbers_wherever_the_weights_are(
    dtype: str, checkpoint: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rollouts = [make_rollout(tokenizer, problem, 20, -5.0) for problem in PROBLEMS[:8]]
    samples = [Sample(rollout, (-1.0) ** n) for n, rollout in enumerate(rollouts)]
    told = []
    for offload_base in (False, True):
        updater = make_updater(checkpoint, offload_base, dtype)
        lines = []
        for step in (1, 2):
            updater.enter_device()
            lines.append(updater.step(copy.deepcopy(samples), step, lambda metrics: None))
            updater.leave_device()
            lines.append(updater.evaluate(copy.deepcopy(samples)).metrics())
            lines.append({n: w.double().sum().item() for n, w in export_weights(updater.model)})
        told.append(lines)
    assert told[0] == told[1]
    assert told[0][0]["kl"] == 0 < told[0][3]["entropy"]


def test_a_layer_at_a_time(checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    updater = make_updater(checkpoint, True, "float32")
    host = updater.frozen.host
    assert len(host) == sum(not p.requires_grad for p in updater.model.parameters())
    names = {parameter: name for name, parameter in updater.model.named_parameters()}

    def here() -> set[str]:
        lent = {names[p] for p, at_home in host.items() if p.data_ptr() != at_home.data_ptr()}
        return {name.split(".")[2] if ".layers." in name else "outside" for name in lent}

    assert here() == {"0", "1", "outside"}
    updater.leave_device()
    assert here() == set()
    seen = []
    for layer in updater.model.base_model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: seen.append(here()))
    updater.evaluate([Sample(make_rollout(tokenizer, PROBLEMS[0], 20), 1.0)])
    assert seen == 2 * [{"0", "outside"}, {"1", "outside"}]  # policy and reference
    assert here() == set()
    updater.enter_device()
    assert here() == {"0", "1", "outside"}
