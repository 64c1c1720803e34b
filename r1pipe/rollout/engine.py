"""The vLLM engine: generate rollouts, load weights. The only file that imports vllm.

The engine runs in this process: its own processes would cost three imports on a small machine, and
in one process weights need no copy through the network.
"""

import gc
from array import array
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from r1pipe.config.base import Sampling
from r1pipe.config.recipe import Engine
from r1pipe.models.model import fast_training_kernels, load_model
from r1pipe.models.tokenizer import (
    check_length,
    encode_prompt,
    find_answer_frame,
    find_opening,
    join_end_ids,
    load_tokenizer,
    read_end_ids,
)
from r1pipe.models.weights import list_weights
from r1pipe.rollout.groups import SampleGroup, plan_groups
from r1pipe.rollout.journal import SampleJournal
from r1pipe.rollout.route_capture import RouteCapture
from r1pipe.rollout.vllm_args import (
    available_memory,
    check_architecture,
    check_engine,
    check_files,
    describe_kind,
    engine_arguments,
    read_config,
    require_moe_layers,
    set_environment,
)
from r1pipe.types import Problem, Rollout
from r1pipe.utils import distributed
from r1pipe.utils.errors import UserError, first_line
from r1pipe.utils.phases import heartbeat, phase
from r1pipe.utils.progress import log_line

T = TypeVar("T")

PROBE_PROMPTS = ("What is 3 + 4?", "Count to 5.", "Why is the sky blue?", "x + 2 = 9. x = ?")
PROBE_TOKENS = 16
PROBE_LIMITS = {"float32": 1e-3, "bfloat16": 0.1}
"""Mean |log-probability difference| above which a reload counts as failed. In bf16 two correct
engines differ by about 1e-2; the wrong ones seen so far by 0.2 to 5.6."""


