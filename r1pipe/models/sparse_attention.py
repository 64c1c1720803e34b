"""DeepSeek Sparse Attention (DeepSeek-V3.2, arXiv:2512.02556, section 2.1) in packed rows, and what
its lightning indexer learns.

- The indexer scores every earlier token for each token (eq. 1); attention sees the `index_topk` of
  the highest scores (eq. 2). transformers masks a dense matrix by them; here their latents are
  gathered, which all heads share (MLA as MQA, appendix A). The indexer alone is still O(L²).
- transformers scores without a gradient; here scores are computed once more, for the indexer's
  loss: the KL from the attention's distribution, averaged over heads, to the softmax of the scores,
  over all earlier tokens (eq. 3) or the selected ones (eq. 4). Nothing else gets its gradient.

As transformers does, and eq. 1 does not say: scores are divided by the root of the head's size and
weights by that of the number of heads, keys pass a LayerNorm, and the first qk_rope_head_dim
numbers are rotated in halves (attention's own in neighbouring pairs). DeepSeek's and vLLM's
indexers compute in FP8 behind a Hadamard transform, which changes no product.

Of equal scores the earlier token is selected: behind the ReLU many are exactly 0.

Shape suffixes: N tokens of a packed row; L of a sequence; Q queries of a chunk; K keys that they
see; H heads; S latent and rotary part of a key; R the latent; G heads of the indexer; E their size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as deepseek

from r1pipe.models.expert_load import AddLoss
from r1pipe.utils import distributed
from r1pipe.utils.errors import UserError

MAX_NUMBERS = 2**22
"""Of the largest tensor of a chunk of queries."""


def has_indexer(config: PretrainedConfig) -> bool:
    return config.model_type == "deepseek_v32"


def require_indexer(config: PretrainedConfig) -> None:
    """Raises UserError for a model that has none."""
    if not has_indexer(config):
        raise UserError(
            f"indexer: the {config.model_type} has none: init makes a deepseek_v32 with one"
        )


def attend_sparsely(model: PreTrainedModel) -> None:
    """Make a deepseek_v32 attend by `attend`. Names stay."""
    for module in find_attentions(model):
        module.indexer_training = getattr(module, "indexer_training", None)
        # A bound method: in a copy of the model it is bound to the copy.
        module.forward = MethodType(attend, module)


def find_attentions(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, deepseek.DeepseekV32Attention)]


class IndexerTraining:
    """The indexers' loss, added to whatever the model's output is trained on.

    Wrap each forward and backward that counts in `counting`, call `average_gradient` before each
    optimizer step and `metrics` for a line of the log. `dense`: attention sees all earlier tokens.
    """

    def __init__(self, model: PreTrainedModel, *, dense: bool):
        self.dense = dense
        self.is_counting = False
        attentions = find_attentions(model)
        self.parameters = [p for module in attentions for p in module.indexer.parameters()]
        for module in attentions:
            module.indexer_training = self
        # Overwritten by layer, not summed: checkpointing runs a forward twice.
        self._layers: dict[int, Tensor] = {}
        self._num_tokens = 0
        self._sums: dict[str, float] = {}

    @contextmanager
    def counting(self, lengths: list[int]) -> Iterator[None]:
        """`lengths`: tokens of each sequence in the batch."""
        self.is_counting = True
        try:
            yield
        finally:
            self.is_counting = False
            if self._layers:
                divergence, coverage = torch.stack([*self._layers.values()]).mean(0).tolist()
                self._num_tokens += sum(lengths)
                new = {
                    "kl": divergence,
                    "coverage": coverage,
                    "tokens": sum(lengths),
                    "sequences": len(lengths),
                }
                self._sums = {name: self._sums.get(name, 0) + new[name] for name in new}
            self._layers = {}

    def add_loss(self, output: Tensor, layer: int, divergence: Tensor, coverage: Tensor) -> Tensor:
        """The layer's output, with the gradient of its KL, summed over tokens; outside `counting`
        with one of 0, so that every rank of a sharded model has one."""
        self._layers[layer] = torch.stack([divergence.detach(), coverage])
        return AddLoss.apply(output, divergence * float(self.is_counting))

    def average_gradient(self) -> None:
        """Over the tokens of all ranks since the last call: the loss is a mean over tokens, a sum
        over layers."""
        count = distributed.sum_counts({"tokens": self._num_tokens})["tokens"]
        self._num_tokens = 0
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(max(1, count))

    def metrics(self) -> dict[str, float]:
        """Since the last call, means over layers: KL a token in nats; and of the attention that the
        last token of a sequence would pay to all before it, the share that the selected ones get.
        Over all ranks, which must all call it."""
        sums = distributed.sum_counts(self._sums)
        self._sums = {}
        if not sums:
            return {}
        return {
            "indexer/kl": sums["kl"] / sums["tokens"],
            "indexer/coverage": sums["coverage"] / sums["sequences"],
        }


class Index(NamedTuple):
    """What the indexer makes of each token."""

    query_NGE: Tensor
    weight_NG: Tensor
    key_NE: Tensor

    def cut(self, start: int, stop: int) -> "Index":
        return Index(*(states[start:stop] for states in self))


def index(
    indexer: deepseek.DeepseekV32Indexer,
    hidden_1ND: Tensor,
    query_latent: Tensor,
    rotary: tuple[Tensor, Tensor],
) -> Index:
    """`query_latent`: `[1, N, q_lora_rank]`, of attention's own queries."""
    size = indexer.qk_rope_head_dim
    query = indexer.wq_b(query_latent).unflatten(-1, (indexer.n_heads, indexer.head_dim))
    key = indexer.k_norm(indexer.wk(hidden_1ND)).unsqueeze(2)
    rotated = deepseek.apply_rotary_pos_emb(
        query[..., :size], key[..., :size], *rotary, unsqueeze_dim=2
    )
    query, key = (torch.cat([new, old[..., size:]], -1) for new, old in zip(rotated, (query, key)))
    weights = indexer.weights_proj(hidden_1ND.to(indexer.weights_proj.weight.dtype))
    return Index(query[0], weights[0].float() * indexer.n_heads**-0.5, key[0, :, 0])


