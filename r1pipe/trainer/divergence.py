"""The divergence of a student's next-token distribution from its teacher's.

On-policy distillation (GKD, Agarwal et al. 2023, arXiv:2306.13649) minimises it at the tokens of
the student's own samples, without a gradient through the sampling. MiniLLM (Gu et al. 2023,
arXiv:2306.08543) argues for the reverse KL and adds that gradient, which is left out here. Both
distributions are full: no estimate from the sampled token, no top-k.

Shapes: C completion tokens, V vocabulary, D hidden size of the teacher.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TeacherStates:
    """The teacher's last hidden states at C tokens, and its head. Logits are computed in chunks:
    all of `[C, V]` may be larger than the model."""

    hidden_CD: Tensor
    head: Callable[[Tensor], Tensor]
    """`[C, D] -> [C, V]`."""
    beta: float
    """As in `measure_divergence`."""

    def split(self, sizes: list[int]) -> list["TeacherStates"]:
        """Parts of so many tokens."""
        return [TeacherStates(h, self.head, self.beta) for h in self.hidden_CD.split(sizes)]

    def measure(self, student_logprobs_CV: Tensor, temperature: float) -> Tensor:
        """The divergence `[C]` of the student's distributions, at the same temperature."""
        teacher_logprobs_CV = (self.head(self.hidden_CD).float() / temperature).log_softmax(-1)
        width = min(student_logprobs_CV.shape[-1], teacher_logprobs_CV.shape[-1])
        return measure_divergence(
            cut_vocabulary(student_logprobs_CV, width),
            cut_vocabulary(teacher_logprobs_CV, width),
            self.beta,
        )


def cut_vocabulary(logprobs_CV: Tensor, width: int) -> Tensor:
    """The first `width` tokens, renormalised. Models with one tokenizer may be padded to different
    sizes; beyond the smaller one neither has tokens."""
    if logprobs_CV.shape[-1] == width:
        return logprobs_CV
    return logprobs_CV[..., :width].log_softmax(-1)


def measure_divergence(
    student_logprobs_CV: Tensor, teacher_logprobs_CV: Tensor, beta: float
) -> Tensor:
    """The generalized Jensen-Shannon divergence in nats, `[C]` (arXiv:2306.13649, eq. 1): with
    m = beta teacher + (1 - beta) student,

        beta KL(teacher || m) + (1 - beta) KL(student || m)

    and at its ends, where that is 0, its limit when divided by the vanishing weight: the forward
    KL(teacher || student) at 0, the reverse KL(student || teacher) at 1. As TRL's `beta`.
    """
    if beta == 1:
        return measure_kl(student_logprobs_CV, teacher_logprobs_CV)
    if beta == 0:
        return measure_kl(teacher_logprobs_CV, student_logprobs_CV)
    mixture_CV = (teacher_logprobs_CV + math.log(beta)).logaddexp(
        student_logprobs_CV + math.log1p(-beta)
    )
    return beta * measure_kl(teacher_logprobs_CV, mixture_CV) + (1 - beta) * measure_kl(
        student_logprobs_CV, mixture_CV
    )


def measure_kl(logprobs_CV: Tensor, other_logprobs_CV: Tensor) -> Tensor:
    """KL(first || second), `[C]`."""
    return (logprobs_CV.exp() * (logprobs_CV - other_logprobs_CV)).sum(-1)
