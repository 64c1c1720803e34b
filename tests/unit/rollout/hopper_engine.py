"""What test_cuda_engine.py runs in a process of its own: vLLM's own answers for an H100 that is not
there.

    python tests/unit/rollout/hopper_engine.py cases.json > answers.json

Only hardware is faked: the device's properties, Triton's driver, and the compiled kernels, which
the CPU's wheel lacks and nothing here calls. vLLM's code decides, up to the model's layers on the
meta device. What comes after (memory profile, graphs, kernels) needs the device.
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

COMPILED = (
    "vllm._C_stable_libtorch",
    "vllm._moe_C_stable_libtorch",
    "vllm._flashmla_C",
    "vllm._flashmla_extension_C",
    "vllm.vllm_flash_attn._vllm_fa2_C",
    "vllm.vllm_flash_attn._vllm_fa3_C",
)
sys.modules.update({name: ModuleType(name) for name in COMPILED})

import vllm.platforms  # noqa: E402
from vllm.platforms.cuda import CudaPlatformBase  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402


class Hopper(CudaPlatformBase):
    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(9, 0)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "NVIDIA H100 80GB HBM3"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 80 * 2**30

    @classmethod
    def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
        return True

    @classmethod
    def device_count(cls) -> int:
        return 8

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        return 132

    def is_cumem_allocator_available(self) -> bool:
        return True


vllm.platforms._current_platform = Hopper()

import vllm.triton_utils.importing  # noqa: E402

vllm.triton_utils.HAS_TRITON = vllm.triton_utils.importing.HAS_TRITON = True

from transformers import AutoConfig  # noqa: E402
from vllm import LLM  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed import (  # noqa: E402
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.model_executor.model_loader.utils import initialize_model  # noqa: E402
from vllm.utils.torch_utils import set_default_torch_dtype  # noqa: E402
from vllm.v1.attention.backends.mla.prefill.selector import get_mla_prefill_backend  # noqa: E402
from vllm.v1.core.sched.interface import PauseState  # noqa: E402
from vllm.v1.executor.abstract import Executor  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.structured_output import StructuredOutputManager  # noqa: E402

from r1pipe.config.recipe import Engine  # noqa: E402
from r1pipe.rollout.vllm_args import engine_arguments, set_environment  # noqa: E402

DEVICE = torch.device("cuda", 0)
BLOCK = 16


class Kernel:
    """Stands for a compiled one."""

    def __getattr__(self, name: str) -> "Kernel":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: object) -> bool:
        return False


class Taken(Exception):
    """Carries what LLM hands to the engine."""


def answer(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    settings, dtype, with_routes = case["model"], case["dtype"], case["routes"]
    config = AutoConfig.for_model(**settings)
    config.save_pretrained(folder)
    set_environment(config, DEVICE, dtype, with_routes)
    arguments = engine_arguments(config, Engine(**case["engine"]), dtype, DEVICE, with_routes)
    made = make_config(folder, arguments)
    facts = describe(made)
    if case["sleep_modes"]:
        facts["sleep_modes"] = find_sleep_modes(made)
    if made.parallel_config.world_size == 1:
        facts |= describe_layers(made)
    return facts


def make_config(folder: Path, arguments: dict[str, Any]) -> VllmConfig:
    def take(*, engine_args: Any, usage_context: Any) -> None:
        engine_args.skip_tokenizer_init = True
        raise Taken(engine_args.create_engine_config(usage_context))

    try:
        with mock.patch("vllm.entrypoints.llm.LLMEngine.from_engine_args", take):
            LLM(str(folder), **arguments)
    except Taken as taken:
        return taken.args[0]
    raise AssertionError("LLM made no engine")


def describe(config: VllmConfig) -> dict[str, Any]:
    scheduler, graphs = config.scheduler_config, config.compilation_config
    return {
        "dtype": str(config.model_config.dtype),
        "logprobs_mode": config.model_config.logprobs_mode,
        "seed": config.model_config.seed,
        "latent": config.model_config.use_mla,
        "executor": Executor.get_class(config).__name__,
        "worker": config.parallel_config.worker_cls,
        "v2": config.use_v2_model_runner,
        "asynchronous": scheduler.async_scheduling,
        "num_batched_tokens": scheduler.max_num_batched_tokens,
        "num_seqs": scheduler.max_num_seqs,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "kv_bytes": config.cache_config.kv_cache_memory_bytes,
        "routes": config.aux_output_config.enable_return_routed_experts,
        "graphs": graphs.cudagraph_mode.name,
        "largest_graph": graphs.max_cudagraph_capture_size,
        "sleep": config.model_config.enable_sleep_mode,
    }


def find_sleep_modes(config: VllmConfig) -> list[str]:
    """Those in which the scheduler can drop its caches, as the engine asks it to before sleeping;
    see EngineCore.pause_scheduler."""
    config.cache_config.block_size = BLOCK
    layer = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=config.model_config.dtype
    )
    config.cache_config.num_gpu_blocks = 10
    cache = KVCacheConfig(10, [], [KVCacheGroupSpec(["layer"], layer)])
    structured = StructuredOutputManager(config)
    make = config.scheduler_config.get_scheduler_cls()
    scheduler = make(config, cache, structured, BLOCK, BLOCK)
    modes = []
    for mode, state in (("abort", PauseState.PAUSED_NEW), ("keep", PauseState.PAUSED_ALL)):
        scheduler.set_pause_state(state)
        with contextlib.suppress(RuntimeError):
            if scheduler.reset_prefix_cache(reset_running_requests=True):
                modes.append(mode)
    return modes


def describe_layers(config: VllmConfig) -> dict[str, Any]:
    """Of the model's layers, and of attention over a latent how it reads a prompt."""
    attentions, versions, experts = set(), set(), set()
    with set_current_vllm_config(config):
        ensure_model_parallel_initialized(1, 1)  # by what the config needs
        with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
            model = initialize_model(config)
        for module in model.modules():
            if backend := getattr(module, "attn_backend", None):
                attentions.add(backend.get_name())
                versions.add(getattr(module.impl, "vllm_flash_attn_version", None))
            if backend := getattr(getattr(module, "quant_method", None), "unquantized_backend", 0):
                experts.add(backend.name)
        facts = {"attention": attentions, "flash": versions, "experts": experts}
        if config.aux_output_config.enabled:
            facts |= bind_routes(config, model)
        if config.model_config.use_mla:
            facts["prefill"] = {get_mla_prefill_backend(config).get_name()}
    return {n: sorted(v, key=str) if isinstance(v, set) else v for n, v in facts.items()}


