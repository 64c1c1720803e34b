"""On-policy distillation: the divergence against its definition, the update, the vocabularies."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from grpo_settings import make_on_policy_distill
from tiny_models import MODELS, PROBLEMS, TINY, make_rollout
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from r1pipe.models.model import build_model
from r1pipe.models.tokenizer import build_tokenizer, require_same_vocabulary
from r1pipe.report.costs import find_parent
from r1pipe.rl.distill_update import DistillUpdater, TeacherModel
from r1pipe.runs.lineage import list_checkpoints
from r1pipe.runs.reader import StageFolder
from r1pipe.trainer.divergence import TeacherStates, cut_vocabulary, measure_divergence
from r1pipe.trainer.head import MAX_LOGITS
from r1pipe.trainer.packing import Sample, pack
from r1pipe.trainer.policy import Policy
from r1pipe.utils.errors import UserError

BETAS = [1.0, 0.0, 0.5, 0.1]
T = 0.7


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)


@pytest.fixture(scope="module")
def student(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return build_model({**TINY, "tie_word_embeddings": True}, tokenizer, seed=0)


@pytest.fixture(scope="module")
def teacher(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A mixture of experts, wider than the student, its vocabulary padded."""
    wide = {"hidden_size": 48, "vocab_size": 416}
    return build_model({**MODELS["deepseek_v3"], **wide}, tokenizer, seed=1).requires_grad_(False)


