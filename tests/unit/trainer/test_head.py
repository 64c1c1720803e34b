"""The head on a GPU: what is fused there gives what the CPU's operations give."""

from collections import Counter

import pytest
import torch
from tiny_models import MODELS
from torch._dynamo.exc import TorchDynamoException
from torch.nn.functional import linear
from transformers import PreTrainedTokenizerBase

from r1pipe.models.model import build_model
from r1pipe.trainer import head
from r1pipe.trainer.head import Head, chunk_sizes, differentiate_logits, reduce_logits
from r1pipe.trainer.packing import Sample, pack
from r1pipe.trainer.policy import Policy

NUM_TOKENS, VOCAB, SIZE = 40, 301, 16


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions as written, in chunks of 9 tokens."""
    monkeypatch.setattr(head, "compiled", lambda function: function)
    monkeypatch.setitem(head.MAX_LOGITS, "cpu", 9 * VOCAB)


def make_module(dtype: torch.dtype, bias: bool) -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(SIZE, VOCAB, bias=bias, dtype=dtype)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_and_gradients_are_those_of_log_softmax(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    hidden_CD = torch.randn(NUM_TOKENS, SIZE).to(dtype).mul(3).requires_grad_()
    target_C = torch.randint(VOCAB, (NUM_TOKENS,))
    weight_C = torch.randn(NUM_TOKENS)
    module, fused = make_module(dtype, bias), make_module(dtype, bias)
    all_CV = (linear(hidden_CD, module.weight, module.bias).float() / 0.7).log_softmax(-1)
    target_C[::5] = all_CV[::5].argmax(-1)
    expected_C = all_CV.gather(1, target_C.unsqueeze(1)).squeeze(1)
    entropy_C = torch.special.entr(all_CV.exp()).sum(-1)
    (wanted,) = torch.autograd.grad((expected_C * weight_C).sum(), hidden_CD, retain_graph=True)
    (expected_C * weight_C).sum().backward()

    own_C, own_entropy_C, is_likeliest_C = Head(fused).score(hidden_CD, target_C, 0.7)
    assert not own_entropy_C.requires_grad
    assert torch.equal(is_likeliest_C, all_CV.argmax(-1) == target_C)
    (found,) = torch.autograd.grad((own_C * weight_C).sum(), hidden_CD, retain_graph=True)
    own_C, *_ = Head(fused).score(hidden_CD, target_C, 0.7)
    (own_C * weight_C).sum().backward()
    torch.testing.assert_close(own_C, expected_C, atol=1e-5, rtol=0)
    torch.testing.assert_close(own_entropy_C, entropy_C, atol=1e-5, rtol=0)
    error = 1e-6 if dtype == torch.float32 else 0.01
    pairs = [(found, wanted), *((p.grad, q.grad) for p, q in zip(*map(params, (fused, module))))]
    for one, other in pairs:
        assert float((one - other).float().norm()) <= error * float(other.float().norm())


def params(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return list(module.parameters())


def test_a_logit_of_minus_infinity_has_no_weight() -> None:
    logits_CV = torch.tensor([[1.0, -torch.inf, 1.0]])
    logprob_C, entropy_C, *_ = reduce_logits(logits_CV, torch.tensor([2]), 1.0)
    torch.testing.assert_close(entropy_C, torch.tensor(2.0).log().unsqueeze(0))
    torch.testing.assert_close(logprob_C, -entropy_C)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_a_policy_scores_as_by_the_separate_operations(
    tokenizer: PreTrainedTokenizerBase,
    samples: list[Sample],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gradients of all weights too, with a tied head and without."""
    model = build_model(MODELS[name], tokenizer, seed=0)
    batch = pack(samples, torch.device("cpu"))
    results = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(Head, "fuses_on", devices)
        model.zero_grad()
        scores = Policy(model)(batch, 0.7)
        scores.logprobs_C.square().sum().backward()
        assert ("ScoreTokens" in str(scores.logprobs_C.grad_fn.next_functions)) == bool(devices)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([scores.logprobs_C.detach(), scores.entropy_C, *gradients])
    for expected, found in zip(*results, strict=True):
        scale = float(expected.abs().max()) + 1e-3
        assert float((found - expected).abs().max()) < 1e-4 * scale


def test_the_functions_are_one_graph_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile makes of them but for the kernels, which need a compiler."""
    # An engine of another test in this process has switched it off.
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    calls = Counter()

    def count(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        calls["graphs"] += 1
        return graph

    functions = [
        torch.compile(f, dynamic=True, fullgraph=True, backend=count)
        for f in (reduce_logits, differentiate_logits)
    ]
    torch.manual_seed(0)
    for num_tokens, temperature in ((7, 1.0), (3, 1.0), (5, 0.6)):
        logits_CV, target_C = torch.randn(num_tokens, 11).bfloat16(), torch.arange(num_tokens)
        expected = reduce_logits(logits_CV, target_C, temperature)
        columns = (logits_CV, target_C, expected[2], torch.randn(num_tokens), temperature)
        with torch.compiler.set_stance("default"):
            found = functions[0](logits_CV, target_C, temperature)
            gradient = functions[1](*columns)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient, differentiate_logits(*columns))
    assert calls["graphs"] == 2


def test_without_a_compiler_it_is_slower_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise TorchDynamoException("no compiler is here")

    monkeypatch.setattr(Head, "fuses_on", ("cpu",))
    monkeypatch.setattr(head, "compiled", lambda function: fail)
    monkeypatch.setattr(head, "_uncompilable", set())
    monkeypatch.setattr(head, "SLICE", 2 * VOCAB)
    logits_CV, target_C = torch.randn(NUM_TOKENS, VOCAB), torch.arange(NUM_TOKENS)
    for _ in range(2):
        found = head.run(reduce_logits, logits_CV, target_C, 0.7)
        torch.testing.assert_close(found, reduce_logits(logits_CV, target_C, 0.7))
    assert capsys.readouterr().err.count("no compiler is here") == 1


def test_a_gpu_gets_larger_chunks() -> None:
    """Of a vocabulary of 152k; 220 tokens are too few to keep one busy."""
    assert chunk_sizes(2000, 152_064, torch.device("cpu"))[0] == 220
    assert chunk_sizes(2000, 152_064, torch.device("cuda"))[0] == 882
    assert chunk_sizes(2000, 152_064, torch.device("cuda"), factor=2)[0] == 1765
