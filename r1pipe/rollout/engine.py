"""The vLLM engine: generate rollouts, load weights.

The engine runs in this process: its own processes would cost three imports on a small machine, and
in one process weights need no copy through the network.
"""

import gc
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from transformers import PreTrainedTokenizerBase

from r1pipe.config.base import Sampling
from r1pipe.config.recipe import Engine
from r1pipe.models.tokenizer import (
    check_length,
    encode_prompt,
    find_answer_frame,
    find_opening,
    join_end_ids,
    load_tokenizer,
    read_end_ids,
)
from r1pipe.rollout.cpu_sampling import (
    replace_kernels_once,
    use_counted_draws,
    use_norm_kernels,
)
from r1pipe.rollout.groups import Sampled, SampleFunction, SampleGroup, plan_groups
from r1pipe.rollout.journal import SampleJournal
from r1pipe.rollout.route_capture import (
    RouteCapture,
    count_routes,
    routes_on_every_rank,
    take_routes,
)
from r1pipe.rollout.speculation import (
    DraftCounts,
    DraftTrial,
    require_drafter_reads,
    set_drafting,
)
from r1pipe.rollout.vllm_args import (
    check_architecture,
    check_engine,
    check_files,
    choose_speculation,
    describe_error,
    describe_kind,
    engine_arguments,
    keep_own_config,
    read_config,
    require_moe_layers,
    sampling_parameters,
    set_environment,
)
from r1pipe.rollout.weight_sync import (
    read_weights,
    receive_weights,
    send_adapter,
    send_weights,
)
from r1pipe.types import Problem, Rollout
from r1pipe.utils import distributed
from r1pipe.utils.errors import UserError
from r1pipe.utils.phases import heartbeat, phase
from r1pipe.utils.progress import log_line

T = TypeVar("T")