def score(query_QGE: Tensor, weight_QG: Tensor, key: Tensor) -> Tensor:
    """Index scores `[Q, K]` (eq. 1), in float32. `key`: `[K, E]`, or `[Q, K, E]`, each query's."""
    scores_QGK = (query_QGE.float() @ key.float().mT) * query_QGE.shape[-1] ** -0.5
    return (weight_QG.unsqueeze(1) @ scores_QGK.relu()).squeeze(1)


@torch.no_grad()
def select(scores_QK: Tensor, count: int) -> Tensor:
    """Places of the `count` highest scores, rising, of equal ones the first: `[Q, count]`. NaN
    counts as low, so that a diverging model gets as far as its loss."""
    scores_QK = scores_QK.nan_to_num(nan=torch.finfo(scores_QK.dtype).min, neginf=-torch.inf)
    least_Q1 = scores_QK.topk(count).values[:, -1:]
    selected_QK = scores_QK >= least_Q1
    if selected_QK.count_nonzero() > count * len(scores_QK):
        above_QK, equal_QK = scores_QK > least_Q1, scores_QK == least_Q1
        room_Q1 = count - above_QK.sum(-1, keepdim=True)
        selected_QK = above_QK | (equal_QK & (equal_QK.cumsum(-1) <= room_Q1))
    return selected_QK.nonzero()[:, 1].unflatten(0, (-1, count)).int()


def find_future(start: int, stop: int, device: torch.device) -> Tensor:
    """True where a token would see a later one: `[stop - start, stop]`."""
    places = torch.arange(stop, device=device)
    return places > places[start:].unsqueeze(1)