def bind_routes(config: VllmConfig, model: torch.nn.Module) -> dict[str, Any]:
    """Shape of a token's routes, and in which of its rows layers write."""
    # They ask compiled kernels at import.
    from vllm.model_executor.layers.fused_moe.layer import MoERunner
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
        RoutedExpertsCapturer,
        bind_routed_experts_capturer,
    )
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    with mock.patch.object(Hopper, "device_type", "meta"):
        capturer = RoutedExpertsCapturer(16, config)
    bind_routed_experts_capturer(model, capturer)
    bound = [m.layer_id for m in model.modules() if isinstance(m, MoERunner)]
    assert all(m.capture_fn for m in model.modules() if isinstance(m, BaseRouter))
    return {"shape_of_routes": capturer.shape_per_token, "layers_with_routes": bound}


def run(case: dict[str, Any]) -> dict[str, Any]:
    own = dict(os.environ)
    os.environ.update(case["environment"])
    try:
        with tempfile.TemporaryDirectory() as folder:
            return answer(case, Path(folder))
    except ValueError as error:
        return {"refused": str(error)}
    finally:
        destroy_model_parallel()
        os.environ.clear()
        os.environ.update(own)


@contextlib.contextmanager
def without_kernels() -> Any:
    """Streams, events and compiled kernels that exist and do nothing; one process's groups."""
    find = torch._ops._OpNamespace.__getattr__

    def find_or_fake(space: Any, name: str) -> Any:
        try:
            return find(space, name)
        except AttributeError:
            if space.name.startswith(("_C", "_moe_C", "_vllm")):
                return Kernel()
            raise

    with (
        mock.patch.object(torch._ops._OpNamespace, "__getattr__", find_or_fake),
        mock.patch.object(torch.cuda, "Stream", type("Stream", (), {})),
        mock.patch.object(torch.cuda, "Event", type("Event", (), {})),
        tempfile.NamedTemporaryFile() as file,
    ):
        init_distributed_environment(1, 0, f"file://{file.name}", 0, "gloo")
        yield


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    answers = {}
    with without_kernels():
        for name, case in cases.items():
            answers[name] = run(case)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
