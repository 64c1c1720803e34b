"""One engine for all stages of a run whose models have the same architecture."""

from pathlib import Path

import torch

from r1pipe.config.adapter import Adapter
from r1pipe.config.recipe import Engine, Recipe, SamplerPlace
from r1pipe.models.tokenizer import join_end_ids, load_tokenizer, read_end_ids
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.fleet import Fleet
from r1pipe.rollout.probe import PROBE_LIMITS, probe, probe_adapter
from r1pipe.rollout.vllm_args import describe_kind, read_config
from r1pipe.utils import distributed
from r1pipe.utils.errors import first_line
from r1pipe.utils.phases import phase
from r1pipe.utils.progress import log_line


class Engines:
    """Keeps the last engine, or fleet of them: stages with the same architecture share it, for one
    start-up. `place`: default: colocated; `hang_s`: see Fleet."""

    def __init__(
        self,
        settings: Engine,
        dtype: str,
        device: torch.device,
        chat_template: str | None = None,
        place: SamplerPlace | None = None,
        hang_s: float | None = None,
    ):
        self.settings, self.dtype, self.device = settings, dtype, device
        self.chat_template = chat_template
        self.place, self.hang_s = place or SamplerPlace(), hang_s
        self._sampler: Sampler | None = None

    @classmethod
    def of(cls, recipe: Recipe, device: torch.device) -> "Engines":
        # An engine that hangs is replaced before the run counts as hung.
        hang_s = recipe.phase_timeout_s and recipe.phase_timeout_s / 2
        settings = (recipe.engine, recipe.dtype, device, recipe.chat_template)
        return cls(*settings, recipe.sampler, hang_s)

    @phase("starting vLLM")
    def open(
        self,
        checkpoint: str,
        with_routes: bool = False,
        sleep: int = 0,
        adapter: Adapter | None = None,
    ) -> Sampler:
        """A sampler with this checkpoint's weights, `with_routes` one that can return routes;
        `sleep`: the level at which it can sleep; `adapter`: what will be trained beside them."""
        if adapter and adapter.sync == "alone" and self._open_for(adapter, checkpoint, sleep):
            return self._sampler
        if self._sampler is not None and self._can_reload(checkpoint, with_routes, sleep):
            self._sampler.load_checkpoint(checkpoint)
            self._sampler.sleep_level = sleep
            diff = probe(self._sampler, checkpoint)
            if diff is not None and diff <= PROBE_LIMITS[self.dtype]:
                if with_routes:
                    self._sampler.prepare_routes()
                return self._sampler
            if diff is not None:
                log_line(
                    f"{checkpoint}: reloaded, vLLM is {diff:.1e} off (mean |dlogp|): started anew"
                )
        self.close()
        settings = self.settings.model_copy(update={"sleep": sleep})
        arguments = (settings, self.dtype, self.device, with_routes, self.chat_template)
        if self.place.kind == "fleet":
            where = {"place": self.place, "hang_s": self.hang_s}
            self._sampler = Fleet(checkpoint, *arguments, **where)
        else:
            self._sampler = Sampler(checkpoint, *arguments)
        return self._sampler

    def _open_for(self, adapter: Adapter, checkpoint: str, sleep: int) -> bool:
        """An engine that takes the adapter alone, if there is one that computes it as we do."""
        reason = "not in several processes, nor with engine.sleep 2, which keeps no base"
        if distributed.alone() and sleep < 2:
            self.close()
            settings = self.settings.model_copy(update={"sleep": sleep})
            arguments = (settings, self.dtype, self.device, False, self.chat_template, adapter.r)
            try:
                self._sampler = Sampler(checkpoint, *arguments)
                diff = probe_adapter(self._sampler, checkpoint, adapter)
            except Exception as error:  # vLLM's layers refuse in their own ways
                reason = first_line(error, with_type=True)
            else:
                what = "not compared" if diff is None else f"mean |dlogp| {diff:.1e} in a probe"
                if diff is not None and diff <= PROBE_LIMITS[self.dtype]:
                    log_line(f"{checkpoint}: vLLM takes the adapter alone ({what})")
                    return True
                reason = what
            self.close()
        log_line(f"{checkpoint}: vLLM gets merged weights, not the adapter alone: {reason}")
        return False

    def _can_reload(self, checkpoint: str, with_routes: bool, sleep: int) -> bool:
        # One process's engine on several devices has processes of its own, out of reach for weights
        # from here.
        if distributed.alone() and self.settings.tensor_parallel_size > 1:
            return False
        if self._sampler.lora_rank:
            return False
        if sleep and not self._sampler.can_sleep:
            return False
        if self._sampler.can_return_routes < with_routes or not Path(checkpoint).is_dir():
            return False
        tokenizer = load_tokenizer(checkpoint, self.chat_template)
        end_ids = join_end_ids(tokenizer, read_end_ids(checkpoint))
        return describe_kind(read_config(checkpoint), end_ids) == self._sampler.kind

    def make_room(self) -> None:
        """Called before a model is trained that is not the sampler's: on a GPU the engine sleeps,
        or is closed if it cannot. A fleet has GPUs of its own."""
        if self._sampler is not None and self.device.type == "cuda" and self.place.kind != "fleet":
            if self._sampler.can_sleep:
                self._sampler.sleep_level = self._sampler.settings.sleep
                self._sampler.sleep()
            else:
                self.close()

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None