@pytest.fixture(scope="module")
def samples(tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """Of many lengths, none of them worth anything to a reward."""
    lengths = [3 + 7 * number % 38 for number in range(len(PROBLEMS[:20]))]
    return [
        Sample(make_rollout(tokenizer, problem, length), 0.0)
        for problem, length in zip(PROBLEMS[:20], lengths)
    ]


# --- The divergence -----------------------------------------------------------------------------


def diverge(student: list[float], teacher: list[float], beta: float) -> float:
    """Of two lists of probabilities, by the definition."""
    if beta == 1:
        return sum(s * math.log(s / t) for s, t in zip(student, teacher))
    if beta == 0:
        return sum(t * math.log(t / s) for s, t in zip(student, teacher))
    mixture = [beta * t + (1 - beta) * s for s, t in zip(student, teacher)]
    return beta * diverge(mixture, teacher, 0) + (1 - beta) * diverge(student, mixture, 1)


def make_logits(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(5, 11, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_is_that_of_the_definition(beta: float) -> None:
    own, theirs = (make_logits(seed).log_softmax(-1) for seed in (0, 1))
    expected = [diverge(*pair, beta) for pair in zip(own.exp().tolist(), theirs.exp().tolist())]
    assert measure_divergence(own, theirs, beta).tolist() == pytest.approx(expected, rel=1e-12)
    assert measure_divergence(own, own, beta).abs().max() < 1e-12


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_of_the_divergence(beta: float) -> None:
    logits, theirs = make_logits(0).requires_grad_(), make_logits(1).log_softmax(-1)
    assert torch.autograd.gradcheck(
        lambda logits: measure_divergence(logits.log_softmax(-1), theirs, beta), logits
    )


def test_gradient_of_the_reverse_kl_by_hand() -> None:
    """d KL / d logit_v = p_v (log p_v - log q_v - KL)."""
    logits, theirs = make_logits(0).requires_grad_(), make_logits(1).log_softmax(-1)
    own = logits.log_softmax(-1)
    kl = measure_divergence(own, theirs, 1.0)
    kl.sum().backward()
    expected = own.exp() * (own - theirs - kl.unsqueeze(-1))
    torch.testing.assert_close(logits.grad, expected.detach())


def test_ends_are_limits_of_the_jensen_shannon_divergence() -> None:
    own, theirs = ((make_logits(seed) / 3).log_softmax(-1) for seed in (0, 1))
    for beta, end in ((1e-6, 0.0), (1 - 1e-6, 1.0)):
        near = measure_divergence(own, theirs, beta) / min(beta, 1 - beta)
        torch.testing.assert_close(near, measure_divergence(own, theirs, end), rtol=1e-4, atol=0)


def test_padding_of_one_vocabulary_does_not_count() -> None:
    own, theirs = make_logits(0), make_logits(1)
    padded = torch.cat([theirs, torch.full((5, 3), 2.0, dtype=torch.float64)], dim=-1)
    states = TeacherStates(padded, lambda hidden: hidden, 1.0)
    expected = measure_divergence(own.log_softmax(-1), theirs.log_softmax(-1), 1.0)
    divergence = states.measure(own.log_softmax(-1), 1.0)
    # The teacher's log-probabilities are float32: 6e-8 of up to 10 each.
    torch.testing.assert_close(divergence, expected, atol=1e-5, rtol=0, check_dtype=False)
    assert cut_vocabulary(own, 11) is own


# --- Packed, in chunks --------------------------------------------------------------------------


def diverge_alone(student: PreTrainedModel, teacher: PreTrainedModel, sample: Sample) -> list:
    """Of each of the completion's tokens, by the models' own forward passes."""
    prompt, completion = sample.rollout.prompt_ids, sample.rollout.completion_ids
    ids = torch.tensor([prompt + completion])
    first = len(prompt) - 1
    both = [
        (model(input_ids=ids).logits[0, first:-1, :400].double() / T).log_softmax(-1)
        for model in (student, teacher)
    ]
    return [diverge(*pair, 1) for pair in zip(*(values.exp().tolist() for values in both))]


@pytest.mark.parametrize("max_logits", [2**25, 400 * 7])
def test_divergence_of_a_packed_batch(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    samples: list[Sample],
    max_logits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Is that of each sample alone, also in chunks of 7 tokens."""
    batch = pack(samples[:6], torch.device("cpu"))
    with torch.no_grad():
        alone = [diverge_alone(student, teacher, sample) for sample in batch.samples]
    monkeypatch.setitem(MAX_LOGITS, "cpu", max_logits)
    updater = make_updater(student, teacher)
    now = updater.measure_divergence(batch)
    for row, expected in zip(batch.split(now.divergence_C), alone, strict=True):
        assert row.tolist() == pytest.approx(expected, abs=1e-4)
    assert torch.equal(now.logprobs_C, updater.measure(batch).logprobs_C)


def make_updater(
    student: PreTrainedModel, teacher: PreTrainedModel, **changes: object
) -> DistillUpdater:
    values = {"temperature": T, "learning_rate": 1e-3, "max_grad_norm": 1e9, **changes}
    settings = make_on_policy_distill(**values)
    own, theirs = Policy(copy.deepcopy(student)), TeacherModel(copy.deepcopy(teacher))
    return DistillUpdater(own, {"": theirs}, settings, dtype="float32", seed=0)


def accept(metrics: dict[str, float]) -> None: ...


def compute_gradient(updater: DistillUpdater, samples: list[Sample]) -> tuple[dict, dict]:
    """The step's metrics and its gradients by parameter."""
    gradients: dict[str, torch.Tensor] = {}
    updater.optimizer.register_step_pre_hook(
        lambda *args: gradients.update(
            {n: p.grad.clone() for n, p in updater.model.named_parameters() if p.grad is not None}
        )
    )
    return updater.step(copy.deepcopy(samples), 1, accept), gradients


@pytest.mark.parametrize("changes", [{"micro_batch_tokens": 64}, {"gradient_checkpointing": True}])
def test_how_it_is_computed_changes_nothing(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    samples: list[Sample],
    changes: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Micro-batches, layers and chunks of logits that are computed again in the backward pass."""
    metrics, gradients = compute_gradient(make_updater(student, teacher), samples)
    monkeypatch.setitem(MAX_LOGITS, "cpu", 400 * 7)
    other, same = compute_gradient(make_updater(student, teacher, **changes), samples)
    for name in ("loss", "divergence", "entropy", "sampler/logprob_diff_mean", "grad_norm"):
        assert other[name] == pytest.approx(metrics[name], rel=1e-5)
    assert gradients.keys() == same.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, atol=1e-6, rtol=1e-4)


def test_the_loss_is_the_mean_over_the_minibatch_s_tokens(
    student: PreTrainedModel, teacher: PreTrainedModel, samples: list[Sample]
) -> None:
    """A long completion weighs more than a short one; a minibatch as much as any other."""
    with torch.no_grad():
        alone = [diverge_alone(student, teacher, sample) for sample in samples]
    metrics, _ = compute_gradient(make_updater(student, teacher, micro_batch_tokens=99), samples)
    expected = sum(map(sum, alone)) / sum(map(len, alone))
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    still = make_updater(student, teacher, steps_per_generation=5, learning_rate=1e-30)
    minibatches = still.plan_minibatches(samples, 1)
    means = [
        sum(sum(alone[n]) for n in numbers) / sum(len(alone[n]) for n in numbers)
        for numbers in minibatches
    ]
    assert still.step(copy.deepcopy(samples), 1, accept)["loss"] == pytest.approx(
        sum(means) / 5, rel=1e-4
    )


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0])
def test_updates_lower_the_divergence(
    student: PreTrainedModel, teacher: PreTrainedModel, samples: list[Sample], beta: float
) -> None:
    updater = make_updater(student, teacher, beta=beta, learning_rate=1e-2, max_steps=30)
    losses = [updater.step(copy.deepcopy(samples), step, accept)["loss"] for step in range(1, 31)]
    assert losses[-1] < 0.7 * losses[0]
    for one, other in zip(teacher.parameters(), updater.teacher.parameters()):
        assert torch.equal(one, other)


def test_sampler_and_trainer_are_compared_before_the_first_optimizer_step(
    student: PreTrainedModel, teacher: PreTrainedModel, samples: list[Sample]
) -> None:
    """On its minibatch; after it the student is another than the sampler's."""
    updater = make_updater(student, teacher, steps_per_generation=4)
    before = copy.deepcopy(updater.model)
    seen: list[dict] = []

    def check(metrics: dict[str, float]) -> bool:
        if not seen:
            assert same_weights(updater.model, before)
        seen.append(metrics)
        return True

    metrics = updater.step(copy.deepcopy(samples), 1, check)
    assert ["sampler/logprob_diff_mean" in row for row in seen] == [True, False, False, False]
    assert metrics["sampler/logprob_diff_mean"] == seen[0]["sampler/logprob_diff_mean"]
    assert metrics["updates_skipped"] == 4
    assert same_weights(updater.model, before)


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


# --- What others know of such a stage -----------------------------------------------------------


def test_where_the_student_comes_from(tmp_path: Path) -> None:
    stage = make_on_policy_distill(name="taught", student="start", **{"from": "rl"})
    assert stage.parents() == ["rl", "start"]
    settings = stage.model_dump(mode="json", by_alias=True)
    record = {"stage": "taught", "kind": stage.kind, "settings": settings}
    finished = StageFolder(tmp_path, record)
    assert (finished.section.weights_from, finished.section.taught_by) == ("start", ["rl"])
    assert finished.parents == ["start", "rl"]
    assert list_checkpoints(settings) == ["rl", "start"]
    (tmp_path / "stage.json").write_text(json.dumps(record))
    assert find_parent(tmp_path) == "start"


# --- Vocabularies -------------------------------------------------------------------------------


def change_tokenizer(tokenizer: PreTrainedTokenizerBase, case: str) -> PreTrainedTokenizerBase:
    if case == "another token":
        values = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary = values["model"]["vocab"]
        one, other = sorted(vocabulary, key=vocabulary.get)[20:22]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        changed = type(tokenizer.backend_tokenizer).from_str(json.dumps(values))
        names = {"pad_token": tokenizer.pad_token, "eos_token": tokenizer.eos_token}
        return PreTrainedTokenizerFast(tokenizer_object=changed, **names)
    changed = copy.deepcopy(tokenizer)
    if case == "one token more":
        changed.add_tokens(["<|more|>"])
    else:
        changed.eos_token = "<|user|>"
    return changed


DIFFERENCES = {
    "another token": r"is token \d+ of the teacher's and token \d+ of the student's",
    "one token more": r"'<\|more\|>' is no token of the teacher's and token 400 of the student's",
    "another end": r"the teacher ends with '<\|end\|>' and the student with '<\|user\|>'",
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_another_vocabulary_is_refused(tokenizer: PreTrainedTokenizerBase, case: str) -> None:
    stage = make_on_policy_distill(name="taught")
    ends = [tokenizer.eos_token_id], [tokenizer.eos_token_id]
    require_same_vocabulary(stage, "x", tokenizer, copy.deepcopy(tokenizer), *ends)
    with pytest.raises(UserError, match=DIFFERENCES[case]) as error:
        require_same_vocabulary(stage, "x", tokenizer, change_tokenizer(tokenizer, case), *ends)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = chatty.chat_template.replace("<|end|>", "<|user|>")
    both = chatty.convert_tokens_to_ids(["<|end|>", "<|user|>"])
    require_same_vocabulary(stage, "x", chatty, tokenizer, both, both)
    with pytest.raises(UserError, match=r"ends with '<\|user\|>', at which student y does not"):
        require_same_vocabulary(stage, "x", chatty, tokenizer, both, ends[1])
    line = str(error.value)
    assert line.startswith('stage "taught": teacher x and student y have not the same vocabulary: ')
    assert "by a distill stage" in line
    assert "\n" not in line
