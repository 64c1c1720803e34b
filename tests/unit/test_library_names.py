"""Names of other libraries that no version promises to keep: private ones, and those whose place or
arguments have changed before.

Every one that r1pipe touches stands in NAMES, and the test that fails says which one a version has
not. A private name in the source that is not in the table fails as well.
"""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "r1pipe"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

FUSED_MOE = "vllm.model_executor.layers.fused_moe"
NAMES = (
    "torch._dynamo",
    "torch.compiler.set_stance",
    "torch.ops._C",
    "torch._dynamo.exc.TorchDynamoException",
    "torch.backends.mkldnn.enabled",
    "torch.distributed.distributed_c10d._get_default_store",
    "torch.distributed.elastic.multiprocessing.api.SignalException.sigval",
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError.failures",
    "torch.distributed.run.get_args_parser",
    "torch.distributed.run.run",
    "torch.nn.attention.varlen.varlen_attn",
    "transformers.AttentionInterface.register",
    "transformers.PreTrainedConfig._attn_implementation",
    "transformers.PreTrainedModel._from_config",
    "transformers.PreTrainedModel.all_tied_weights_keys",
    "transformers.PreTrainedModel.set_attn_implementation",
    "transformers.PreTrainedModel.set_experts_implementation",
    "transformers.core_model_loading.revert_weight_conversion",
    "transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS",
    "transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS",
    "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3Experts._apply_gate",
    "accelerate.PartialState._shared_state",
    "accelerate.tracking.LOGGER_TYPE_TO_CLASS",
    "vllm.LLM.apply_model",
    "vllm.LLM.collective_rpc",
    "vllm.LLM.finish_weight_update",
    "vllm.LLM.init_weight_transfer_engine",
    "vllm.LLM.llm_engine",
    "vllm.LLM.reset_prefix_cache",
    "vllm.LLM.sleep",
    "vllm.LLM.start_weight_update",
    "vllm.LLM.update_weights",
    "vllm.LLM.wake_up",
    "vllm.distributed.aux_output_connector.worker.get_tp_group",
    "vllm.distributed.destroy_model_parallel",
    "vllm.distributed.device_communicators.pynccl.PyNcclCommunicator.available",
    "vllm.distributed.device_communicators.pynccl.PyNcclCommunicator.destroy",
    "vllm.distributed.weight_transfer.nccl_common.trainer_init",
    "vllm.distributed.weight_transfer.nccl_engine.NCCLWeightTransferEngine.model_update_group",
    "vllm.distributed.weight_transfer.packed_tensor.packed_nccl_broadcast_producer",
    "vllm.envs.disable_envs_cache",
    "vllm.inputs.tokens_input",
    "vllm.ir.op.IrOp.impls",
    "vllm.ir.op.IrOp.register_impl",
    "vllm.ir.ops.fused_add_rms_norm",
    "vllm.ir.ops.rms_norm",
    "vllm.logprobs.FlatLogprobs.logprobs",
    "vllm.model_executor.model_loader.reload.layerwise.get_layerwise_info",
    "vllm.model_executor.model_loader.reload.types.LayerReloadingInfo.can_load",
    "vllm.model_executor.model_loader.reload.types.LayerReloadingInfo.load_numel",
    "vllm.model_executor.models.ModelRegistry.get_supported_archs",
    "vllm.model_executor.models.utils.get_spec_layer_idx_from_weight_name",
    "vllm.outputs.CompletionOutput.routed_experts",
    "vllm.sampling_params.RequestOutputKind.FINAL_ONLY",
    "vllm.transformers_utils.config._CONFIG_REGISTRY",
    "vllm.v1.core.sched.scheduler.Scheduler.make_spec_decoding_stats",
    "vllm.v1.core.sched.scheduler.Scheduler.num_spec_tokens",
    "vllm.v1.core.sched.scheduler.Scheduler.requests",
    "vllm.platforms.cpu.CpuPlatform.register_triton_kernel_overrides",
    "vllm.triton_utils.dispatcher._rebind_kernels",
    "vllm.triton_utils.dispatcher._registry",
    "vllm.triton_utils.dispatcher.sys",
    "vllm.v1.engine.core.cleanup_dist_env_and_memory",
    "vllm.v1.engine.core.freeze_gc_heap",
    "vllm.v1.engine.core.EngineCore.batch_queue",
    "vllm.v1.engine.core.EngineCore.scheduler",
    "vllm.v1.engine.core_client.InprocClient.engine_core",
    "vllm.v1.engine.llm_engine.LLMEngine.abort_request",
    "vllm.v1.engine.llm_engine.LLMEngine.add_request",
    "vllm.v1.engine.llm_engine.LLMEngine.engine_core",
    "vllm.v1.engine.llm_engine.LLMEngine.has_unfinished_requests",
    "vllm.v1.engine.llm_engine.LLMEngine.model_config",
    "vllm.v1.engine.llm_engine.LLMEngine.step",
    "vllm.v1.outputs.LogprobsTensors.selected_token_ranks",
    "vllm.v1.request.Request.num_output_tokens",
    "vllm.v1.sample.metadata.SamplingMetadata.temperature",
    "vllm.v1.sample.ops.topk_topp_sampler.TopKTopPSampler.forward",
    "vllm.v1.sample.rejection_sampler.expand_batch_to_tokens",
    "vllm.v1.sample.ops.topk_topp_sampler.apply_top_k_top_p",
    "vllm.v1.sample.sampler.Sampler.topk_topp_sampler",
    "vllm.v1.spec_decode.metadata.SpecDecodeMetadata.draft_token_ids",
    "vllm.v1.spec_decode.metadata.SpecDecodeMetadata.num_draft_tokens",
    "vllm.v1.worker.gpu_input_batch.InputBatch.num_computed_tokens_cpu",
    "vllm.v1.worker.gpu_input_batch.InputBatch.num_prompt_tokens",
    "vllm.v1.worker.gpu_input_batch.InputBatch.num_tokens_no_spec",
    "vllm.v1.worker.gpu_input_batch.InputBatch.req_ids",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.execute_model",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.get_model",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.input_batch",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.rejection_sampler",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.requests",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.sampler",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.speculative_config",
    "vllm.v1.worker.gpu_worker.Worker.device",
    "vllm.v1.worker.gpu_worker.Worker.get_draft_model",
    "vllm.v1.worker.gpu_worker.Worker.get_model",
    "vllm.v1.worker.gpu_worker.Worker.model_runner",
    "vllm.v1.worker.gpu_worker.Worker.reload_weights",
    "vllm.v1.worker.gpu_worker.Worker.weight_transfer_engine",
    "vllm.v1.worker.worker_base.WorkerBase.speculative_config",
    f"{FUSED_MOE}.layer.MoERunner.layer_id",
    f"{FUSED_MOE}.layer.MoERunner.routed_experts",
    f"{FUSED_MOE}.layer.MoERunner.router",
    f"{FUSED_MOE}.fused_moe_method_base.FusedMoEMethodBase.moe_kernel",
    f"{FUSED_MOE}.router.base_router.BaseRouter.global_num_experts",
    f"{FUSED_MOE}.router.base_router.BaseRouter.set_capture_fn",
    f"{FUSED_MOE}.router.base_router.BaseRouter.top_k",
    "verifiers.EnvGroup._route_child_input",
)


