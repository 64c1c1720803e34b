"""FP8 as DeepSeek-V3 trains in it (arXiv:2412.19437, section 3.3), emulated: numbers are rounded to
e4m3 and computed with in float32, or in the recipe's dtype. On any device, slower, and no smaller.

- Matrices have a scale for each block of 128 x 128, activations and their gradients one for each
  128 numbers along which a product adds up: of a token in the products of forward and of the
  inputs' gradient, of a channel over 128 tokens in that of the weights' gradient.
- Linear layers and experts. Embedding, head, routers, norms and attention stay as they are, and
  so do the projections to and from MLA's latent, which V3's published checkpoint has in FP8 too.
- The gradient of rounding a matrix is that of leaving it: master weights are the checkpoint's.

Not as there: the input of the layer after attention has V3's 1 x 128 tiles, not E5M6.

Shape suffixes: N tokens; I, O a matrix's inputs and outputs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear, pad
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from r1pipe.models.adapter import Target, Unbound, list_matrices

BLOCK = 128
LARGEST = 448.0
"""Of e4m3."""
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
"""To and from the latents of MLA."""


@dataclass
class Rounding:
    """What a model rounds in its forward and backward passes: shared by its modules."""

    weights: bool
    activations: bool


# --- Rounding -----------------------------------------------------------------------------------


def round_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """`[..., R, C]` in its dtype: each block of `rows` x `columns`, the last ones smaller, is
    divided by its scale, largest / 448, rounded to e4m3, and multiplied.

    A number that is NaN or infinite makes its whole block NaN. Blocks below 5e-36 lose precision.
    """
    *_, num_rows, num_columns = x.shape
    padded = pad(x.float(), (0, -num_columns % columns, 0, -num_rows % rows))
    blocks = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    smallest = LARGEST * torch.finfo(torch.float32).tiny  # of which the scale is no denormal
    largest = blocks.abs().amax((-3, -1), keepdim=True).clamp(min=smallest)
    codes = (blocks / (largest / LARGEST)).to(torch.float8_e4m3fn)
    # In this order the largest comes back bit by bit: rounded once more, nothing changes.
    rounded = codes.float() / LARGEST * largest
    return rounded.flatten(-4, -3).flatten(-2)[..., :num_rows, :num_columns].to(x.dtype)


def list_rounded(model: PreTrainedModel) -> Iterator[Target]:
    """The matrices that are rounded."""
    return (target for target in list_matrices(model) if target.key not in LATENT)


def round_matrix(weight: Tensor, target: Target) -> Tensor:
    """`[..., O, I]` by blocks; of two fused matrices each has its own."""
    is_pair = target.name == "gate_up_proj" and not target.is_transposed
    pair = weight.unflatten(-2, (2 if is_pair else 1, -1))
    return round_blocks(pair, BLOCK, BLOCK).flatten(-3, -2)


# --- The products -------------------------------------------------------------------------------


class RoundedMatrix(torch.autograd.Function):
    """`round_matrix`, through which the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, target: Target) -> Tensor:
        return round_matrix(weight, target)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Product(torch.autograd.Function):
    """x W^T and its gradients, from a matrix that is rounded already (V3, figure 6)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        x_NI = round_blocks(x.reshape(-1, x.shape[-1]).float(), 1, BLOCK)
        ctx.save_for_backward(x_NI, weight_OI)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return (x_NI @ weight_OI.float().mT).to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_NI, weight_OI = ctx.saved_tensors
        gradient_NO = gradient.reshape(-1, gradient.shape[-1]).float()
        of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            product_NI = round_blocks(gradient_NO, 1, BLOCK) @ weight_OI.float()
            of_input = product_NI.to(ctx.dtype).reshape(ctx.shape)
        if ctx.needs_input_grad[1]:
            # Forward's tiles, rounded once more along the tokens (V3, section 3.5.2).
            tiles_NO, tiles_NI = (round_blocks(t, BLOCK, 1) for t in (gradient_NO, x_NI))
            of_weight = (tiles_NO.mT @ tiles_NI).to(weight_OI.dtype)
        return of_input, of_weight


class Products(TorchFunctionMode):
    """Inside the context, products with a matrix are `Product`: those of experts' own forward."""

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if function is linear:
            return multiply(*args, **(kwargs or {}))
        if function is Tensor.matmul:  # gpt_oss, whose matrices are [I, O]
            x, weight_IO = args
            return multiply(x, weight_IO.mT)
        return function(*args, **(kwargs or {}))


def multiply(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    product = Product.apply(x, weight_OI)
    return product if bias_O is None else product + bias_O


# --- Models -------------------------------------------------------------------------------------


def add_fp8(model: PreTrainedModel, *, is_on: bool) -> int:
    """Make the model's linear layers and experts compute in FP8 if it `is_on`, else only round
    within `computing_as_sampler`. Names stay. Returns the number of matrices."""
    model.rounding = Rounding(is_on, is_on)
    modules = dict(model.named_modules())
    targets: dict[str, list[Target]] = {}
    for target in list_rounded(model):
        targets.setdefault(target.path, []).append(target)
    for path, own in targets.items():
        module = modules[path]
        module.rounding, module.rounded = model.rounding, own
        # A bound method: in a copy of the model it is bound to the copy.
        is_linear = isinstance(module, nn.Linear)
        module.forward = MethodType(run_linear if is_linear else run_experts, module)
    if is_on and any(path.endswith(".experts") for path in targets):
        model.set_experts_implementation("eager")  # one product for each expert
    return sum(map(len, targets.values()))


@contextmanager
def computing_as_sampler(model: PreTrainedModel, *, weights: bool) -> Iterator[None]:
    """Within it the model rounds its weights or nothing, as a sampler that was given these weights.
    No-op without `add_fp8`."""
    rounding = getattr(model, "rounding", None) or Rounding(False, False)
    before = rounding.weights, rounding.activations
    rounding.weights, rounding.activations = weights, False
    try:
        yield
    finally:
        rounding.weights, rounding.activations = before


def run_linear(self: nn.Linear, x: Tensor) -> Tensor:
    if not self.rounding.weights:
        return type(self).forward(self, x)
    weight_OI = RoundedMatrix.apply(self.weight, self.rounded[0])
    run = multiply if self.rounding.activations else linear
    return run(x, weight_OI, self.bias)


def run_experts(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The experts' own forward with rounded matrices in the place of the layer's own."""
    if not self.rounding.weights:
        return type(self).forward(self, *args, **kwargs)
    matrices = {
        f"module.{target.name}": RoundedMatrix.apply(getattr(self, target.name), target)
        for target in self.rounded
    }
    with Products() if self.rounding.activations else nullcontext():
        return functional_call(Unbound(self), matrices, args, kwargs)