class Sampler:
    """One vLLM engine with the weights of one checkpoint at a time.

    `with_routes`: for `generate` with the routes of a mixture of experts.
    Raises UserError if vLLM cannot run the checkpoint.
    """

    def __init__(
        self,
        checkpoint: str,
        settings: Engine,
        dtype: str,
        device: torch.device,
        with_routes: bool = False,
        chat_template: str | None = None,
    ):
        self.settings, self.device = settings, device
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
        try:
            with routes_on_every_rank(settings.tensor_parallel_size if with_routes else 1):
                self.llm = LLM(
                    checkpoint, **engine_arguments(config, settings, dtype, device, with_routes)
                )
        except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
            raise UserError(f"{checkpoint}: vLLM cannot run it: {describe_error(error)}") from error
        self.max_model_len = self.llm.llm_engine.model_config.max_model_len
        self._capture: RouteCapture | None = None
        self._moe_layers: list[int] = []
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
        self._moe_layers = require_moe_layers(self.config)
        if self.device.type == "cpu" and self._capture is None:
            runner = self.llm.collective_rpc(lambda worker: worker.model_runner)[0]
            self._capture = RouteCapture(runner)

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
        groups = self._plan(problems, num_samples, sampling, seed_parts)
        for _ in self._sample(groups, sampling, with_routes):
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
    ) -> Iterator[SampleGroup]:
        """The groups of this rank's `share` of the problems, each as soon as it is finished, while
        others are still being sampled. The samples are those of `generate`.

        On CPU routes come with the last group. Samples in the `journal` are taken from there,
        without routes, and new ones are added to it.
        """
        groups = self._plan(problems, num_samples, sampling, seed_parts)
        own = {group.index for group in self.share(groups)}
        groups = self._engine_share(groups)
        if journal:
            for group in groups:
                group.samples = journal.find_samples(group.problem.id, num_samples)
        yield from [group for group in groups if group.index in own and not group.missing]
        for group, rollout in self._sample(groups, sampling, with_routes):
            if group.index not in own:  # that of another rank of this engine
                if journal:
                    rollout.empty()
                continue
            if journal:
                journal.add_sample(rollout)
            if not group.missing:
                yield group

    def _plan(
        self,
        problems: list[Problem],
        num_samples: int,
        sampling: Sampling,
        seed_parts: tuple[object, ...],
    ) -> list[SampleGroup]:
        groups = plan_groups(problems, num_samples, seed_parts)
        prompts = self.encode(problems, sampling.max_completion_length)
        for group, ids in zip(groups, prompts, strict=True):
            group.prompt_ids = ids
        return groups

    def _sample(
        self, groups: list[SampleGroup], sampling: Sampling, with_routes: bool
    ) -> Iterator[tuple[SampleGroup, Rollout]]:
        """Every missing sample of the groups as it is finished, already in its group."""
        missing = [(group, number) for group in groups for number in group.missing]
        requests = (
            (group.prompt_ids, self._parameters(sampling, group.seeds[number], with_routes))
            for group, number in missing
        )
        capture = self._capture if with_routes else None
        with phase("sampling"), capture.recording() if capture else nullcontext():
            for place, result in self._run(requests):
                group, number = missing[place]
                rollout = self._read(result, group, number)
                if with_routes and capture is None:
                    rollout.routes = self._take_routes(result)
                group.samples[number] = rollout
                yield group, rollout
        if capture:
            rollouts = [group.samples[number] for group, number in missing]
            routes = capture.collect({str(i): count_routes(r) for i, r in enumerate(rollouts)})
            for place, rollout in enumerate(rollouts):
                rollout.routes = routes[str(place)]

    def _parameters(self, sampling: Sampling, seed: int, with_routes: bool) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            output_kind=RequestOutputKind.FINAL_ONLY,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            max_tokens=sampling.max_completion_length,
            stop_token_ids=self.end_ids,
            seed=seed,
            # Only the sampled tokens', in one list instead of an object per token.
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            skip_special_tokens=False,
            # A prompt from the cache is not routed again: its routes would be missing.
            skip_reading_prefix_cache=with_routes and self._capture is not None,
        )

    def _run(self, requests: Iterable[tuple[list[int], Any]]) -> Iterator[tuple[int, Any]]:
        """vLLM's results as they come, each with the index of its request. `requests`: prompts and
        parameters; the engine gets just enough at a time that it never waits for more."""
        from vllm.inputs import tokens_input

        engine = self.llm.llm_engine
        coming, waiting = enumerate(requests), set()
        try:
            while True:
                for place, (ids, wanted) in islice(coming, self._queue_size - len(waiting)):
                    engine.add_request(str(place), tokens_input(ids), wanted)
                    waiting.add(str(place))
                if not engine.has_unfinished_requests():
                    break
                results = engine.step()
                heartbeat()
                for result in results:
                    if result.finished:
                        waiting.remove(result.request_id)
                    yield int(result.request_id), result
        finally:
            if waiting:  # interrupted: the next call must not get their results
                engine.abort_request(list(waiting))

    def find_opening(self, prompt_ids: list[int]) -> str:
        """The beginning of the completion that the chat template puts into the prompt, such as
        <think>."""
        return find_opening(self.tokenizer, prompt_ids, self._header)

    @property
    def _queue_size(self) -> int:
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
        parameters = self._parameters(sampling, seed, with_routes=False)
        parameters.max_tokens = min(parameters.max_tokens, remaining)
        parameters.output_kind = RequestOutputKind.DELTA
        parameters.detokenize = True
        for _, result in self._run([(ids, parameters)]):
            yield result.outputs[0].text

    def _read(self, result: Any, group: SampleGroup, number: int) -> Rollout:
        output = result.outputs[0]
        tokens = list(output.token_ids)
        # Special tokens stay: <think> may be one, and rewards must see a policy that writes
        # <|user|>.
        said = self.tokenizer.decode([token for token in tokens if token not in self._unsaid])
        return Rollout(
            problem_id=group.problem.id,
            sample=number,
            prompt_ids=group.prompt_ids,
            completion_ids=tokens,
            logprobs=list(output.logprobs.logprobs),
            completion=self.find_opening(group.prompt_ids) + said,
            finish_reason=output.finish_reason,
        )

    def _take_routes(self, result: Any) -> np.ndarray:
        """The routes that vLLM returns, `[prompt + completion - 1, L, K]`, L its mixture-of-experts
        layers. Raises RuntimeError if the sampler was not opened with them."""
        if not self._moe_layers:
            raise RuntimeError("the sampler was opened without routes")
        output = result.outputs[0]
        rows = output.routed_experts
        length = len(result.prompt_token_ids) + len(output.token_ids) - 1
        if rows is None or len(rows) < length:
            found = 0 if rows is None else len(rows)
            raise RuntimeError(f"vLLM returned the routes of {found} of {length} tokens")
        # One column per decoder layer; those of dense layers are unused.
        return rows[:length, self._moe_layers]

    @property
    def _num_ranks(self) -> int:
        """Ranks of one engine: a tensor-parallel group, which samples together."""
        return 1 if distributed.alone() else self.settings.tensor_parallel_size

    def _engine_share(self, items: list[T]) -> list[T]:
        """What this rank's engine samples: the same on all ranks of the engine."""
        number, count = (
            n // self._num_ranks for n in (distributed.rank(), distributed.world_size())
        )
        return items[distributed.cut(len(items), number, count)]

    def share(self, items: list[T]) -> list[T]:
        """This rank's part of all problems: it scores and trains on these."""
        items = self._engine_share(items)
        number = distributed.rank() % self._num_ranks
        return items[distributed.cut(len(items), number, self._num_ranks)]

    @phase("sync")
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load weights, named as in a checkpoint (`models.weights.export_weights`)."""
        if self.device.type == "cpu":
            # The layer-wise reload repacks the experts' weights but keeps their old kernel, which
            # then silently computes with the wrong layout (log-prob error 1.4). Without a kernel
            # it builds a new one.
            self.llm.apply_model(drop_expert_kernels)
        (absent,) = self.llm.collective_rpc(reload_weights, args=(iter(weights),))
        if absent:
            more = f" and {len(absent) - 1} more layers" if len(absent) > 1 else ""
            raise UserError(f"vLLM was given no weights of {absent[0]}{more}")
        if self.device.type == "cpu":
            self.llm.apply_model(repack_tied_head)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept the keys and values of the old weights")

    def load_checkpoint(self, checkpoint: str) -> None:
        """Load the weights and the tokenizer of another checkpoint of the same kind."""
        self.open_tokenizer(checkpoint)
        self.load_weights(read_weights(Path(checkpoint)))

    def probe(self, checkpoint: str) -> float | None:
        """Mean |log-probability in vLLM - in transformers| of a few tokens from every rank's
        engine; None if transformers cannot load the checkpoint or memory does not suffice."""
        problems = [
            Problem(str(n), "", [{"role": "user", "content": text}])
            for n, text in enumerate(PROBE_PROMPTS)
        ]
        length = min(PROBE_TOKENS, self.max_model_len // 2)
        try:
            sampling = Sampling(max_completion_length=length)
            own = self.generate(
                problems, 1, sampling, ("probe", distributed.rank() // self._num_ranks)
            )
        except UserError:  # a context too short for these prompts
            own = []
        by_rank = distributed.gather_to_first(own)
        rollouts = [rollout for part in by_rank for rollout in part]
        return distributed.on_first_rank(
            lambda: measure_difference(checkpoint, rollouts, self.dtype, self.device)
        )

    def close(self) -> None:
        """Free the engine, so that another can take its memory."""
        core = self.llm.llm_engine.engine_core
        if distributed.alone():
            core.shutdown()
        else:
            # vLLM would destroy the default process group, which is the trainer's.
            from vllm.distributed import destroy_model_parallel

            with mock.patch("vllm.v1.engine.core.cleanup_dist_env_and_memory"):
                core.shutdown()
            destroy_model_parallel()
        del self.llm
        gc.collect()


class Engines:
    """Keeps the last engine: stages with the same architecture share it, for one start-up."""

    def __init__(
        self, settings: Engine, dtype: str, device: torch.device, chat_template: str | None = None
    ):
        self.settings, self.dtype, self.device = settings, dtype, device
        self.chat_template = chat_template
        self._sampler: Sampler | None = None

    @phase("starting vLLM")
    def open(self, checkpoint: str, with_routes: bool = False) -> Sampler:
        """A sampler with this checkpoint's weights, `with_routes` one that can return routes."""
        if self._sampler is not None and self._can_reload(checkpoint, with_routes):
            self._sampler.load_checkpoint(checkpoint)
            diff = self._sampler.probe(checkpoint)
            if diff is not None and diff <= PROBE_LIMITS[self.dtype]:
                if with_routes:
                    self._sampler.prepare_routes()
                return self._sampler
            if diff is not None:
                log_line(
                    f"{checkpoint}: reloaded, vLLM is {diff:.1e} off (mean |dlogp|): started anew"
                )
        self.close()
        self._sampler = Sampler(
            checkpoint, self.settings, self.dtype, self.device, with_routes, self.chat_template
        )
        return self._sampler

    def _can_reload(self, checkpoint: str, with_routes: bool) -> bool:
        # One process's engine on several devices has processes of its own, out of reach for weights
        # from here.
        if distributed.alone() and self.settings.tensor_parallel_size > 1:
            return False
        if self._sampler.can_return_routes < with_routes or not Path(checkpoint).is_dir():
            return False
        tokenizer = load_tokenizer(checkpoint, self.chat_template)
        end_ids = join_end_ids(tokenizer, read_end_ids(checkpoint))
        return describe_kind(read_config(checkpoint), end_ids) == self._sampler.kind

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None