@pytest.mark.parametrize("name", NAMES)
def test_is_there(name: str) -> None:
    if name.startswith("verifiers."):
        pytest.importorskip("verifiers")  # an extra
    owner, last = find_owner(name)
    there = hasattr(owner, last) or (inspect.isclass(owner) and is_attribute(owner, last))
    assert there, f"{name} is missing"


def find_owner(name: str) -> tuple[object, str]:
    """The module or class that the last part of a dotted name belongs to, and that part."""
    *path, last = name.split(".")
    owner: object = importlib.import_module(path[0])
    for depth, part in enumerate(path[1:], 2):
        if not hasattr(owner, part):
            importlib.import_module(".".join(path[:depth]))
        owner = getattr(owner, part)
    return owner, last


def is_attribute(kind: type, name: str) -> bool:
    """Whether the class, or one that it comes from, gives it to its instances."""
    declared = (
        {field.name for field in dataclasses.fields(kind)}
        if hasattr(kind, "__dataclass_fields__")
        else set()
    )
    own = [parent for parent in kind.__mro__ if parent.__module__.partition(".")[0] != "builtins"]
    written = (inspect.getsource(parent) for parent in own)
    return name in declared or any(re.search(rf"\bself\.{name}\b", text) for text in written)


def test_the_table_is_whole() -> None:
    """Private names that the package itself does not define are another library's."""
    used: dict[str, str] = {}
    own: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        foreign: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("r1pipe"):
                foreign |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ClassDef):
                # A private method of a library's class is overridden, not defined.
                overrides = any(isinstance(b, ast.Name) and b.id in foreign for b in node.bases)
                names = {n.name for n in node.body if isinstance(n, FUNCTIONS)}
                if overrides:
                    used |= {name: path.name for name in names if is_private(name)}
                else:
                    own |= names
            elif isinstance(node, FUNCTIONS):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                if isinstance(node.ctx, ast.Store):
                    own.add(node.attr)
                else:
                    used.setdefault(node.attr, path.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
    listed = {name.rpartition(".")[2] for name in NAMES}
    assert {"_get_default_store", "_attn_implementation"} <= used.keys(), "the search finds nothing"
    missing = {name: file for name, file in used.items() if name not in own | listed}
    assert not missing


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_exit"


def test_nothing_of_torch_that_differs_by_build() -> None:
    """torch._C has other names in the builds for CUDA than in those for the CPU."""
    for path in PACKAGE.rglob("*.py"):
        assert "torch._C" not in path.read_text(), path
