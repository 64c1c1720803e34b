"""Why expert and sequence parallelism are our own: what the implementations that others keep do on
two ranks. A test that fails here may mean that one of them will do now."""

import json

import pytest
from test_distributed import run_on_ranks
from tiny_models import MODELS
from transformers import PreTrainedTokenizerBase

from r1pipe.models.model import build_model
from r1pipe.models.weights import save_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "moe").mkdir()
    model = build_model(MODELS["deepseek_v3"], tokenizer, 0)
    save_checkpoint(model, tokenizer, folder / "moe")
    result = run_on_ranks("kept_implementations.py", folder)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


def test_transformers_expert_parallelism_beside_fsdp(results: list[dict]) -> None:
    """Left out without a word: every rank has all four experts, sharded by FSDP alone."""
    assert [rank["beside_fsdp"] for rank in results] == [{"experts": 4, "dimensions": 1}] * 2


def test_transformers_expert_parallelism_alone(results: list[dict]) -> None:
    """Right if all ranks have the same tokens, and no loop over experts computes them."""
    assert all(rank["same_tokens"] < 1e-5 for rank in results)
    assert all(rank["own_tokens"] > 0.01 for rank in results)
    assert all("Class values must be smaller than num_classes" in r["eager"] for r in results)


def test_torch_context_parallelism(results: list[dict]) -> None:
    """Only for three CUDA kernels: on a CPU the attention stays within each rank's tokens."""
    assert all(rank["ring"] > 0.1 for rank in results)
