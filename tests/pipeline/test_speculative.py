"""Drafted tokens change how fast a real engine samples, not what."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_collect import collect, make_collector
from test_engine import CPU, LIMIT, lengthen, logprob_diff, make_model
from transformers import PreTrainedModel

from r1pipe.config.base import ProblemSet, Sampling
from r1pipe.config.recipe import Engine, Speculative
from r1pipe.data.problems import load_problems
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import export_weights, save_checkpoint
from r1pipe.rl.batch import Batch
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.speculation import TRIAL_CALLS
from r1pipe.types import Rollout
from r1pipe.utils.errors import UserError

PROBLEMS = load_problems(ProblemSet(recipe="arithmetic", options={"size": 24}))
SETTINGS = Engine(max_model_len=256, max_num_seqs=64, kv_cache_gib=0.1)
NUM_DRAFTS = 3
SAMPLINGS = [
    Sampling(max_completion_length=24),
    Sampling(max_completion_length=24, temperature=1.5),
    Sampling(max_completion_length=24, temperature=0.7, top_p=0.9, top_k=20),
    Sampling(max_completion_length=24, temperature=0.0),
]
CASES = {
    "its own drafter": ("llama", "llama"),
    "another architecture": ("deepseek_v3", "qwen3, tied"),
    "multi-token prediction": ("deepseek_v3", None),
}
"""Policy and drafter. Drafts of the first are often right; of the second nearly never, and the two
models' caches differ in shape."""


def make_peaked(name: str, tokenizer: object, seed: int = 0) -> PreTrainedModel:
    """Random weights, with tokens that are likelier than others."""
    model = make_model(name, tokenizer, seed)
    if not model.config.tie_word_embeddings:
        model.lm_head.weight.data *= 4
    return model


def make_module(model: PreTrainedModel, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Weights of a module for multi-token prediction, under DeepSeek's names: it predicts from the
    last token's embedding alone, times `scale`."""
    last, number, size = (
        f".layers.{model.config.num_hidden_layers - 1}.",
        f".layers.{model.config.num_hidden_layers}.",
        model.config.hidden_size,
    )
    module = {
        name.replace(last, number): tensor * ("o_proj" not in name and "down_proj" not in name)
        for name, tensor in export_weights(model)
        if last in name
    }
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        module[f"model{number}{norm}.weight"] = torch.ones(size)
    halves = [scale * torch.eye(size), torch.zeros(size, size)]
    return {**module, f"model{number}eh_proj.weight": torch.cat(halves, 1)}


def save_with_module(
    model: PreTrainedModel, tokenizer: object, folder: Path, scale: float = 1.0
) -> None:
    save_checkpoint(model, tokenizer, folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    weights = {**load_file(folder / "model.safetensors"), **make_module(model, scale)}
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


class Opened:
    """An engine with a drafter, its policy, and what an engine without one samples."""

    def __init__(self, policy: str, drafter: str | None, folder: Path):
        tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)
        self.model, self.other = (make_peaked(policy, tokenizer, seed) for seed in (0, 1))
        self.has_module = drafter is None
        if drafter:
            save_checkpoint(self.model, tokenizer, folder / "policy")
            save_checkpoint(make_peaked(drafter, tokenizer), tokenizer, folder / "drafter")
        else:
            save_with_module(self.model, tokenizer, folder / "policy")
        self.with_routes = policy == "deepseek_v3"
        self.sampler = Sampler(str(folder / "policy"), SETTINGS, "float32", CPU, self.with_routes)
        self.plain = [self.sample(sampling) for sampling in SAMPLINGS]
        self.sampler.close()
        settings = speculating(str(folder / "drafter") if drafter else None)
        self.sampler = Sampler(str(folder / "policy"), settings, "float32", CPU, self.with_routes)
        self.trial, self.sampler.trial = self.sampler.trial, None

    def sample(self, sampling: Sampling, num_samples: int = 2) -> list[Rollout]:
        return self.sampler.generate(PROBLEMS, num_samples, sampling, (0,), self.with_routes)

    def sync(self, model: PreTrainedModel) -> None:
        module = make_module(model) if self.has_module else {}
        self.sampler.load_weights([*export_weights(model), *module.items()])


def speculating(drafter: str | None, *, trial: bool = True) -> Engine:
    speculative = Speculative(
        method="draft_model" if drafter else "mtp",
        model=drafter,
        num_speculative_tokens=NUM_DRAFTS,
        trial=trial,
    )
    return SETTINGS.model_copy(update={"speculative": speculative})


SLOW = [pytest.mark.slow]
PARAMS = [pytest.param(name, marks=SLOW * (CASES[name][1] is not None)) for name in CASES]
"""Two engines for each; those with a draft model in test-slow."""


@pytest.fixture(scope="module", params=PARAMS)
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opened]:
    opened = Opened(*CASES[request.param], tmp_path_factory.mktemp("checkpoints"))
    yield opened
    opened.sampler.close()