def attend(
    self: deepseek.DeepseekV32Attention,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: None = None,
    *,
    sequence_lengths: list[int],
    **arguments: Any,
) -> tuple[Tensor, None]:
    """DeepseekV32Attention's forward for a packed row: `[1, N, D]`, each sequence by itself."""
    query_latent = self.q_a_layernorm(self.q_a_proj(hidden_states))
    query = self.q_b_proj(query_latent).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
    plain, rotary = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
    sizes = [self.kv_lora_rank, self.qk_rope_head_dim]
    latent, key_rotary = self.kv_a_proj_with_mqa(hidden_states).split(sizes, -1)
    latent = self.kv_a_layernorm(latent)
    rotary, key_rotary = deepseek.apply_rotary_pos_emb_interleave(
        rotary, key_rotary.unsqueeze(1), *position_embeddings
    )
    training = self.indexer_training
    learns = training is not None and torch.is_grad_enabled()
    is_dense = training is not None and training.dense
    if not learns and (is_dense or max(sequence_lengths) <= self.config.index_topk):
        key, value = self.expand_kv(latent.unsqueeze(1), key_rotary)
        run = AttentionInterface()[self.config._attn_implementation]
        states = (torch.cat([plain, rotary], -1), key, value, None)
        arguments |= {"sequence_lengths": sequence_lengths, "scaling": self.scaling}
        output, _ = run(self, *states, **arguments)
        return self.o_proj(output.flatten(2)), None

    # By the identity: kv_b_proj may have an adapter.
    unit_RR = torch.eye(self.kv_lora_rank, dtype=latent.dtype, device=latent.device)
    up_RHX = self.kv_b_proj(unit_RR).unflatten(-1, (self.num_heads, -1))
    to_key, to_value = up_RHX.split([self.qk_nope_head_dim, self.v_head_dim], -1)
    query_HNS = torch.cat([torch.einsum("hnp,rhp->hnr", plain[0], to_key), rotary[0]], -1)
    query_NHS = query_HNS.transpose(0, 1) * self.scaling
    key_NS = torch.cat([latent[0], key_rotary[0, 0]], -1)
    with torch.set_grad_enabled(learns):
        states = (hidden_states.detach(), query_latent.detach())
        row = index(self.indexer, *states, position_embeddings)

    count = None if is_dense else self.config.index_topk
    outputs, divergence, coverage = [], key_NS.new_zeros((), dtype=torch.float32), 0.0
    start = 0
    for length in sequence_lengths:
        part, own = slice(start, start + length), row.cut(start, start + length)
        output, loss = attend_sequence(
            query_NHS[part], key_NS[part], own, count, self.kv_lora_rank, learns
        )
        outputs.append(output)
        if learns:
            divergence = divergence + loss
            seen = (query_NHS[part], key_NS[part], own, self.config.index_topk)
            coverage = coverage + measure_coverage(*seen)
        start += length
    output_NHV = torch.einsum("nhr,rhv->nhv", torch.cat(outputs), to_value)
    output_1ND = self.o_proj(output_NHV.flatten(1).unsqueeze(0))
    if learns:
        output_1ND = training.add_loss(output_1ND, self.layer_idx, divergence, coverage)
    return output_1ND, None


