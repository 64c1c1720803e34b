"""DeepSeek Sparse Attention and its indexer's loss, against transformers' deepseek_v32 and
equations 3 and 4 written out, one sequence at a time."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_models import MODELS, PROBLEMS, watch_gradients
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r1pipe.config.sft import Supervised
from r1pipe.models import sparse_attention
from r1pipe.models.model import build_model
from r1pipe.models.sparse_attention import find_attentions, index, score, select
from r1pipe.sft.encode import Trace, encode_traces
from r1pipe.sft.trainer import SupervisedTrainer
from r1pipe.trainer.breaker import EventLog
from r1pipe.trainer.packing import Sample, pack
from r1pipe.trainer.policy import Policy
from r1pipe.types import Rollout
from r1pipe.utils.errors import Tripped

CPU = torch.device("cpu")
SPARSE = MODELS["deepseek_v32"]
TOPK = SPARSE["index_topk"]


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return build_model(SPARSE, tokenizer, seed=0)


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerBase) -> list[Trace]:
    return encode_traces(PROBLEMS[:5], tokenizer, None).rows


def make_sample(ids: list[int]) -> Sample:
    return Sample(Rollout("p", 0, ids[:1], ids[1:], [-1.0] * (len(ids) - 1), "", "stop"), 1.0)


def watch(model: PreTrainedModel, ids_1L: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each layer's attention `[H, L, L]` by transformers' eager forward, and the index scores
    `[L, L]`, with a gradient, of what its indexer is given there."""
    given: list[tuple] = []
    handles = [
        module.indexer.register_forward_pre_hook(lambda own, args: given.append((own, *args)))
        for module in find_attentions(model)
    ]
    model.set_attn_implementation("eager")
    weights = model(input_ids=ids_1L, output_attentions=True, use_cache=False).attentions
    for handle in handles:
        handle.remove()
    scores = []
    for indexer, hidden, latent, rotary, *_ in given:
        own = index(indexer, hidden.detach(), latent.detach(), rotary)
        scores.append(score(own.query_NGE, own.weight_NG, own.key_NE))
    return [(layer[0].detach(), found) for layer, found in zip(weights, scores, strict=True)]


