"""A weight sync that went wrong is noticed at once, if the recipe asks for that."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from grpo_settings import make_grpo
from transformers import AutoConfig, AutoModelForCausalLM

from r1pipe.config.base import Sampling
from r1pipe.rl.grpo_update import GrpoUpdater
from r1pipe.rl.loop import PROBE_PROMPTS, PROBE_TOKENS, probe_sync
from r1pipe.rollout.groups import SampleGroup, plan_groups
from r1pipe.runs.logs import JsonlLog
from r1pipe.trainer.breaker import Breaker
from r1pipe.types import Problem, Rollout
from r1pipe.utils.errors import UserError

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


make_settings = partial(make_grpo, prompts_per_step=6, num_generations=2)


class WrongBy:
    """A sampler whose log-probabilities are the model's, plus an error in one of its engines."""

    num_engines = 2

    def __init__(self, model: torch.nn.Module, error: float):
        self.model, self.error = model, error

    @torch.no_grad()
    def generate_groups(
        self,
        problems: list[Problem],
        num_samples: int,
        sampling: Sampling,
        seed_parts: tuple,
        with_routes: bool,
    ) -> list[SampleGroup]:
        assert (len(problems), num_samples) == (PROBE_PROMPTS, 1)
        assert sampling.max_completion_length == PROBE_TOKENS
        assert seed_parts == (7, "grpo", "probe", 3)
        ids = [1, 2, 3, 4, 5]
        logits = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        groups = plan_groups(problems, num_samples, seed_parts)
        for group in groups:
            error = self.error * (group.index % 2)
            logprobs = [float(logits[t - 1, ids[t]]) + error for t in (3, 4)]
            group.samples[0] = Rollout("", 0, ids[:3], ids[3:], logprobs, "", "stop")
        return groups


@pytest.mark.parametrize("error", [0.0, 0.01])
def test_probe(error: float, tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen3", **TINY)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stage = make_settings(name="grpo")
    sampler = WrongBy(copy.deepcopy(model), error)
    updater = GrpoUpdater(model, None, stage, dtype="float32", seed=7)
    problems = [Problem(id=str(i), kind="math", prompt=[]) for i in range(6)]
    breaker = Breaker(stage, JsonlLog(tmp_path / "events.jsonl"), tmp_path)
    if error:
        with pytest.raises(
            UserError, match=r"step 3: sampler and trainer disagree.* 1.00e-02 \(breaker"
        ):
            probe_sync(stage, updater, sampler, breaker, problems, 3)
    else:
        metrics = probe_sync(stage, updater, sampler, breaker, problems, 3)
        assert metrics["sync/logprob_diff_mean"] < 1e-5


def test_when_syncs_are_probed() -> None:
    """Where the next batch is too old to be compared, or where it is asked for."""
    assert not make_settings().verifies_sync
    assert make_settings(max_staleness=1).verifies_sync
    assert make_settings(verify_sync=True).verifies_sync
    assert make_settings(fp8="rollouts").verifies_sync
    assert not make_settings(max_staleness=1, verify_sync=False).verifies_sync
