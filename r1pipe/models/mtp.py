"""The prediction layer of multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): from
the hidden state at a token and the embedding of the next, it predicts the one after that.

It is the main model's further layer, number `num_hidden_layers`, which the main forward leaves out.
So its weights have the names that DeepSeek's checkpoints have and vLLM reads, and sharding,
optimizer, checkpoints and weight sync take it along. transformers' own MtpLayer nests the block,
whose weights are then called otherwise; its loader knows the layer by V3's number, 61, only.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

from r1pipe.utils.errors import UserError


class MtpLayer(deepseek.DeepseekV3DecoderLayer):
    """A decoder layer behind the projection of eq. 21. Embedding and head are the main model's."""

    def __init__(self, config: PretrainedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        size = config.hidden_size

        def make_norm() -> nn.Module:
            return deepseek.DeepseekV3RMSNorm(size, eps=config.rms_norm_eps)

        self.enorm, self.hnorm = make_norm(), make_norm()
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": make_norm()})

    def forward(self, hidden_BLD: Tensor, embeds_BLD: Tensor, **arguments: Any) -> Tensor:
        """States for the head, `[B, L, D]`, from the main model's last states and the embeddings of
        the next tokens."""
        both = torch.cat([self.enorm(embeds_BLD), self.hnorm(hidden_BLD)], -1)
        return self.shared_head["norm"](super().forward(self.eh_proj(both), **arguments))


class DeepseekV3ForCausalLM(deepseek.DeepseekV3ForCausalLM):
    """With a prediction layer. Of the same name, which is written to config.json."""

    # transformers converts the names of weights for its own classes only.
    __module__ = deepseek.__name__

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        if config.num_mtp_layers != 1:
            raise ValueError(f"num_mtp_layers is {config.num_mtp_layers}: there can be one")
        self.model.layers.append(MtpLayer(config, config.num_hidden_layers))
        self.init_weights()  # of what has none yet

    @classmethod
    def from_config(cls, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        return cls._from_config(config, **options)


def has_mtp_layer(config: PretrainedConfig) -> bool:
    return config.model_type == "deepseek_v3" and config.num_mtp_layers > 0


def pick_class(config: PretrainedConfig) -> Any:
    """What makes and loads the whole model: with the prediction layer, if the config counts one."""
    return DeepseekV3ForCausalLM if has_mtp_layer(config) else AutoModelForCausalLM


def find_mtp_layer(model: nn.Module) -> MtpLayer | None:
    return next((module for module in model.modules() if isinstance(module, MtpLayer)), None)


def require_mtp_layer(config: PretrainedConfig) -> None:
    """Raises UserError for a model that has none."""
    if not has_mtp_layer(config):
        raise UserError(
            f"mtp: the {config.model_type} has no prediction layer: init and distill make a "
            "deepseek_v3 with one, by num_mtp_layers: 1"
        )


def drop_mtp_layer(model: PreTrainedModel) -> str:
    """Returns what the names of its weights began with."""
    del model.base_model.layers[-1]
    model.config.num_mtp_layers = 0
    return f"model.layers.{model.config.num_hidden_layers}."
