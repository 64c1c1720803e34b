"""Model FLOPs utilization of training steps; models/flops.py says what counts."""

from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PretrainedConfig

from r1pipe.models.flops import peak_flops, train_flops
from r1pipe.trainer.packing import Sample
from r1pipe.utils import distributed


class Utilization:
    """Adds up a step's model FLOPs, on GPUs whose peak is known."""

    def __init__(
        self,
        config: PretrainedConfig,
        device: torch.device,
        dtype: str,
        *,
        frozen: bool = False,
        mtp: Literal["joint", "detached"] | None = None,
    ):
        """`frozen`, `mtp`: as for `train_flops`."""
        self.frozen, self.mtp = frozen, mtp
        self.config, self.on_gpu = config, device.type == "cuda"
        self.peak = peak_flops(device, dtype)
        self._flops = 0.0

    def add(self, samples: Sequence[Sample]) -> None:
        """Samples that this rank has computed forward and backward, for an optimizer step that was
        applied."""
        if self.peak:
            num_logits = sum(sample.rollout.num_tokens for sample in samples)
            lengths = [sample.num_tokens for sample in samples]
            self._flops += train_flops(
                self.config, lengths, num_logits, frozen=self.frozen, mtp=self.mtp
            )

    def take(self, seconds: float) -> dict[str, float]:
        """`mfu`, the share of all ranks' peak in these seconds, and begin anew; nothing on a CPU or
        if a card's peak is unknown. All ranks must call it."""
        if not self.on_gpu:
            return {}
        flops, peaks = zip(*distributed.gather((self._flops, self.peak)))
        self._flops = 0.0
        return {"mfu": sum(flops) / seconds / sum(peaks)} if all(peaks) else {}