def attend_sequence(
    query_LHS: Tensor, key_LS: Tensor, own: Index, count: int | None, rank: int, learns: bool
) -> tuple[Tensor, Tensor]:
    """A sequence's output in the latent, `[L, H, R]`, and its indexer's KL, a sum over tokens.
    `count`: selected keys; None: all. In chunks of queries, computed again in backward."""
    length, num_heads, size = query_LHS.shape
    # The first `count` tokens see all before them.
    num_dense = length if count is None else min(length, count)
    chunks: list[tuple[int, int, Tensor | None]] = []
    rows = max(1, MAX_NUMBERS // (num_dense * max(num_heads, own.weight_NG.shape[1])))
    chunks += [(n, min(n + rows, num_dense), None) for n in range(0, num_dense, rows)]
    if count is not None and length > count:
        rows = max(1, MAX_NUMBERS // max(count * size, length * own.weight_NG.shape[1]))
        for begin in range(count, length, rows):
            end = min(begin + rows, length)
            chunks.append((begin, end, select_keys(own, begin, end, count)))
    outputs, divergences = [], []
    for begin, end, places_QK in chunks:
        query = own.cut(begin, end)
        arguments = (
            *(query_LHS[begin:end], key_LS[:end], query.query_NGE, query.weight_NG),
            *(own.key_NE[:end], places_QK, rank, learns),
        )
        if torch.is_grad_enabled() and len(chunks) > 1:
            output, divergence = checkpoint(attend_chunk, *arguments, use_reentrant=False)
        else:
            output, divergence = attend_chunk(*arguments)
        outputs.append(output)
        divergences.append(divergence)
    return torch.cat(outputs), torch.stack(divergences).sum()


@torch.no_grad()
def select_keys(own: Index, begin: int, end: int, count: int) -> Tensor:
    """For the queries from `begin` to `end` of a sequence, which have more than `count` keys."""
    queries = own.cut(begin, end)
    scores_QK = score(queries.query_NGE, queries.weight_NG, own.key_NE[:end])
    future_QK = find_future(begin, end, scores_QK.device)
    return select(scores_QK.masked_fill(future_QK, -torch.inf), count)


def attend_chunk(
    query_QHS: Tensor,
    key_KS: Tensor,
    index_query_QGE: Tensor,
    weight_QG: Tensor,
    index_key_KE: Tensor,
    places_QK: Tensor | None,
    rank: int,
    learns: bool,
) -> tuple[Tensor, Tensor]:
    """Output in the latent `[Q, H, R]`, and the indexer's KL, a sum over the queries: the last Q of
    the K tokens. They see the keys in `places_QK`; None: all up to their own."""
    keys, index_keys, future_QK = key_KS, index_key_KE, None
    if places_QK is None:
        future_QK = find_future(len(key_KS) - len(query_QHS), len(key_KS), key_KS.device)
    else:
        # Unlike indexing, its gradient adds up in one order, on any number of threads.
        keys, index_keys = embedding(places_QK, key_KS), embedding(places_QK, index_key_KE)
    logits_QHK = (query_QHS @ keys.mT).float()
    if future_QK is not None:
        logits_QHK = logits_QHK.masked_fill(future_QK.unsqueeze(1), -torch.inf)
    probs_QHK = logits_QHK.softmax(-1)
    output_QHR = probs_QHK.to(keys.dtype) @ keys[..., :rank]
    if not learns:
        return output_QHR, output_QHR.new_zeros((), dtype=torch.float32)
    scores_QK = score(index_query_QGE, weight_QG, index_keys)
    return output_QHR, measure_divergence(probs_QHK.detach().mean(1), scores_QK, future_QK)


def measure_divergence(probs_QK: Tensor, scores_QK: Tensor, future_QK: Tensor | None) -> Tensor:
    """Sum over queries of KL(probs, softmax of the scores) (eq. 3 and 4), nats."""
    if future_QK is not None:
        scores_QK = scores_QK.masked_fill(future_QK, -torch.inf)
    logprobs_QK = scores_QK.log_softmax(-1)
    if future_QK is not None:
        logprobs_QK = logprobs_QK.masked_fill(future_QK, 0.0)  # 0 times -inf is none
    return (torch.special.xlogy(probs_QK, probs_QK) - probs_QK * logprobs_QK).sum()


@torch.no_grad()
def measure_coverage(query_LHS: Tensor, key_LS: Tensor, own: Index, count: int) -> Tensor:
    """Share of the attention of the last token to all tokens that the selected ones get."""
    probs_L = (query_LHS[-1] @ key_LS.mT).float().softmax(-1).mean(0)
    length = len(key_LS)
    if length <= count:
        return probs_L.sum()
    return probs_L[select_keys(own, length - 1, length, count)[0]].sum()
