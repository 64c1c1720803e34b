"""A deepseek_v32 sampled by real vLLM up to index_topk tokens, and a recipe that goes beyond."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from commands import ROOT, run
from test_engine import ARCHITECTURES, CPU, LIMIT, SAMPLING, SETTINGS, logprob_diff
from test_faults import PROBLEMS, begin
from transformers import DeepseekV3Config, PreTrainedModel

from r1pipe.models.model import build_model, load_model
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import export_weights, save_checkpoint
from r1pipe.rollout.engine import Sampler

SPARSE = {
    **ARCHITECTURES["deepseek_v3"],
    "model_type": "deepseek_v32",
    "q_lora_rank": 48,
    "index_topk": SETTINGS.max_model_len,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[PreTrainedModel]]:
    """A checkpoint, its model and another."""
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)
    models = [build_model(SPARSE, tokenizer, seed) for seed in (0, 1)]
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(models[0], tokenizer, folder)
    return folder, models


@pytest.fixture(scope="module")
def sampler(models: tuple[Path, list]) -> Iterator[Sampler]:
    sampler = Sampler(str(models[0]), SETTINGS, "float32", CPU)
    yield sampler
    sampler.close()


def test_sampler_and_trainer_agree(models: tuple[Path, list], sampler: Sampler) -> None:
    """After a sync as well, which has the indexer's weights among the others."""
    folder, (first, second) = models
    assert logprob_diff(first, sampler.generate(PROBLEMS, 2, SAMPLING, (0,))) < LIMIT
    weights = dict(export_weights(second))
    assert "model.layers.0.self_attn.indexer.wk.weight" in weights
    sampler.load_weights(weights.items())
    rollouts = sampler.generate(PROBLEMS, 2, SAMPLING, (0,))
    assert logprob_diff(second, rollouts) < LIMIT
    second.config.index_topk = 16
    assert logprob_diff(second, rollouts) > 10 * LIMIT, "what a dense sampler is off by"
    sampler.load_checkpoint(str(folder))
    loaded = load_model(str(folder), CPU)
    assert type(loaded).__name__ == "DeepseekV32ForCausalLM"
    assert DeepseekV3Config().model_type == "deepseek_v3"
    assert logprob_diff(loaded, sampler.generate(PROBLEMS, 2, SAMPLING, (0,))) < LIMIT


def test_loop_trains_the_indexer(
    models: tuple[Path, list],
    sampler: Sampler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"indexer": {"phase": "sparse"}, "verify_sync": True}
    world, steps = begin(changes, models[0], sampler, tmp_path, monkeypatch)
    world.sync()
    found = [next(steps)[0] for _ in range(3)]
    for metrics in found:
        assert metrics["sampler/logprob_diff_mean"] < LIMIT
        assert metrics["sync/logprob_diff_mean"] < LIMIT
        assert metrics["indexer/coverage"] == pytest.approx(1)
    assert found[-1]["indexer/kl"] < found[0]["indexer/kl"]


def test_beyond_index_topk_nothing_starts(tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    random, *_ = values["stages"]
    random["model"] = {**SPARSE, "index_topk": values["engine"]["max_model_len"] - 1}
    recipe = tmp_path / "sparse.yaml"
    recipe.write_text(yaml.safe_dump({**values, "name": "sparse", "runs_dir": str(tmp_path)}))
    result = run("run", recipe)
    assert result.returncode == 2
    assert "engine.max_model_len 128: random is a deepseek_v32" in result.stderr
    assert not (tmp_path / "sparse" / "random").exists()
