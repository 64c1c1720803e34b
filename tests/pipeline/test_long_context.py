"""YaRN: sampler and trainer agree beyond the original context, with real vLLM; and where their
tables of rotations differ, the model is refused."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_engine import ARCHITECTURES, LIMIT, SAMPLING, SETTINGS, lengthen, logprob_diff
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from r1pipe.config.base import ProblemSet
from r1pipe.data.problems import load_problems
from r1pipe.models.model import build_model, load_model
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import export_weights, save_checkpoint
from r1pipe.models.yarn import check_yarn
from r1pipe.rollout.engines import Engines
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError

CPU = torch.device("cpu")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALED = {
    # As DeepSeek-V3's config.json has it: the attention scale grows by mscale_all_dim.
    "deepseek_v3": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 8, "beta_slow": 1},
    "qwen3": {**YARN, "attention_factor": 1.3, "truncate": False},
}


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    rows = load_problems(ProblemSet(recipe="arithmetic", options={"size": 4}))
    return [lengthen(row, 6) for row in rows]


@pytest.fixture(scope="module")
def tokenizer(problems: list[Problem]) -> object:
    return build_tokenizer((f"{p.question}\n{p.solution}" for p in problems), 400)


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    engines = Engines(SETTINGS, "float32", CPU)
    yield engines
    engines.close()


@pytest.mark.parametrize("name", SCALED)
def test_sampler_is_trainer_beyond_the_original_context(
    name: str, engines: Engines, tokenizer: object, problems: list[Problem], tmp_path: Path
) -> None:
    """Also after a weight sync, with the older keys in config.json, and not without YaRN."""
    known = {**ARCHITECTURES, "qwen3": ARCHITECTURES["qwen3, tied"]}[name]
    plain = {**known, "initializer_range": 0.1, "max_position_embeddings": 256}
    model = build_model({**plain, "rope_parameters": SCALED[name]}, tokenizer, 0)
    save_checkpoint(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    scaling["type"] = scaling.pop("rope_type")
    (tmp_path / "config.json").write_text(json.dumps(config))
    trained = load_model(str(tmp_path), CPU)
    sampler = engines.open(str(tmp_path))
    for _ in range(2):
        rollouts = sampler.generate(problems, 2, SAMPLING, (0,))
        assert min(len(r.prompt_ids) for r in rollouts) > 100
        assert logprob_diff(trained, rollouts) < LIMIT
        sampler.load_weights(export_weights(trained))
    unscaled = build_model(plain, tokenizer, 0)
    unscaled.load_state_dict(model.state_dict())
    assert logprob_diff(unscaled, rollouts) > 100 * LIMIT


@pytest.mark.parametrize("rest", [{}, {"attention_factor": 1.0}, {"attention_factor": 1.5}])
@pytest.mark.parametrize("truncate", [{}, {"truncate": True}, {"truncate": False}])
@pytest.mark.parametrize("high", [None, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("low", [None, 0.0, 0.7, 1.0])
def test_mla_is_refused_where_the_tables_differ(
    low: float | None, high: float | None, truncate: dict, rest: dict
) -> None:
    """vLLM's MLA has a class of its own for YaRN, and takes the keys as DeepSeek's code did."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    given = {k: v for k, v in {"mscale": low, "mscale_all_dim": high}.items() if v is not None}
    config = AutoConfig.for_model(
        "deepseek_v3",
        max_position_embeddings=4096,
        rope_parameters={**YARN, **given, **truncate, **rest, "factor": 64.0},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, CPU)
    angles = torch.arange(4096).float().unsqueeze(1) * frequencies
    expected = torch.cat([angles.cos(), angles.sin()], -1) * factor
    # DeepseekV2Attention chooses so, and scales its scores with the first only.
    is_own = rest.get("attention_factor") != 1.0
    kind = "deepseek_yarn" if is_own else "deepseek_llama_scaling"
    scaling = copy.deepcopy(config.rope_parameters) | {"rope_type": kind}
    with set_current_vllm_config(VllmConfig()):
        table = get_rope(64, 4096, is_neox_style=False, rope_parameters=scaling).cos_sin_cache
    same = torch.allclose(table.float(), expected, atol=1e-3) and (is_own or not high)
    try:
        check_yarn("m", config, 4096)
    except UserError:
        assert not same or rest == {"attention_factor": 1.0}
    else:
        assert same
