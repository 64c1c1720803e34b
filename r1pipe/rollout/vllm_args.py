"""vLLM's arguments and environment, and checks for models that it loads wrongly or not at all."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from r1pipe.config.base import Sampling
from r1pipe.config.recipe import Engine, Speculative
from r1pipe.models.mtp import has_mtp_layer
from r1pipe.models.quirks import find_quirks, has_mla
from r1pipe.models.routing import find_moe_layers
from r1pipe.models.sparse_attention import has_indexer
from r1pipe.models.tokenizer import load_tokenizer
from r1pipe.models.weights import check_weights, find_strays, list_weights
from r1pipe.models.yarn import check_yarn
from r1pipe.utils import distributed
from r1pipe.utils.errors import UserError, first_line

_own_variables: set[str] = set()

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's CPU attention kernel is compiled for."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for max_lora_rank."""


def engine_arguments(
    config: Any,
    settings: Engine,
    dtype: str,
    device: torch.device,
    with_routes: bool = False,
    lora_rank: int = 0,
) -> dict[str, Any]:
    """Arguments of vLLM's LLM, the model's quirks included. `lora_rank`: the largest of an adapter,
    of which there is one at a time; 0: none."""
    context = settings.max_model_len or config.max_position_embeddings
    arguments = {
        # "auto" would silently turn a float32 checkpoint into bf16.
        "dtype": dtype,
        "max_model_len": context,
        "max_num_seqs": settings.max_num_seqs,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": settings.enforce_eager or device.type == "cpu",
        # At the sampling temperature, to compare with the trainer's.
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    if not distributed.alone():
        # An engine per rank, or per `tensor_parallel_size` neighbouring ranks, on the trainer's
        # process group: with any other backend every engine would take the machine's first GPU.
        arguments["distributed_executor_backend"] = "external_launcher"
    if settings.sleep and device.type == "cuda":
        arguments["enable_sleep_mode"] = True
    if settings.quantization:
        arguments["quantization"] = settings.quantization
    if lora_rank:
        largest = next(rank for rank in LORA_RANKS if rank >= lora_rank)
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": largest}
    if speculative := choose_speculation(settings, config):
        # With the drafter's likeliest tokens; vLLM would draw others from no seed.
        arguments["speculative_config"] = speculative.model_dump(
            exclude={"trial"}, exclude_none=True
        )
    if is_sampled_dense(config, device.type):
        arguments["hf_overrides"] = drop_indexer
    if settings.kv_cache_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(settings.kv_cache_gib * 2**30)
    if device.type == "cpu":
        # A prompt cut into chunks makes vLLM rewind the sample's random generator, and torch's CPU
        # generators cannot ("CPU Generator does not use offset").
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(8192, context)
        # By default 128: its attention computes, and its cache keeps, whole blocks.
        arguments["block_size"] = 32
        arguments.update(find_quirks(config.model_type).cpu_engine)
    elif with_routes:
        arguments["enable_return_routed_experts"] = True
    return arguments


def server_command(
    checkpoint: str,
    settings: Engine,
    dtype: str,
    device: torch.device,
    name: str,
    host: str,
    port: int,
) -> list[str]:
    """vLLM's OpenAI-compatible server, with the model's quirks; the environment is set for it.

    Thinking is returned separately where `<think>` and `</think>` are tokens of the model: vLLM's
    parser works on ids."""
    check_files(checkpoint)
    config = read_config(checkpoint)
    check_engine(checkpoint, config, settings, device.type, num_processes=1)
    if is_sampled_dense(config, device.type):
        raise UserError(
            f"{checkpoint}: vLLM's server has the sparse attention of a deepseek_v32 on GPUs of "
            "compute capability 9.0 and higher only: r1pipe chat asks it without"
        )
    set_environment(config, device, dtype)
    os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING")  # the server's engine has its own process
    arguments = engine_arguments(config, settings, dtype, device)
    # Callers of a server expect the model's own log-probs.
    del arguments["logprobs_mode"], arguments["disable_log_stats"]
    if device.type == "cpu":
        arguments["worker_extension_cls"] = "r1pipe.rollout.server_worker.Repaired"
    if {"<think>", "</think>"} <= set(load_tokenizer(checkpoint).get_vocab()):
        arguments["reasoning_parser"] = "deepseek_r1"
    arguments |= {"served_model_name": name, "host": host, "port": port}
    arguments |= {"uvicorn_log_level": "warning", "disable_uvicorn_access_log": True}
    # -P: files in the working folder must not shadow library modules.
    command = [
        sys.executable,
        "-P",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        checkpoint,
    ]
    for key, value in arguments.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            command += [f"--{flag}", text]
    return command


def set_environment(
    config: Any, device: torch.device, dtype: str, with_routes: bool = False
) -> None:
    """Set what vLLM reads from the environment. The user's values stay; values for an earlier
    engine that this one does not need are removed."""
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if device.type == "cpu":
        # vLLM would keep one core free and bind its threads to the others; in one process with
        # the trainer, which waits while it samples, both use all cores.
        wanted |= {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        # Eager mode leaves decorated functions of its sampler and routers to torch.compile: seconds
        # of gcc for each shape, no gain, and while one compiles, other threads' AdamW rounds
        # otherwise (torch.compiler.is_compiling() is true in all). Read when they are imported.
        wanted["TORCHDYNAMO_DISABLE"] = "1"
    elif with_routes:
        wanted["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # the one that returns routes
    if device.type == "cuda" and dtype == "float32":
        # Triton's kernels for attention and experts would round products to TF32's ten bits.
        wanted["TRITON_F32_DEFAULT"] = "ieee"
    if not has_mla(config, device.type, dtype):
        wanted["VLLM_MLA_DISABLE"] = "1"
    for name in _own_variables - wanted.keys():
        os.environ.pop(name, None)
    _own_variables.intersection_update(wanted)
    for name, value in wanted.items():
        if name not in os.environ:
            os.environ[name] = value
            _own_variables.add(name)
    if "vllm.envs" in sys.modules:  # an earlier engine has cached them
        sys.modules["vllm.envs"].disable_envs_cache()
        if device.type == "cpu":
            torch.compiler.set_stance("force_eager")  # what was decorated before


def check_engine(
    name: str,
    config: Any,
    settings: Engine,
    device_type: str,
    num_processes: int,
    trains: bool = False,
) -> None:
    """Raises UserError for what vLLM would refuse or crash on, as far as the model's config tells.
    `trains`: whether a stage sends the engine new weights. Imports no vLLM.
    """
    size = settings.tensor_parallel_size
    if num_processes % size and (trains or num_processes > 1):
        raise UserError(
            f"engine.tensor_parallel_size {size}: {num_processes} process"
            f"{'es' * (num_processes > 1)} cannot be grouped by {size}: start as many with NPROC"
        )
    if device_type == "cpu":
        check_cpu_quantization(name, config, settings)
    text = config.get_text_config()
    if heads := getattr(text, "num_attention_heads", None):
        if heads % size:
            raise UserError(
                f"engine.tensor_parallel_size {size}: the {heads} attention heads of {name} cannot "
                "be shared out evenly"
            )
        if device_type == "cpu":
            check_cpu_attention(name, text)
    longest = find_longest_context(text)
    if is_sampled_dense(text, device_type):
        context = settings.max_model_len or longest
        if context is None or context > text.index_topk:
            raise UserError(
                f"engine.max_model_len {context}: {name} is a deepseek_v32, of which vLLM can "
                f"sample index_topk, {text.index_topk}, tokens here: beyond, attention is sparse, "
                "which needs a GPU of compute capability 9.0; lower it, or raise index_topk"
            )
    if settings.max_model_len and longest and settings.max_model_len > longest:
        raise UserError(
            f"engine.max_model_len {settings.max_model_len} is more than the context of {name}, "
            f"{longest} tokens: lower it"
        )
    check_yarn(name, text, settings.max_model_len or longest or 0)
    if settings.speculative and settings.speculative.model:
        check_drafter(settings.speculative.model, name, text, settings, device_type)


SPARSE_SIZES = (512, 64, 128)
"""Latent, rotary part and head of the indexer for which vLLM's kernels of DeepSeek Sparse Attention
are made: DeepSeek-V3.2's."""


def is_sampled_dense(config: Any, device_type: str) -> bool:
    """Whether vLLM gets a deepseek_v32 as a deepseek_v3: its attention is the same up to index_topk
    tokens. vLLM 0.31 has the sparse one on Hopper and later."""
    if not has_indexer(config):
        return False
    sizes = (config.kv_lora_rank, config.qk_rope_head_dim, config.index_head_dim)
    can_select = device_type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
    return not can_select or sizes != SPARSE_SIZES


def drop_indexer(config: Any) -> Any:
    """The config of the deepseek_v3 within a deepseek_v32. vLLM leaves out weights of an indexer
    that its model has not."""
    if not has_indexer(config):  # vLLM asks what becomes of "dummy_deepseek_v32"
        config.model_type = config.model_type.replace("deepseek_v32", "deepseek_v3")
        return config
    own = ("model_type", "architectures", "layer_types", "index_topk")
    values = {key: value for key, value in config.to_dict().items() if key not in own}
    values |= find_quirks("deepseek_v3").config
    return AutoConfig.for_model("deepseek_v3", architectures=["DeepseekV3ForCausalLM"], **values)


def keep_own_config() -> None:
    """vLLM would have transformers read every deepseek_v32 as a deepseek_v3 from then on, in the
    trainer too, and give the class of deepseek_v3's configs the other's name."""
    from vllm.transformers_utils import config

    config._CONFIG_REGISTRY.pop("deepseek_v32", None)


def choose_speculation(settings: Engine, config: Any) -> Speculative | None:
    """None too for a model without the module that it would draft with, such as a student in the
    recipe of a policy that has one. Other architectures' configs count modules that no sync would
    send, and a deepseek_v32's a dense engine refuses."""
    wanted = settings.speculative
    has_module = has_mtp_layer(config.get_text_config())
    return None if wanted and wanted.method == "mtp" and not has_module else wanted


def check_drafter(drafter: str, name: str, config: Any, settings: Engine, device_type: str) -> None:
    """Raises UserError for a draft model with which vLLM cannot draft for a model of this
    config."""
    what = f"engine.speculative.model: {drafter}"
    try:
        text = read_config(drafter).get_text_config()
    except UserError as error:
        raise UserError(f"engine.speculative.model: {error}") from error
    if text.vocab_size != config.vocab_size:
        raise UserError(
            f"{what} has {text.vocab_size} tokens, {name} {config.vocab_size}: take a drafter with "
            "the policy's vocabulary, or leave out engine.speculative"
        )
    if hasattr(text, "num_nextn_predict_layers"):
        raise UserError(
            f"{what} is a {text.model_type}, whose layers vLLM would not run but take its module "
            "for multi-token prediction: take a drafter of another architecture"
        )
    if device_type == "cpu":
        check_cpu_attention(drafter, text)
    longest, wanted = (find_longest_context(part) for part in (text, config))
    wanted = settings.max_model_len or wanted
    if longest and wanted and longest < wanted:
        raise UserError(
            f"{what} has a context of {longest} tokens, the engine of {wanted}: set "
            "engine.max_model_len"
        )


def check_cpu_quantization(name: str, config: Any, settings: Engine) -> None:
    """Raises UserError for numbers with which vLLM 0.31 fails on CPU, or computes wrongly (INT8: KL
    7 from the trainer, NaN after a reload)."""
    if settings.quantization:
        raise UserError(
            f"engine.quantization {settings.quantization}: vLLM has no FP8 on CPU (float32 is "
            "refused, kernels are missing): leave it out; a training stage's fp8 emulates it"
        )
    how = getattr(config, "quantization_config", None) or {}
    how = how if isinstance(how, dict) else how.to_dict()
    groups = (how.get("config_groups") or {}).values()
    if how.get("quant_method") == "fp8":
        raise UserError(f"{name}: its weights are in FP8, with which vLLM cannot compute on CPU")
    if any(group.get("input_activations") for group in groups):
        raise UserError(
            f"{name}: quantised with its activations (W8A8), which vLLM computes wrongly on CPU: "
            "take the model that it was made from"
        )


def check_cpu_attention(name: str, config: Any) -> None:
    """Raises UserError for a head size that vLLM's CPU attention rejects with an unhelpful
    error."""
    rope, nope = (getattr(config, f"qk_{part}_head_dim", None) for part in ("rope", "nope"))
    if rope and nope:
        key, size = "qk_nope_head_dim + qk_rope_head_dim", rope + nope
    elif size := getattr(config, "head_dim", None):
        key = "head_dim"
    else:
        key = "hidden_size / num_attention_heads"
        size = config.hidden_size // config.num_attention_heads
    if size not in CPU_HEAD_SIZES:
        raise UserError(
            f"{name}: {key} is {size}; on CPU vLLM's attention needs one of "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}"
        )


def find_longest_context(config: Any) -> int | None:
    """Longest sequence in tokens, with a scaled rotary embedding's factor unless
    max_position_embeddings has it already; None if unknown."""
    longest = getattr(config, "max_position_embeddings", None)
    scaling = getattr(config, "rope_parameters", None) or {}
    # Some have one per kind of layer.
    parts = [scaling, *(part for part in scaling.values() if isinstance(part, dict))]
    parts = [part for part in parts if part.get("rope_type") not in ("yarn", "llama3", "longrope")]
    factor = max((float(part.get("factor") or 1.0) for part in parts), default=1.0)
    return longest and int(longest * max(1.0, factor))


def check_architecture(checkpoint: str, config: Any) -> None:
    """Raises UserError for a model that vLLM does not have. Imports vLLM: its environment must be
    set."""
    from vllm.model_executor.models import ModelRegistry

    # A config without a saved model names no architecture.
    default = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)
    architectures = config.architectures or [default]
    if not set(architectures) & set(ModelRegistry.get_supported_archs()):
        raise UserError(
            f"{checkpoint}: vLLM cannot run the architecture {', '.join(architectures)}"
        )


def check_files(checkpoint: str) -> None:
    """Raises UserError for a checkpoint folder from which vLLM would load other files than its
    weights."""
    check_weights(checkpoint)
    if strays := find_strays(Path(checkpoint).expanduser()):
        raise UserError(
            f"{strays[0]}: vLLM would load it beside {list_weights(strays[0].parent)[0].name}: "
            "move it elsewhere"
        )


def read_config(checkpoint: str) -> Any:
    try:
        return AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception as error:  # each architecture checks its config in its own way
        raise UserError(f"{checkpoint}: no model config: {first_line(error)}") from error


def require_moe_layers(config: Any) -> list[int]:
    """The decoder layers that have routes. Raises UserError if none has."""
    layers = find_moe_layers(config)
    if not layers:
        raise UserError(f"routing_replay: {config.model_type} is no mixture of experts")
    return layers


def describe_kind(config: Any, end_ids: list[int]) -> str:
    """Equal for two checkpoints if and only if one's weights fit the other's engine and both have
    the same end tokens, which vLLM reads once. Prompts are token ids, so chat template and
    vocabulary do not matter."""
    values = {
        key: value
        for key, value in config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version", "dtype")
    }
    return json.dumps([values, sorted(end_ids)], sort_keys=True, default=str)


def describe_error(error: Exception) -> str:
    """One line; pydantic's own text starts with a count."""
    problems = error.errors() if isinstance(error, ValidationError) else []
    if problems:
        message = problems[0]["msg"].removeprefix("Value error, ").strip()
        return message.splitlines()[0]
    return first_line(error)


def available_memory() -> int:
    """Bytes of available memory, file cache included."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0


def sampling_parameters(
    sampling: Sampling, seed: int, end_ids: list[int], *, skip_prefix_cache: bool
) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        output_kind=RequestOutputKind.FINAL_ONLY,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or -1,
        max_tokens=sampling.max_completion_length,
        stop_token_ids=end_ids,
        seed=seed,
        # Only the sampled tokens', in one list instead of an object per token.
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        skip_special_tokens=False,
        skip_reading_prefix_cache=skip_prefix_cache,
    )
