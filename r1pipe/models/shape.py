"""Sizes of a model from its config alone: parameters, activations, caches, operations."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from r1pipe.config.adapter import Adapter
from r1pipe.models.adapter import add_adapter, describe
from r1pipe.models.model import find_layers
from r1pipe.models.mtp import has_mtp_layer, pick_class

GIB = 2**30
MASTER = 4
"""Bytes of a parameter, of its gradient, and of each of AdamW's two moments: float32."""
NORM_BYTES = {4: 12, 2: 8}
"""Bytes per entry of a norm in transformers, by those of the residual stream: the input in float32,
its square, and the scaled output in the stream's dtype."""
_shapes: dict[str, "Shape"] = {}
_adapter_shapes: dict[str, "AdapterShape"] = {}


@dataclass(frozen=True)
class Shape:
    """Numbers of parameters, and the config that the formulas read."""

    parameters: int
    largest: int
    """Parameters of the largest tensor."""
    largest_layer: int
    outside_layers: int
    """Embedding, last norm and head."""
    matrices: int
    """Weights that multiply every token: without embedding, head and routed experts."""
    experts: int
    """Weights of all routed experts' matrices."""
    config: PretrainedConfig

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Shape":
        """Built once per config: disk, memory and stage ask for the same one."""
        key = config.to_json_string()
        if key not in _shapes:
            _shapes[key] = cls._measure(config)
        return _shapes[key]

    @classmethod
    def _measure(cls, config: PretrainedConfig) -> "Shape":
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = pick_class(config).from_config(config)
        layers = [
            sum(parameter.numel() for parameter in layer.parameters())
            for layer in find_layers(model)
        ]
        sizes = [parameter.numel() for parameter in model.parameters()]
        outside = sum(sizes) - sum(layers)
        text = config.get_text_config()
        return cls(sum(sizes), max(sizes), max(layers), outside, *count_matrices(model), text)

    @property
    def main(self) -> "Shape":
        """Without the prediction layer."""
        if not has_mtp_layer(self.config):
            return self
        config = copy.deepcopy(self.config)
        config.num_mtp_layers = 0
        return Shape.of(config)

    def get(self, *names: str, default: Any = 0) -> Any:
        """The first of the config's keys that is set."""
        values = (getattr(self.config, name, None) for name in names)
        return next((value for value in values if value is not None), default)

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def num_moe_layers(self) -> int:
        if not self.num_experts():
            return 0
        count = self.num_layers - self.get("first_k_dense_replace")
        return count + has_mtp_layer(self.config)

    def gathered_layer(self, expert_parallel: int) -> float:
        """Parameters of the largest layer that a rank of a sharded run has whole: its part of the
        experts."""
        experts = self.experts / max(1, self.num_moe_layers)
        return self.largest_layer - experts * (1 - 1 / expert_parallel)

    def head_sizes(self) -> tuple[int, int, int]:
        """Sizes of a token's queries, keys and values, over all heads."""
        heads = self.config.num_attention_heads
        if self.get("kv_lora_rank"):  # MLA: every head has its own keys and values
            key = self.get("qk_nope_head_dim") + self.get("qk_rope_head_dim")
            return heads * key, heads * key, heads * self.get("v_head_dim")
        size = self.get("head_dim") or self.config.hidden_size // heads
        groups = self.get("num_key_value_heads", default=heads)
        return heads * size, groups * size, groups * size

    def kv_bytes_per_token(self, element: int, tensor_parallel_size: int) -> float:
        """On each of the engine's devices: heads are shared out, a head is not split."""
        _, keys, values = self.head_sizes()
        parts = min(tensor_parallel_size, self.groups())
        if self.get("kv_lora_rank"):  # MLA caches one latent for all heads
            keys, values, parts = self.config.kv_lora_rank, self.get("qk_rope_head_dim"), 1
        return self.num_layers * (keys + values) * element / parts

    def layer_activations(self, element: int, is_moe: bool) -> float:
        """What autograd keeps of one layer's forward, bytes per token; matrix products and the
        residual stream have `element` bytes a number, norms compute in float32."""
        hidden = self.config.hidden_size
        queries, keys, values = self.head_sizes()
        normed = 2 * hidden
        attention = 2 * hidden + 2 * (queries + keys) + values + self.config.num_attention_heads
        if self.get("kv_lora_rank"):
            normed += self.config.kv_lora_rank + (self.get("q_lora_rank") or 0)
        elif "qwen3" in self.config.model_type:
            normed += queries + keys
        attention += self.config.num_attention_heads * (values // max(1, self.groups()))
        if not is_moe:
            dense = 4 * self.get("intermediate_size", "ffn_dim", "n_inner", default=4 * hidden)
            return NORM_BYTES[element] * normed + element * (attention + dense)
        width = self.get("moe_intermediate_size", "intermediate_size")
        shared = self.get("n_shared_experts") * width + self.get("shared_expert_intermediate_size")
        experts = self.num_chosen() * (2 * hidden + 5 * width) + 4 * shared + self.num_experts()
        return NORM_BYTES[element] * normed + element * (attention + experts)

    def groups(self) -> int:
        heads = self.config.num_attention_heads
        return heads if self.get("kv_lora_rank") else self.get("num_key_value_heads", default=heads)

    def num_experts(self) -> int:
        return self.get("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")

    def num_chosen(self) -> int:
        """Routed experts that compute a token."""
        return self.get("num_experts_per_tok", "top_k", "moe_topk", default=1)

    def active(self) -> float:
        """Weights that multiply a token before the head, of the routed experts those chosen."""
        return self.matrices + self.experts * self.num_chosen() / max(1, self.num_experts())

    def windows(self) -> list[int | None]:
        """The most tokens that each layer's attention sees, in a sliding window or selected; None
        where it sees everything before."""
        window = self.get("sliding_window", default=None)
        kinds = self.get("layer_types") or ["sliding_attention"] * self.num_layers
        limits = {"sliding_attention": window}
        limits["deepseek_sparse_attention"] = self.get("index_topk", default=None)
        return [limits.get(kind) for kind in kinds]

    def activations(
        self, num_tokens: int, element: int, checkpointing: bool, *, predicting: bool = False
    ) -> float:
        """What autograd keeps of a forward pass in numbers of `element` bytes; `predicting`: with
        that of the prediction layer."""
        num_dense = self.get("first_k_dense_replace") if self.num_experts() else self.num_layers
        dense = self.layer_activations(element, is_moe=False)
        moe = self.layer_activations(element, is_moe=True) if self.num_experts() else 0
        hidden = self.config.hidden_size
        if checkpointing:
            # Each layer's input, and all of the one layer that is computed again.
            inputs = element * hidden * (self.num_layers + 2 * predicting)
            return num_tokens * (inputs + max(dense, moe))
        # Two states into one, behind a norm each; another norm at the end.
        second = predicting * (moe + hidden * (3 * NORM_BYTES[element] + 4 * element))
        return num_tokens * (num_dense * dense + (self.num_layers - num_dense) * moe + second)


def count_matrices(model: PreTrainedModel) -> tuple[int, int]:
    """`matrices` and `experts` of a Shape."""
    head, matrices, experts = model.get_output_embeddings(), 0, 0
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) or module is head:
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.ndim > 2 or ".experts." in name:
                experts += parameter.numel() * (not name.endswith("bias"))
            elif parameter.ndim == 2:
                matrices += parameter.numel()
    return matrices, experts


@dataclass(frozen=True)
class AdapterShape:
    """Of an adapter: numbers of its parameters, and of weights that are there merged meanwhile."""

    parameters: int
    merged: int
    """Of all adapted experts."""
    merged_layer: int
    """Of one layer's."""

    @classmethod
    def of(cls, config: PretrainedConfig, settings: Adapter) -> "AdapterShape":
        """Built once per config and settings. Raises UserError for an unknown target."""
        key = config.to_json_string() + settings.model_dump_json()
        if key not in _adapter_shapes:
            _adapter_shapes[key] = cls._measure(config, settings)
        return _adapter_shapes[key]

    @classmethod
    def _measure(cls, config: PretrainedConfig, settings: Adapter) -> "AdapterShape":
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config)
            targets = add_adapter(model, settings).targets
        by_module: dict[str, int] = {}
        for target in targets:
            weight = model.get_parameter(f"{target.path}.{target.name}")
            if weight.ndim == 3:
                by_module[target.path] = by_module.get(target.path, 0) + weight.numel()
        count = describe(model)["adapter_parameters"]
        return cls(count, sum(by_module.values()), max(by_module.values(), default=0))
