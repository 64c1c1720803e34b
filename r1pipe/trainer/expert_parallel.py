"""Expert parallelism: each rank of a group holds a part of every layer's experts, and tokens travel
to them (GShard: Lepikhin et al. 2020, arXiv:2006.16668; DeepSeek-V3, arXiv:2412.19437, section
3.2). FSDP alone gathers all experts of a layer on every rank: of DeepSeek-V3's, 23 GB.

A group are neighbouring ranks, each with tokens of its own. Ranks of equal place in the groups
share their experts by FSDP, and everything else is sharded over all ranks as without groups.
A token goes once to each rank that has experts of it, with their gate weights, and comes back
summed. Routers, replay, load counts and biases see the model's own numbers of experts.

Not transformers' `DistributedConfig(enable_expert_parallel=True)` (5.17;
tests/unit/trainer/test_kept_implementations.py shows it): all ranks of its groups compute the same
tokens; FSDP beside it is left out, or it is left out beside FSDP, without a word; its routers
return numbers within a rank, and for other ranks' experts one too many, which the experts' eager
forward and routing replay cannot index by.

Shape suffixes: N tokens of this rank, K experts of each, G ranks of a group; M rows received, one
for each token and sender; P pairs of a row and one of this rank's experts.
"""

from types import MethodType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.func import functional_call
from transformers import PretrainedConfig, PreTrainedModel

from r1pipe.models.adapter import Unbound
from r1pipe.models.shape import Shape
from r1pipe.trainer.exchange import Exchange
from r1pipe.utils.errors import UserError


def require_groups(config: PretrainedConfig, size: int, num_processes: int) -> None:
    """Raises UserError if experts or processes cannot be grouped by `size`."""
    if size == 1:
        return
    count = Shape.of(config).num_experts()
    if not count or count % size:
        what = f"{count} experts, which cannot be shared out evenly" if count else "no experts"
        raise UserError(f"expert_parallel {size}: a layer of the {config.model_type} has {what}")
    if num_processes % size:
        raise UserError(
            f"expert_parallel {size}: {num_processes} process{'es' * (num_processes > 1)} cannot "
            f"be grouped by {size}: start as many with NPROC"
        )


def share_experts(model: PreTrainedModel, groups: DeviceMesh) -> list[nn.Module]:
    """Leave each rank its part of every layer's experts, in a model that has no memory yet. Returns
    the modules of experts. `groups`: one dimension, this rank's group."""
    modules = [m for name, m in model.named_modules() if name.endswith(".experts")]
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False)):
            own = distribute_tensor(parameter, groups, [Shard(0)], src_data_rank=None)
            setattr(module, name, nn.Parameter(own, parameter.requires_grad))
        module.num_experts //= groups.size()
        module.group = groups.get_group()
        # A bound method: in a copy of the model it is bound to the copy.
        module.forward = MethodType(run_shared, module)
    return modules


def run_shared(self: nn.Module, hidden_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Tensor:
    """The forward of a layer's experts, `[N, D]`."""
    group, size = self.group, self.group.size()
    with torch.no_grad():
        owner_NK = experts_NK // self.num_experts
        goes_NG = experts_NK.new_zeros(len(hidden_ND), size).scatter(1, owner_NK, 1)
        token = goes_NG.T.nonzero()[:, 1]  # of each row sent, rank by rank
        pair = owner_NK.flatten().argsort(stable=True)
        row_NK = (goes_NG.cumsum(0) - 1).gather(1, owner_NK)
        labels = torch.stack([row_NK, experts_NK % self.num_experts], -1).flatten(0, 1)[pair]
        pairs_G = owner_NK.flatten().bincount(minlength=size)
        counts_G2 = torch.stack([goes_NG.sum(0), pairs_G], -1)
        arriving_G2 = torch.empty_like(counts_G2)
        dist.all_to_all_single(arriving_G2, counts_G2, group=group)
        (rows_out, pairs_out), (rows_in, pairs_in) = counts_G2.T.tolist(), arriving_G2.T.tolist()
        labels = Exchange.apply(labels, pairs_out, pairs_in, group)
        starts = arriving_G2[:, 0].cumsum(0) - arriving_G2[:, 0]
        row_P = labels[:, 0] + starts.repeat_interleave(arriving_G2[:, 1])
        expert_P = labels[:, 1]
    rows_MD = Exchange.apply(hidden_ND[token], rows_out, rows_in, group)
    gates_P = Exchange.apply(gates_NK.flatten()[pair], pairs_out, pairs_in, group)
    if not len(row_P):
        # Every rank must run the same collectives in its backward pass.
        rows_MD, gates_P = (
            torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])])
            for tensor in (rows_MD, gates_P)
        )
        row_P = expert_P = row_P.new_zeros(1)
    own = {f"module.{name}": p.to_local() for name, p in self.named_parameters(recurse=False)}
    arguments = (rows_MD[row_P], expert_P.unsqueeze(1), gates_P.unsqueeze(1))
    out_PD = functional_call(Unbound(self), own, arguments)
    out_MD = torch.zeros_like(rows_MD).index_add(0, row_P, out_PD)[: sum(rows_in)]
    back = Exchange.apply(out_MD, rows_in, rows_out, group)
    return torch.zeros_like(hidden_ND).index_add(0, token, back)
