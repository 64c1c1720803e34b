"""Log-probabilities of completions, never with all logits of a batch at once."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from r1pipe.models.mtp import MtpLayer, find_mtp_layer
from r1pipe.trainer.attention import attention_arguments, require_packable, use_packed_attention
from r1pipe.trainer.divergence import TeacherStates
from r1pipe.trainer.head import Head, chunk_sizes
from r1pipe.trainer.packing import PackedBatch, Support
from r1pipe.trainer.sequence_parallel import RowPart
from r1pipe.utils.errors import UserError

OWN_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Config keys of models with more than a matrix product from hidden states to logits."""


class SecondTokens(NamedTuple):
    """For a batch's C completion tokens, by the prediction layer: log-probability given the tokens
    up to the second before, and whether the token is the likeliest then. 0 and False for the second
    token of a sequence."""

    logprobs_C: Tensor
    is_likeliest_C: Tensor


class LogProbs(NamedTuple):
    """For a batch's C completion tokens: log-probability; entropy in nats, without gradient; and if
    asked for, the tokens that sampling could choose from, or the divergence from a teacher, or what
    the prediction layer says."""

    logprobs_C: Tensor
    entropy_C: Tensor
    support: Support | None = None
    divergence_C: Tensor | None = None
    second: SecondTokens | None = None


class Truncation(NamedTuple):
    """How sampling cuts the distribution, in vLLM's order: temperature, top_k, top_p."""

    top_p: float = 1.0
    top_k: int = 0

    @property
    def cuts(self) -> bool:
        return self.top_p < 1 or self.top_k > 0

    def keep(self, logits_CV: Tensor) -> Tensor:
        """True for the tokens that can be sampled: `[C, V]`."""
        if self.top_k:
            kth_C1 = logits_CV.topk(min(self.top_k, logits_CV.shape[-1])).values[:, -1:]
            logits_CV = logits_CV.masked_fill(logits_CV < kth_C1, -torch.inf)
        if self.top_p < 1:
            ordered_CV, order_CV = logits_CV.sort(dim=-1, descending=True)
            probs_CV = ordered_CV.softmax(-1)
            # A token stays if those before it do not reach top_p: the first always stays.
            kept_CV = probs_CV.cumsum(-1) - probs_CV < self.top_p
            kept_CV = torch.zeros_like(kept_CV).scatter(-1, order_CV, kept_CV)
            return kept_CV & (logits_CV > -torch.inf)
        return logits_CV > -torch.inf


