"""What two ranks send, counted, beside the estimate: FSDP alone, and experts in groups."""

import json
from pathlib import Path

import pytest
import yaml
from commands import ROOT
from grpo_settings import make_grpo
from test_distributed import run_on_ranks
from transformers import PreTrainedTokenizerBase

from r1pipe.doctor.traffic import estimate_traffic
from r1pipe.models.model import build_model
from r1pipe.models.shape import Shape
from r1pipe.models.weights import save_checkpoint

DEMO = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())["stages"][0]["model"]
DEEPER = DEMO | {"num_hidden_layers": 3, "n_shared_experts": 1}
"""More of it is in routed experts, which groups need not gather."""


@pytest.mark.slow
def test_bytes_sent(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The demo's model, deeper, in float32: weights twice, gradients once; or rows of tokens."""
    (tmp_path / "start").mkdir()
    model = build_model(DEEPER, tokenizer, 0)
    save_checkpoint(model, tokenizer, tmp_path / "start")
    result = run_on_ranks("traffic_of_ranks.py", tmp_path, 256)
    assert result.returncode == 0, result.stderr[-4000:]
    sent = json.loads((tmp_path / "sent.json").read_text())
    for groups in (1, 2):
        settings = make_grpo(expert_parallel=groups)
        expected = estimate_traffic(Shape.of(model.config), 2, 256, 4, settings)
        assert sent[str(groups)] == pytest.approx(expected, rel=0.05)
    assert sent["1"] > 1.3 * sent["2"]
