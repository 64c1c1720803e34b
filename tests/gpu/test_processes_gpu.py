"""Sharding over NCCL and padding-free attention by flash-attention. None of it has run yet: no
machine with two GPUs, or one with flash-attn, was at hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from r1pipe.trainer.packing import Sample, pack
from r1pipe.trainer.policy import Policy
from r1pipe.types import Rollout
from r1pipe.utils.jsonl import read_jsonl

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit" / "trainer"))

from test_distributed import FLOAT32, compare_with_one_process, run_cases  # noqa: E402

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
pytestmark = pytest.mark.gpu

QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
}


@two_gpus
def test_fsdp2_on_cuda_gives_the_losses_of_one_process(tmp_path: Path) -> None:
    """Against one process on CPU: the kernels differ, so the tolerance is wider than there."""
    folder, cases = run_cases(tmp_path, "cuda")
    for name in FLOAT32:
        results = json.loads((folder / f"{name}.json").read_text())
        assert all(result["all_sharded"] for result in results)
        compare_with_one_process(folder, name, cases[name], tolerance=1e-3)


@two_gpus
def test_two_ranks_with_an_engine_each(tmp_path: Path) -> None:
    """The demo through the launcher; the parity gate inside it is half of the assertion."""
    pytest.importorskip("vllm")
    overrides = [
        f"runs_dir={tmp_path}",
        "device=cuda",
        "stages.sft.train.max_steps=20",
        "stages.grpo.max_steps=2",
        "stages.grpo.breaker.logprob_diff.limit=1e-3",
    ]
    options = [part for override in overrides for part in ("--set", override)]
    for stage in ("init", "sft", "grpo"):
        command = ["-m", "r1pipe.launch", "--nproc-per-node", "2", stage, "configs/demo.yaml"]
        subprocess.run([sys.executable, *command, *options], cwd=ROOT, check=True)
    rows = [row for _, row in read_jsonl(tmp_path / "demo" / "grpo" / "metrics.jsonl")]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
def test_flash_attention_packs_as_sdpa_does() -> None:
    """Log-probabilities and gradients of sequences of many lengths in one row, in bf16."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**QWEN3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda()
    samples = []
    for length in (3, 70, 129, 512, 17):
        ids = torch.randint(1000, (length + 5,)).tolist()
        logprobs = [-1.0] * length
        rollout = Rollout("", 0, ids[:5], ids[5:], logprobs, "", "stop")
        samples.append(Sample(rollout, 1.0))
    batch = pack(samples, torch.device("cuda"))
    results = []
    for implementation in ("sdpa", "flash_attention_2"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logprobs_C = Policy(model)(batch, 1.0).logprobs_C
        logprobs_C.mean().backward()
        results.append((logprobs_C.detach(), [p.grad.clone() for p in model.parameters()]))
    (by_sdpa, sdpa_gradients), (by_flash, flash_gradients) = results
    torch.testing.assert_close(by_flash, by_sdpa, atol=0.05, rtol=0.02)
    for one, other in zip(flash_gradients, sdpa_gradients):
        assert (one - other).float().norm() < 0.05 * other.float().norm() + 1e-6