class Policy(nn.Module):
    """A causal language model: packed batches in, log-probabilities out.

    One module with one forward, so that FSDP has one root.
    """

    __call__: Callable[..., LogProbs]  # what `forward` returns

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        prepare(model)
        self.model = model
        self.mtp: Literal["joint", "detached"] | None = None
        """Whether the prediction layer runs where there is a gradient, and whether its gradient
        reaches the rest of the model."""
        self.team: ProcessGroup | None = None
        """The ranks that share out a row's tokens, if there are several."""

    def forward(
        self,
        batch: PackedBatch,
        temperature: float,
        *,
        support: Support | None = None,
        truncation: Truncation | None = None,
        teacher: TeacherStates | None = None,
    ) -> LogProbs:
        """Log-probabilities at the sampling temperature; or, the only one with a gradient then,
        the divergence from a `teacher` that has read the same batch, beside them.

        Over the full vocabulary; or, renormalised, over the tokens in `support`, or over those
        that `truncation` leaves, which are then returned. The sampled token always counts as left:
        rounding may exclude it.
        """
        part = batch if self.team is None else RowPart.of(batch, self.team)
        hidden_ND = compute_hidden(self.model, part)
        if isinstance(part, RowPart):
            first = part.first
            own = self.score(hidden_ND[first.predictor_C], first.target_C, temperature)
            now = LogProbs(first.join(own.logprobs_C), first.join(own.entropy_C))
        else:
            rest = (support, truncation, teacher)
            now = self.score(hidden_ND[batch.predictor_C], batch.target_C, temperature, *rest)
        if self.mtp and torch.is_grad_enabled():
            second = self.predict_second(hidden_ND, part)
            in_sequence_C = batch.position_N[batch.predictor_C] > 0
            second = SecondTokens(
                second.logprobs_C.where(in_sequence_C, 0.0), second.is_likeliest_C & in_sequence_C
            )
            return LogProbs(*now[:-1], second)
        return now

    def predict_second(self, hidden_ND: Tensor, batch: PackedBatch | RowPart) -> SecondTokens:
        """Of the second token of a sequence: anything."""
        detached = self.mtp == "detached"
        hidden_ND = compute_mtp_hidden(self.model, batch, hidden_ND, detached=detached)
        head = Head(self.model.get_output_embeddings(), detached=detached)
        if isinstance(batch, RowPart):
            share = batch.second
            logprobs_C, is_likeliest_C = score_second_tokens(
                head, hidden_ND[share.predictor_C], share.target_C
            )
            return SecondTokens(share.join(logprobs_C), share.join(is_likeliest_C.float()) > 0)
        return score_second_tokens(head, hidden_ND[batch.predictor_of_second_C], batch.target_C)

    def score(
        self,
        hidden_CD: Tensor,
        target_C: Tensor,
        temperature: float,
        support: Support | None = None,
        truncation: Truncation | None = None,
        teacher: TeacherStates | None = None,
    ) -> LogProbs:
        head = Head(self.model.get_output_embeddings())
        whole = support is None and truncation is None and teacher is None
        if whole and hidden_CD.device.type in head.fuses_on:
            logprobs_C, entropy_C, _ = head.score(hidden_CD, target_C, temperature)
            return LogProbs(logprobs_C, entropy_C)
        score = partial(score_chunk, temperature=temperature, truncation=truncation)
        parts = map_chunks(score, head, hidden_CD, target_C, support, teacher)
        logprobs, entropies, supports, divergences = zip(*parts, strict=True)
        return LogProbs(
            torch.cat(logprobs),
            torch.cat(entropies),
            Support.join(supports, hidden_CD.device) if supports[0] else None,
            torch.cat(divergences) if teacher else None,
        )


def score_second_tokens(head: Head, hidden_CD: Tensor, target_C: Tensor) -> SecondTokens:
    if hidden_CD.device.type in head.fuses_on:
        logprobs_C, _, is_likeliest_C = head.score(hidden_CD, target_C, 1.0)
        return SecondTokens(logprobs_C, is_likeliest_C)
    parts = map_chunks(score_second, head, hidden_CD, target_C)
    return SecondTokens(*map(torch.cat, zip(*parts, strict=True)))


def map_chunks(
    function: Callable[..., tuple], head: Head, hidden_CD: Tensor, *columns: Any
) -> list[tuple]:
    """`function` of the head and a chunk's part of each column, chunk by chunk."""
    sizes = chunk_sizes(len(hidden_CD), len(head.weight_VD), hidden_CD.device)
    # Recomputing a chunk's logits in backward costs one product; keeping all costs memory.
    if torch.is_grad_enabled() and len(sizes) > 1:
        head.add_up_in_float32()
        function = partial(checkpoint, function, use_reentrant=False)
    parts = [
        [None] * len(sizes) if column is None else column.split(sizes)
        for column in (hidden_CD, *columns)
    ]
    return [function(head, *row) for row in zip(*parts, strict=True)]