def routes_on_every_rank(tensor_parallel_size: int) -> AbstractContextManager:
    """Engines built within it return routes on every rank.

    vLLM returns them on the first rank of a tensor-parallel group only. Under external_launcher
    every rank is an engine and asks itself.
    """
    if tensor_parallel_size == 1 or distributed.alone():
        return nullcontext()
    return mock.patch(
        "vllm.distributed.aux_output_connector.worker.get_tp_group",
        return_value=SimpleNamespace(is_first_rank=True),
    )


def reload_weights(worker: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> list[str]:
    """Runs inside the engine: vLLM's layer-wise reload. Returns the layers that got no weights and
    kept their old ones, which vLLM only logs."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    model = worker.get_model()
    load, absent = model.load_weights, []

    def load_and_look(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
        loaded = load(weights)
        tied = getattr(model.config, "tie_word_embeddings", False)
        for name, layer in model.named_modules():
            info = get_layerwise_info(layer)
            # A complete layer has been put in place by now and no longer waits.
            waits = info.can_load() and not info.load_numel
            if waits and any(True for _ in layer.parameters(recurse=False)):
                absent.append(name)
        if tied and "lm_head" in absent:
            absent.remove("lm_head")
        return loaded

    model.load_weights = load_and_look
    try:
        worker.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights  # the instance's; the class has its own
    return absent


def drop_expert_kernels(model: torch.nn.Module) -> None:
    """Runs inside the engine before a reload; see Sampler.load_weights."""
    for module in model.modules():
        experts = getattr(module, "routed_experts", None)
        if experts is not None:
            experts.quant_method.moe_kernel = None


def repack_tied_head(model: torch.nn.Module) -> None:
    """Runs inside the engine after a reload. A head tied to the embedding has no tensor of its own
    in the checkpoint: the reload leaves its packed copy of the old weights (log-prob error 0.2).
    """
    head = getattr(model, "lm_head", None)
    if getattr(model.config, "tie_word_embeddings", False) and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


@torch.no_grad()
def measure_difference(
    checkpoint: str, rollouts: list[Rollout], dtype: str, device: torch.device
) -> float | None:
    """Mean |sampler - transformers| log-probability; see Sampler.probe."""
    size = sum(file.stat().st_size for file in list_weights(Path(checkpoint)))
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 1.5 * size:
        device = torch.device("cpu")
    if not rollouts or (device.type == "cpu" and available_memory() < 2 * size):
        return None
    try:
        model = load_model(checkpoint, device, dtype=getattr(torch, dtype)).eval()
    except UserError:
        return None
    diffs = []
    with fast_training_kernels(device, dtype):
        for rollout in rollouts:
            ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids], device=device)
            logits_NV = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            logprobs_N = logits_NV.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
            sampled = torch.tensor(rollout.logprobs, device=device)
            diffs.append((logprobs_N[-len(sampled) :] - sampled).abs())
    return float(torch.cat(diffs).mean())


def count_routes(rollout: Rollout) -> int:
    """Number of tokens that the sampler has read."""
    return len(rollout.prompt_ids) + len(rollout.completion_ids) - 1


def describe_error(error: Exception) -> str:
    """One line; pydantic's own text starts with a count."""
    problems = error.errors() if isinstance(error, ValidationError) else []
    if problems:
        message = problems[0]["msg"].removeprefix("Value error, ").strip()
        return message.splitlines()[0]
    return first_line(error)


def read_weights(folder: Path) -> Iterable[tuple[str, torch.Tensor]]:
    """Names and tensors of a checkpoint folder's files."""
    for file in list_weights(folder):
        if file.suffix == ".bin":
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
            continue
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                yield name, tensors.get_tensor(name)