class Sampler:
    """One vLLM engine with the weights of one checkpoint at a time.

    `with_routes`: for `generate` with a mixture's routes. With `settings.sleep` it can sleep, with
    a `lora_rank` it takes adapters, no other weights. `transfer`: vLLM's backend for
    `receive_weights`. Raises UserError if vLLM cannot run it.
    """

    num_engines = 1
    """This rank's."""
    version = 0
    """Of a fleet, the number of the last sync."""

    def __init__(
        self,
        checkpoint: str,
        settings: Engine,
        dtype: str,
        device: torch.device,
        with_routes: bool = False,
        chat_template: str | None = None,
        lora_rank: int = 0,
        transfer: str | None = None,
    ):
        self.settings, self.device, self.lora_rank = settings, device, lora_rank
        self.can_sleep, self.asleep = bool(settings.sleep), False
        self.sleep_level: int = settings.sleep or 0
        """That of the stage at hand; 0: it does not sleep."""
        self.chat_template = chat_template
        # On CPU any engine's can be recorded from outside.
        self.can_return_routes = with_routes or device.type == "cpu"
        check_files(checkpoint)
        self.dtype = dtype
        self.open_tokenizer(checkpoint)
        self.config = config = read_config(checkpoint)
        self.kind = describe_kind(config, self.end_ids)
        check_engine(checkpoint, config, settings, device.type, distributed.world_size())
        if with_routes:
            require_moe_layers(config)
        set_environment(config, device, dtype, with_routes)
        # Imported late and here only: vLLM reads its environment at import.
        from vllm import LLM

        check_architecture(checkpoint, config)
        keep_own_config()
        arguments = engine_arguments(config, settings, dtype, device, with_routes, lora_rank)
        if device.type == "cpu":
            arguments |= use_norm_kernels()
            replace_kernels_once()
        if transfer:
            arguments["weight_transfer_config"] = {"backend": transfer}
        speculative = choose_speculation(settings, config)
        if speculative and speculative.model:
            check_files(speculative.model)
            require_drafter_reads(speculative.model, self.tokenizer)
        elif settings.speculative and not speculative:
            log_line(f"{checkpoint}: no module for multi-token prediction: sampled without drafts")
        try:
            # The heap is not frozen: the trainer's garbage is in it, too.
            with (
                routes_on_every_rank(settings.tensor_parallel_size if with_routes else 1),
                mock.patch("vllm.v1.engine.core.freeze_gc_heap"),
            ):
                self.llm = LLM(checkpoint, **arguments)
        except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
            raise UserError(f"{checkpoint}: vLLM cannot run it: {describe_error(error)}") from error
        if device.type == "cpu":
            self.llm.collective_rpc(use_counted_draws)
        self.drafts = DraftCounts()
        self._scheduler.make_spec_decoding_stats = self.drafts.add
        # On a GPU vLLM schedules drafts before it knows them; ranks of one engine must agree.
        alone = device.type == "cpu" and self.num_ranks == 1
        tries = speculative and speculative.trial and alone
        self.trial = DraftTrial(self.set_drafting) if tries else None
        self.max_model_len = self.llm.llm_engine.model_config.max_model_len
        self.lora: Any = None
        self.between_steps: Callable[[], None] | None = None
        """Called by `run` before each step: may load weights."""
        self.capture: RouteCapture | None = None
        self.moe_layers: list[int] = []
        if with_routes:
            self.prepare_routes()

    def open_tokenizer(self, checkpoint: str) -> None:
        """Also sets what decides how prompts begin and completions end."""
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(checkpoint, self.chat_template)
        self.end_ids = join_end_ids(self.tokenizer, read_end_ids(checkpoint))
        self._unsaid = {*self.end_ids, self.tokenizer.pad_token_id}
        self._header, _ = find_answer_frame(self.tokenizer)
        self._prompts: dict[tuple, array] = {}
        """Token ids by the prompt's messages."""

    def prepare_routes(self) -> None:
        """Raises UserError for a model without routes."""
        if not self.can_return_routes:
            raise RuntimeError("the sampler was opened without routes")
        self.moe_layers = require_moe_layers(self.config)
        if self.device.type == "cpu" and self.capture is None:
            runner = self.llm.collective_rpc(lambda worker: worker.model_runner)[0]
            self.capture = RouteCapture(runner)

    def encode(self, problems: Iterable[Problem], max_completion_length: int) -> list[list[int]]:
        """Prompt token ids, tokenized once per checkpoint. Raises UserError for a problem that does
        not fit the context."""
        encoded = []
        for problem in problems:
            key = tuple(text for message in problem.prompt for text in message.items())
            if key not in self._prompts:
                ids = encode_prompt(self.tokenizer, problem.prompt, f'problem "{problem.id}"')
                self._prompts[key] = array("i", ids)
            ids = self._prompts[key].tolist()
            check_length(problem, len(ids), max_completion_length, self.max_model_len)
            encoded.append(ids)
        return encoded

    def generate(
        self,
        problems: list[Problem],
        num_samples: int,
        sampling: Sampling,
        seed_parts: tuple[object, ...],
        with_routes: bool = False,
    ) -> list[Rollout]:
        """`num_samples` rollouts per problem, in order, all by this rank's engine. `with_routes`
        needs a sampler that was opened with them."""
        groups = self._plan(problems, num_samples, seed_parts)
        self._encode_prompts(groups, sampling)
        for _ in self.sample(groups, sampling, with_routes):
            pass
        return [rollout for group in groups for rollout in group.rollouts]

    def generate_groups(
        self,
        problems: list[Problem],
        num_samples: int,
        sampling: Sampling,
        seed_parts: tuple[object, ...],
        *,
        with_routes: bool = False,
        journal: SampleJournal | None = None,
        sample: SampleFunction | None = None,
    ) -> Iterator[SampleGroup]:
        """The groups of this rank's `share` of the problems, each as soon as it is finished, while
        others are still being sampled. The samples are those of `generate`.

        On CPU routes come with the last group. Samples in the `journal` are taken from there,
        without routes, and new ones are added to it. `sample` takes the place of a single turn.
        """
        groups = self._plan(problems, num_samples, seed_parts)
        if sample is None:
            self._encode_prompts(groups, sampling)
        own = {group.index for group in self.share(groups)}
        groups = self._engine_share(groups)
        if journal:
            for group in groups:
                group.samples = journal.find_samples(group.problem.id, num_samples)
        yield from [group for group in groups if group.index in own and not group.missing]
        for group, rollout in (sample or self.sample)(groups, sampling, with_routes):
            if group.index not in own:  # that of another rank of this engine
                if journal:
                    rollout.empty()
                continue
            if journal:
                journal.add_sample(rollout)
            if not group.missing:
                yield group

    def _plan(
        self, problems: list[Problem], num_samples: int, seed_parts: tuple[object, ...]
    ) -> list[SampleGroup]:
        if self.asleep:  # vLLM would wait for ever
            raise RuntimeError("the engine sleeps: it needs weights before it can sample")
        return plan_groups(problems, num_samples, seed_parts)

    def _encode_prompts(self, groups: list[SampleGroup], sampling: Sampling) -> None:
        problems = [group.problem for group in groups]
        prompts = self.encode(problems, sampling.max_completion_length)
        for group, ids in zip(groups, prompts, strict=True):
            group.prompt_ids = ids

    def sample(self, groups: list[SampleGroup], sampling: Sampling, with_routes: bool) -> Sampled:
        """Every missing sample of the groups as it is finished, already in its group."""
        missing = [(group, number) for group in groups for number in group.missing]
        requests = (
            (group.prompt_ids, self.parameters(sampling, group.seeds[number], with_routes))
            for group, number in missing
        )
        capture = self.capture if with_routes else None
        with phase("sampling"), capture.recording() if capture else nullcontext():
            for place, result in self.run(requests, len(missing)):
                group, number = missing[place]
                rollout = self.read(result, group, number)
                if with_routes and capture is None:
                    rollout.routes = take_routes(result, self.moe_layers)
                group.samples[number] = rollout
                yield group, rollout
        if capture:
            rollouts = [group.samples[number] for group, number in missing]
            routes = capture.collect({str(i): count_routes(r) for i, r in enumerate(rollouts)})
            for place, rollout in enumerate(rollouts):
                rollout.routes = routes[str(place)]

    def parameters(self, sampling: Sampling, seed: int, with_routes: bool) -> Any:
        # A prompt from the cache is not routed again: its routes would be missing.
        uncached = with_routes and self.capture is not None
        return sampling_parameters(sampling, seed, self.end_ids, skip_prefix_cache=uncached)

    @property
    def _scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def set_drafting(self, drafting: bool) -> None:
        """Sample with drafts, as an engine opened for them does at first, or without; on CPU."""
        self.llm.collective_rpc(set_drafting, args=(drafting,))
        speculative = self.settings.speculative
        self._scheduler.num_spec_tokens = (
            speculative.num_speculative_tokens if speculative and drafting else 0
        )
        # The drafter has not read prompts that were cached without it.
        self.llm.reset_prefix_cache()

    def run(
        self, requests: Iterable[tuple[list[int], Any] | None], num_requests: int = 0
    ) -> Iterator[tuple[int, Any]]:
        """vLLM's results as they come, each with the index of its request. `requests`: prompts and
        parameters; the engine gets just enough at a time that it never waits for more. None: there
        is no request before the next step. `num_requests`, about: for the trial of drafts."""
        from vllm.inputs import tokens_input

        engine = self.llm.llm_engine
        coming, places, waiting = iter(requests), count(), set()
        call = None
        if self.trial and num_requests:
            call = self.trial.begin(min(num_requests, self.settings.max_num_seqs))
        try:
            while True:
                if self.between_steps:
                    self.between_steps()
                for request in islice(coming, self.queue_size - len(waiting)):
                    if request is None:
                        break
                    place, (ids, wanted) = str(next(places)), request
                    engine.add_request(place, tokens_input(ids), wanted, lora_request=self.lora)
                    waiting.add(place)
                if not engine.has_unfinished_requests():
                    break
                results = call.time(engine.step) if call else engine.step()
                heartbeat()
                for result in results:
                    if result.finished:
                        waiting.remove(result.request_id)
                    yield int(result.request_id), result
            if self.trial and call:
                self.trial.end(call)
        finally:
            if waiting:  # interrupted: the next call must not get their results
                engine.abort_request(list(waiting))
            self._end_steps_in_flight()

    def count_sampled(self) -> dict[int, int]:
        """Tokens so far of each request of `run` that is not finished, by its index."""
        # vLLM adds random characters to a request's name.
        requests = self._scheduler.requests.items()
        return {int(name.partition("-")[0]): r.num_output_tokens for name, r in requests}

    def _end_steps_in_flight(self) -> None:
        """On a GPU vLLM schedules a step before it knows that the last one has ended every sample.
        Nobody waits for that step's output, but with returned routes vLLM fails at the next sample
        if the prefix cache was reset before it was read."""
        engine = self.llm.llm_engine
        while engine.engine_core.engine_core.batch_queue:
            engine.step()

    def find_opening(self, prompt_ids: list[int]) -> str:
        """The beginning of the completion that the chat template puts into the prompt, such as
        <think>."""
        return find_opening(self.tokenizer, prompt_ids, self._header)

    @property
    def queue_size(self) -> int:
        """Twice what can run: a step admits no more, so the batches are the same as with all
        requests in the queue."""
        return 2 * self.settings.max_num_seqs

    @property
    def opened_tag(self) -> str:
        return self.find_opening(encode_prompt(self.tokenizer, [{"role": "user", "content": "?"}]))

    def stream(
        self, messages: list[dict[str, str]], sampling: Sampling, seed: int
    ) -> Iterator[str]:
        """One completion, piece by piece as it is sampled. Raises UserError for a conversation that
        is longer than the context."""
        from vllm.sampling_params import RequestOutputKind

        ids = encode_prompt(self.tokenizer, messages)
        remaining = self.max_model_len - len(ids)
        if remaining < 1:
            raise UserError(f"the conversation does not fit the context of {self.max_model_len}")
        parameters = self.parameters(sampling, seed, with_routes=False)
        parameters.max_tokens = min(parameters.max_tokens, remaining)
        parameters.output_kind = RequestOutputKind.DELTA
        parameters.detokenize = True
        for _, result in self.run([(ids, parameters)]):
            yield result.outputs[0].text

    def decode(self, prompt_ids: list[int], tokens: list[int]) -> str:
        """What was said after the prompt, with the tag that the prompt opens."""
        # Special tokens stay: <think> may be one, and rewards must see a policy that writes
        # <|user|>.
        said = self.tokenizer.decode([token for token in tokens if token not in self._unsaid])
        return self.find_opening(prompt_ids) + said

    def read(self, result: Any, group: SampleGroup, number: int) -> Rollout:
        """The rollout that is vLLM's finished result."""
        output = result.outputs[0]
        tokens = list(output.token_ids)
        return Rollout(
            problem_id=group.problem.id,
            sample=number,
            prompt_ids=group.prompt_ids,
            completion_ids=tokens,
            logprobs=list(output.logprobs.logprobs),
            completion=self.decode(group.prompt_ids, tokens),
            finish_reason=output.finish_reason,
        )

    @property
    def num_ranks(self) -> int:
        """Ranks of one engine: a tensor-parallel group, which samples together."""
        return 1 if distributed.alone() else self.settings.tensor_parallel_size

    def _engine_share(self, items: list[T]) -> list[T]:
        """What this rank's engine samples: the same on all ranks of the engine."""
        number, count = (
            n // self.num_ranks for n in (distributed.rank(), distributed.world_size())
        )
        return items[distributed.cut(len(items), number, count)]

    def share(self, items: list[T]) -> list[T]:
        """This rank's part of all problems: it scores and trains on these."""
        items = self._engine_share(items)
        number = distributed.rank() % self.num_ranks
        return items[distributed.cut(len(items), number, self.num_ranks)]

    @phase("sync")
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load weights, named as in a checkpoint (`models.weights.export_weights`), and wake up.

        Asleep it wakes for the weights alone at first: while a sharded trainer puts them together
        the KV cache's memory is still free."""
        if self.asleep:
            self.llm.wake_up(["weights"])
        send_weights(self.llm, weights, self.device)
        if self.asleep:
            self.llm.wake_up(["kv_cache"])
            self.asleep = False

    @phase("sync")
    def receive_weights(self, group: dict[str, Any] | None, update: dict[str, Any]) -> None:
        """See weight_sync."""
        receive_weights(self.llm, group, update, self.device)

    @phase("sync")
    def load_adapter(self, folder: str) -> None:
        """Sample with the adapter in peft's files from now on, and wake up."""
        if self.asleep:
            self.llm.wake_up()
        self.lora, self.asleep = send_adapter(self.llm, folder), False

    def sleep(self) -> None:
        """Leave the GPU's memory to the trainer, unless `sleep_level` is 0. Only `load_weights`
        wakes it: at level 2 vLLM keeps buffers but no weights, and would sample garbage."""
        if self.sleep_level and not self.asleep:
            # By its default, "abort", an engine that returns routes refuses; no request is left.
            self.llm.sleep(self.sleep_level, mode="keep")
            self.asleep = True

    def load_checkpoint(self, checkpoint: str) -> None:
        """Load the weights and the tokenizer of another checkpoint of the same kind."""
        self.open_tokenizer(checkpoint)
        self.load_weights(read_weights(Path(checkpoint)))

    def close(self) -> None:
        """Free the engine, so that another can take its memory."""
        if self.asleep:
            # What sleeps is unmapped. On CUDA vLLM would unmap it once more as it is freed, and the
            # next engine of this process would be told of that error.
            with suppress(RuntimeError):  # the trainer may still have the memory
                self.llm.wake_up()
        from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

        # It would destroy the default process group, which may be the trainer's, collect garbage
        # before there is any, and let later collections look at every import again.
        with (
            mock.patch("vllm.v1.engine.core.cleanup_dist_env_and_memory"),
            mock.patch("gc.collect"),
            mock.patch("gc.unfreeze"),
        ):
            self.llm.llm_engine.engine_core.shutdown()
        destroy_model_parallel()
        if distributed.alone():
            destroy_distributed_environment()
        del self.llm
        gc.collect()
        if self.can_sleep and self.device.type == "cuda":
            # vLLM's allocator serves one engine: the next finds it empty, or refuses to start.
            torch.cuda.empty_cache()