def test_scores_are_those_of_transformers(
    model: PreTrainedModel, ids_BL: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    topk = Tensor.topk

    def look(self: Tensor, *args: object, **kwargs: object) -> object:
        if self.shape == (1, 7, 7):
            seen.append(self)
        return topk(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "topk", look)
    ours = [scores_LL for _, scores_LL in watch(model, ids_BL[:1])]
    causal_LL = torch.ones(7, 7).tril().bool()
    assert len(seen) == len(ours) == 2
    for theirs, scores_LL in zip(seen, ours):
        difference = (theirs[0] - scores_LL)[causal_LL].abs().max()
        assert float(difference.detach()) < 1e-6
        assert float(scores_LL.detach().abs().max()) > 0.1


def test_of_equal_scores_the_earlier_is_selected() -> None:
    nan, low = float("nan"), -torch.inf
    rows = [
        [0.0, 1.0, 0.0, 2.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [-1.0, 0.0, -2.0, 5.0, 0.0, 0.0],
        [nan, 1.0, nan, 2.0, low, low],
        [0.5, 0.25, 0.125, 0.75, low, low],
    ]
    wanted = [[0, 1, 3], [0, 1, 2], [1, 3, 4], [0, 1, 3], [0, 1, 3]]
    assert select(torch.tensor(rows), 3).tolist() == wanted


@pytest.mark.parametrize("max_numbers", [2**22, 900])
def test_forward_is_transformers_eager_one(
    model: PreTrainedModel, max_numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shorter and longer than index_topk, in one row, in chunks or not; gradients too."""
    monkeypatch.setattr(sparse_attention, "MAX_NUMBERS", max_numbers)
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(1, 200, (n,), generator=generator) for n in (40, 21, 6, 4, 2)]
    batch = pack([make_sample(ids.tolist()) for ids in sequences], CPU)
    own = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    expected = []
    for ids_L in sequences:
        logits_LV = model(input_ids=ids_L.unsqueeze(0), use_cache=False).logits[0, :-1]
        expected.append(logits_LV.log_softmax(-1).gather(1, ids_L[1:, None]).squeeze(1))
    torch.cat(expected).square().sum().backward()
    logprobs_C = Policy(own)(batch, 1.0).logprobs_C
    logprobs_C.square().sum().backward()
    torch.testing.assert_close(logprobs_C, torch.cat(expected), atol=1e-5, rtol=0)
    for (name, parameter), other in zip(model.named_parameters(), own.parameters()):
        assert (other.grad is None) == (".indexer." in name), name
        if other.grad is not None:
            scale = float(parameter.grad.abs().max()) + 1e-3
            assert float((parameter.grad - other.grad).abs().max()) < 1e-4 * scale, name


def make_trainer(model: PreTrainedModel, phase: str | None, **changes: object) -> SupervisedTrainer:
    settings = {"max_steps": 40, "lr_scheduler_type": "constant", **changes}
    if phase:
        settings["indexer"] = {"phase": phase, "learning_rate": 0.01}
    checked = Supervised.model_validate(settings)
    return SupervisedTrainer(model, checked, num_steps=40, dtype="float32")


def measure_by_hand(
    model: PreTrainedModel, rows: list[Trace], *, dense: bool
) -> tuple[Tensor, Tensor]:
    """The indexer's loss: a mean over tokens, a sum over layers. Coverage: a mean over layers and
    rows. By transformers."""
    losses, coverages, num_tokens = [], [], 0
    for trace in rows:
        ids_1L = torch.tensor([[*trace.prompt_ids, *trace.completion_ids]])
        length = ids_1L.shape[1]
        assert length > 2 * TOPK
        limit = length if dense else TOPK
        attentions = find_attentions(model)
        for module in attentions:
            module.indexer.index_topk = limit
        layers = watch(model, ids_1L)
        for module in attentions:
            module.indexer.index_topk = TOPK
        num_tokens += length
        for weights_HLL, scores_LL in layers:
            seen_LL = weights_HLL.sum(0) > 0
            counts_L = torch.arange(1, length + 1).clamp(max=limit)
            assert torch.equal(seen_LL.sum(-1), counts_L)
            p_LL = weights_HLL.sum(0) / weights_HLL.sum((0, 2)).unsqueeze(1)
            logq_LL = scores_LL.masked_fill(~seen_LL, -1e30).log_softmax(-1)
            terms_LL = p_LL * (p_LL.clamp(min=1e-30).log() - logq_LL)
            losses.append(terms_LL[seen_LL].sum())
            if dense:
                chosen = scores_LL[-1].topk(TOPK).indices
                coverages.append(p_LL[-1, chosen].sum())
    loss = torch.stack(losses).sum() / num_tokens
    return loss, torch.stack(coverages).mean() if dense else torch.zeros(())


@pytest.mark.parametrize("phase", ["dense", "warmup", "sparse"])
@pytest.mark.parametrize("max_numbers", [2**22, 900])
def test_the_indexers_loss(
    phase: str,
    max_numbers: int,
    model: PreTrainedModel,
    rows: list[Trace],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its value and gradient; in one micro-batch or several, with checkpointed layers or not."""
    monkeypatch.setattr(sparse_attention, "MAX_NUMBERS", max_numbers)
    start = copy.deepcopy(model)
    loss, coverage = measure_by_hand(start, rows, dense=phase != "sparse")
    loss.backward()
    trainer = make_trainer(
        model,
        phase,
        max_grad_norm=1e9,
        micro_batch_tokens=8 if max_numbers == 900 else 4096,
        gradient_checkpointing=max_numbers == 900,
    )
    seen = watch_gradients(trainer)
    metrics = trainer.take_step(rows, 1, "sft", EventLog(tmp_path))
    assert metrics["indexer/kl"] == pytest.approx(float(loss.detach()) / 2, rel=1e-4)
    if phase == "sparse":
        assert 0 < metrics["indexer/coverage"] < 1
    else:
        assert metrics["indexer/coverage"] == pytest.approx(float(coverage), rel=1e-4)
    num_own = 0
    for name, parameter in start.named_parameters():
        if ".indexer." in name:
            num_own += 1
            scale = float(parameter.grad.abs().max()) + 1e-6
            assert float((parameter.grad - seen[name]).abs().max()) < 1e-3 * scale, name
            assert scale > 1e-4, name
        else:
            assert parameter.grad is None, name
            assert (name in seen) == (phase != "warmup"), name
    assert num_own == 2 * 5


@pytest.mark.parametrize("phase", ["dense", "sparse"])
def test_the_model_learns_as_without(
    phase: str, model: PreTrainedModel, rows: list[Trace], tmp_path: Path
) -> None:
    """Its clipped gradient is that of its own loss."""
    if phase == "dense":
        model.config.index_topk = 10**6
    other = copy.deepcopy(model)
    without, beside = make_trainer(other, None), make_trainer(model, phase)
    gradients = [watch_gradients(trainer) for trainer in (without, beside)]
    metrics = [t.take_step(rows, 1, "sft", EventLog(tmp_path)) for t in (without, beside)]
    assert gradients[0].keys() == {name for name in gradients[1] if ".indexer." not in name}
    for name, gradient in gradients[0].items():
        if phase == "sparse":
            assert torch.equal(gradient, gradients[1][name]), name
        else:  # by another kernel
            torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-3)
    assert metrics[0]["grad_norm"] == pytest.approx(metrics[1]["grad_norm"], rel=1e-5)
    assert "indexer/kl" not in metrics[0]


def test_warmup_teaches_the_indexer_alone(
    model: PreTrainedModel, rows: list[Trace], tmp_path: Path
) -> None:
    start = copy.deepcopy(model)
    trainer = make_trainer(model, "warmup")
    steps = [trainer.take_step(rows, n, "sft", EventLog(tmp_path)) for n in range(30)]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, start.state_dict()[name]) is (".indexer." not in name), name
    assert steps[-1]["indexer/kl"] < 0.5 * steps[0]["indexer/kl"]
    assert steps[-1]["indexer/coverage"] > steps[0]["indexer/coverage"]
    assert steps[0]["learning_rate"] == 0.01
    assert steps[0]["loss"] == steps[-1]["loss"]


def test_a_resumed_run_goes_on_alike(
    model: PreTrainedModel, rows: list[Trace], tmp_path: Path
) -> None:
    trainers = [make_trainer(copy.deepcopy(model), "sparse") for _ in range(2)]
    for step in range(4):
        if step == 2:
            trainers[1].load_state_dict(copy.deepcopy(trainers[0].state_dict()))
        metrics = [t.take_step(rows, step, "sft", EventLog(tmp_path)) for t in trainers]
    assert metrics[0]["indexer/kl"] == metrics[1]["indexer/kl"]
    for name, tensor in trainers[0].model.state_dict().items():
        assert torch.equal(tensor, trainers[1].model.state_dict()[name]), name


@pytest.mark.parametrize("phase", ["warmup", "sparse"])
def test_a_broken_indexer_ends_the_run(
    phase: str, model: PreTrainedModel, rows: list[Trace], tmp_path: Path
) -> None:
    with torch.no_grad():
        find_attentions(model)[0].indexer.wk.weight.fill_(torch.nan)
    trainer = make_trainer(model, phase)
    with pytest.raises(Tripped, match="NaN or infinite"):
        trainer.take_step(rows, 1, "sft", EventLog(tmp_path))