def score_second(head: Head, hidden_CD: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the target, and whether it is the likeliest token."""
    logits_CV = head(hidden_CD).float()
    logprobs_C = -cross_entropy(logits_CV, target_C, reduction="none")
    return logprobs_C, logits_CV.argmax(-1) == target_C


def score_chunk(
    head: Head,
    hidden_CD: Tensor,
    target_C: Tensor,
    support: Support | None,
    teacher: TeacherStates | None,
    *,
    temperature: float,
    truncation: Truncation | None,
) -> tuple[Tensor, Tensor, Support | None, Tensor | None]:
    """Log-probability, entropy, support if `truncation` is given, divergence if a `teacher` is."""
    logits_CV = head(hidden_CD).float() / temperature
    target_C1 = target_C.unsqueeze(-1)
    kept = None
    if support is not None:
        logits_CV = logits_CV.masked_fill(~support.mask(logits_CV.shape[-1]), -torch.inf)
    elif truncation is not None:
        with torch.no_grad():
            keep_CV = truncation.keep(logits_CV).scatter(-1, target_C1, True)
        kept = Support.of(keep_CV)
        logits_CV = logits_CV.masked_fill(~keep_CV, -torch.inf)
    all_logprobs_CV = logits_CV.log_softmax(-1)
    # A recomputed tensor that no gradient reaches stays until the last chunk's backward: with a
    # teacher, whose divergence is the loss, the gather's would be all logits of the batch.
    with torch.set_grad_enabled(torch.is_grad_enabled() and teacher is None):
        logprobs_C = all_logprobs_CV.gather(-1, target_C1).squeeze(-1)
    with torch.no_grad():
        # A third of `torch.special.entr`'s time on a CPU; what is masked has probability 0.
        finite_CV = all_logprobs_CV.clamp(min=torch.finfo(torch.float32).min)
        entropy_C = -all_logprobs_CV.exp().mul_(finite_CV).sum(-1)
    divergence_C = teacher.measure(all_logprobs_CV, temperature) if teacher else None
    return logprobs_C, entropy_C, kept, divergence_C


def prepare(model: PreTrainedModel) -> None:
    """Prepare for packed batches. Raises UserError for a model that `Policy` cannot compute."""
    require_trainable(model.config, model.config._attn_implementation)
    use_packed_attention(model)


def require_trainable(config: PretrainedConfig, attn_implementation: str) -> None:
    """Raises UserError for a model that `Policy` cannot compute. Needs no weights."""
    for key in OWN_SCALES:
        if getattr(config.get_text_config(), key, None) not in (None, 1, 1.0):
            raise UserError(f"{config.model_type}: {key} is not supported by this trainer")
    require_packable(config, attn_implementation)


def compute_hidden(model: PreTrainedModel, batch: PackedBatch | RowPart) -> Tensor:
    """Last hidden states, `[N, D]`."""
    return model.base_model(
        input_ids=batch.ids_N.unsqueeze(0),
        position_ids=batch.position_N.unsqueeze(0),
        use_cache=False,
        **attend_to(batch, model),
    ).last_hidden_state.squeeze(0)


def attend_to(batch: PackedBatch | RowPart, model: PreTrainedModel) -> dict[str, Any]:
    """Keyword arguments of the model's forward, for its attention."""
    team = batch.team if isinstance(batch, RowPart) else None
    return attention_arguments(model.config._attn_implementation, batch.lengths, model.device, team)


def compute_mtp_hidden(
    model: PreTrainedModel, batch: PackedBatch | RowPart, hidden_ND: Tensor, *, detached: bool
) -> Tensor:
    """States of the prediction layer, `[N, D]`, from those of `compute_hidden`: each predicts the
    token after the next."""
    embeds_ND = model.get_input_embeddings()(batch.next_N) * batch.has_next_N.unsqueeze(-1)
    if detached:
        hidden_ND, embeds_ND = hidden_ND.detach(), embeds_ND.detach()
    layer = cast("MtpLayer", find_mtp_layer(model))  # the trainer has required it
    position_1N = batch.position_N.unsqueeze(0)
    hidden_1ND = hidden_ND.unsqueeze(0)
    return layer(
        hidden_1ND,
        embeds_ND.unsqueeze(0),
        position_ids=position_1N,
        position_embeddings=model.base_model.rotary_emb(hidden_1ND, position_ids=position_1N),
        **attend_to(batch, model),
    ).squeeze(0)