@pytest.mark.parametrize("number", range(len(SAMPLINGS)))
def test_samples_are_those_without_drafts(opened: Opened, number: int) -> None:
    """The same tokens, log-probs and routes: with vLLM's own check, temperatures above 0 come from
    memory that nobody has written."""
    plain = opened.plain[number]
    for _ in range(2):  # the second time with prompts from the prefix cache
        rollouts = opened.sample(SAMPLINGS[number])
        assert [r.completion_ids for r in rollouts] == [r.completion_ids for r in plain]
        assert [r.finish_reason for r in rollouts] == [r.finish_reason for r in plain]
        for one, other in zip(rollouts, plain, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
            assert (one.routes is not None) == opened.with_routes
            np.testing.assert_array_equal(one.routes, other.routes)


def test_drafts_stand_as_often_as_they_are_right(opened: Opened) -> None:
    drafts, is_own = opened.sampler.drafts, opened.model.config.model_type == "llama"
    shares = []
    for sampling in SAMPLINGS:
        drafts.clear()
        opened.sample(sampling)
        assert drafts.proposed > 0
        shares.append(drafts.acceptance())
    warm, hot, _, greedy = shares
    if is_own:
        assert hot < warm < greedy
        assert 0.05 < warm < 0.8
        # Behind the first wrong one in a step the others are wrong, too; and a completion's end is
        # not drafted for.
        assert greedy > 0.9
    drafts.clear()
    assert drafts.acceptance() is None


@torch.no_grad()
def standard_scores(
    model: PreTrainedModel, rollouts: list[Rollout], temperatures: tuple[float, ...]
) -> list[float]:
    """Of two sums over all tokens, against their conditional means and variances under the policy:
    of 1 for its likeliest token, and of the log-probability. Martingales: about normal. Of each
    temperature the larger |score|."""
    sums_T2, variances_T2 = torch.zeros(2, len(temperatures), 2, dtype=torch.float64)
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        logits_CV = model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1].double()
        chosen_C1 = torch.tensor(rollout.completion_ids)[:, None]
        for place, temperature in enumerate(temperatures):
            logprobs_CV = (logits_CV / temperature).log_softmax(-1)
            likeliest_CV = torch.zeros_like(logprobs_CV)
            likeliest_CV.scatter_(-1, logprobs_CV.argmax(-1, keepdim=True), 1.0)
            for number, values_CV in enumerate((likeliest_CV, logprobs_CV)):
                means_C = (logprobs_CV.exp() * values_CV).sum(-1)
                squares_C = (logprobs_CV.exp() * values_CV**2).sum(-1)
                gains_C = values_CV.gather(-1, chosen_C1)[:, 0] - means_C
                sums_T2[place, number] += gains_C.sum()
                variances_T2[place, number] += (squares_C - means_C**2).sum()
    return (sums_T2 / variances_T2.sqrt()).abs().amax(-1).tolist()


@pytest.mark.parametrize("temperature", [1.0, pytest.param(1.5, marks=pytest.mark.slow)])
def test_the_distribution_is_the_policys(opened: Opened, temperature: float) -> None:
    """Drafts are likely tokens: a check that lets too many stand shows in how often the likeliest
    is taken."""
    sampling = Sampling(max_completion_length=24, temperature=temperature)
    rollouts = opened.sample(sampling, 6)
    score, wrong = standard_scores(opened.model, rollouts, (temperature, 1.25 * temperature))
    assert score < 4
    assert wrong > 6, "another distribution would not show"


def test_samples_do_not_depend_on_the_batch(opened: Opened) -> None:
    part = opened.sampler.generate(PROBLEMS[5:7], 2, SAMPLINGS[1], (0,), opened.with_routes)
    assert [r.completion_ids for r in part] == [r.completion_ids for r in opened.plain[1][10:14]]


def test_agrees_with_the_trainer_after_a_sync(opened: Opened) -> None:
    opened.sync(opened.other)
    rollouts = opened.sample(SAMPLINGS[0])
    assert logprob_diff(opened.other, rollouts) < LIMIT
    assert logprob_diff(opened.model, rollouts) > 0.01, "the two models are too alike to tell"
    opened.sync(opened.model)
    again = opened.sample(SAMPLINGS[0])
    assert [r.completion_ids for r in again] == [r.completion_ids for r in opened.plain[0]]
    assert logprob_diff(opened.model, again) < LIMIT


def test_to_the_end_of_the_context(opened: Opened) -> None:
    """No draft fits there; the cache has pages that both models fill."""
    problems = [lengthen(problem, 7) for problem in PROBLEMS[:8]]
    longest = max(map(len, opened.sampler.encode(problems, 1)))
    sampling = Sampling(max_completion_length=256 - longest)
    rollouts = opened.sampler.generate(problems, 2, sampling, (0,))
    assert max(len(r.prompt_ids + r.completion_ids) for r in rollouts) == 256
    assert logprob_diff(opened.model, rollouts) < LIMIT


def test_prompts_beyond_the_batch_budget(opened: Opened) -> None:
    """A draft model reads a token more of each request than the policy."""
    many = load_problems(ProblemSet(recipe="arithmetic", options={"size": 64, "seed": 1}))
    problems = [lengthen(problem, 6) for problem in many]
    rollouts = opened.sampler.generate(problems, 1, Sampling(max_completion_length=4), (0,))
    assert sum(len(r.prompt_ids) for r in rollouts) > 8192
    assert logprob_diff(opened.model, rollouts) < LIMIT


def test_switched_off_and_on(opened: Opened) -> None:
    drafts, samples = opened.sampler.drafts, []
    for drafting in (False, True):
        opened.sampler.set_drafting(drafting)
        drafts.clear()
        samples.append([r.completion_ids for r in opened.sample(SAMPLINGS[1])])
        assert bool(drafts.proposed) == drafting
    assert samples == 2 * [[r.completion_ids for r in opened.plain[1]]]


def test_both_ways_are_tried(opened: Opened, capfd: pytest.CaptureFixture) -> None:
    drafts, opened.sampler.trial, seen = opened.sampler.drafts, opened.trial, []
    for _ in range(1 + 2 * TRIAL_CALLS):
        drafts.clear()
        opened.sample(SAMPLINGS[0], 1)
        seen.append(drafts.proposed > 0)
    opened.sampler.trial = None
    assert seen == [True, *TRIAL_CALLS * [False, True]]
    assert "tokens/s with drafts" in capfd.readouterr().err


def test_acceptance_is_a_metric(opened: Opened) -> None:
    collector = make_collector(opened.sampler, "reward_of_tests.always_one")
    batch, drafts = collect(collector, 1), opened.sampler.drafts
    assert batch.metrics()["sampler/acceptance"] == drafts.accepted / drafts.proposed < 1
    restored = Batch.from_state(batch.state_dict())
    assert restored.metrics() == batch.metrics()


def test_a_drafter_with_another_vocabulary(tmp_path: Path) -> None:
    """Of the same size."""
    folders = []
    for texts in ("0123456789" * 9, "abcdefghij" * 9):
        tokenizer = build_tokenizer([texts], 264)
        folders.append(str(tmp_path / texts[0]))
        save_checkpoint(make_model("llama", tokenizer, 0), tokenizer, Path(folders[-1]))
    with pytest.raises(UserError, match=r"engine.speculative.model: .*another vocabulary"):
        Sampler(folders[0], speculating(folders[1]), "float32", CPU)
