"""FP8 as DeepSeek-V3 trains in it (arXiv:2412.19437, section 3.3). In bf16 on a Hopper GPU the
products are the device's own. Elsewhere they are emulated: numbers are rounded to e4m3 and computed
with in float32. On any device, slower, and no smaller.

- Matrices have a scale for each block of 128 x 128, activations and their gradients one for each
  128 numbers along which a product adds up: of a token in the products of forward and of the
  inputs' gradient, of a channel over 128 tokens in that of the weights' gradient.
- Linear layers and experts. Embedding, head, routers, norms and attention stay as they are, and so
  do the weights of V3.2's indexer's heads, and the projections to and from MLA's latent, which V3's
  published checkpoint has in FP8 too.
- The gradient of rounding a matrix is that of leaving it: master weights are the checkpoint's.

Not as there: the input of the layer after attention has V3's 1 x 128 tiles, not E5M6.

Shape suffixes: N tokens; I, O a matrix's inputs and outputs; of a product, M and N rows that add up
over K.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import ScalingType, linear, pad, scaled_mm
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from r1pipe.models.adapter import Target, Unbound, list_matrices

BLOCK = 128
LARGEST = 448.0
"""Of e4m3."""
KEPT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "weights_proj")
"""To and from the latents of MLA; and the indexer's."""


@dataclass
class Rounding:
    """What a model rounds in its forward and backward passes: shared by its modules."""

    weights: bool
    activations: bool


# --- Rounding -----------------------------------------------------------------------------------


def encode(x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Each block of `rows` x `columns` of `[..., R, C]`, the last ones filled up with 0, is divided
    by its scale, largest / 448, and rounded to e4m3: codes `[..., R / rows, rows, C / columns,
    columns]` and, in float32, the largest `[..., R / rows, 1, C / columns, 1]`.

    A number that is NaN or infinite makes its whole block NaN. Blocks below 5e-36 lose precision.
    """
    *_, num_rows, num_columns = x.shape
    padded = pad(x.float(), (0, -num_columns % columns, 0, -num_rows % rows))
    blocks = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    smallest = LARGEST * torch.finfo(torch.float32).tiny  # of which the scale is no denormal
    largest = blocks.abs().amax((-3, -1), keepdim=True).clamp(min=smallest)
    return (blocks / (largest / LARGEST)).to(torch.float8_e4m3fn), largest


def round_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """`[..., R, C]` in its dtype: what `encode` makes of it, multiplied by the scales."""
    *_, num_rows, num_columns = x.shape
    codes, largest = encode(x, rows, columns)
    # In this order the largest comes back bit by bit: rounded once more, nothing changes.
    rounded = codes.float() / LARGEST * largest
    return rounded.flatten(-4, -3).flatten(-2)[..., :num_rows, :num_columns].to(x.dtype)


def list_rounded(model: PreTrainedModel) -> Iterator[Target]:
    """The matrices that are rounded."""
    return (target for target in list_matrices(model) if target.key not in KEPT)


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


def multiplies_in_fp8(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has products of e4m3 by blocks that are good enough for `dtype`: they come
    in bf16, from compute capability 9 (10 has others) and CUDA 12.9."""
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.version.cuda is None:
        return False
    version = tuple(map(int, torch.version.cuda.split(".")[:2]))
    return torch.cuda.get_device_capability(device)[0] == 9 and version >= (12, 9)


def multiply_codes(a_MK: Tensor, b_NK: Tensor, rows: int) -> Tensor:
    """a b^T in bf16, by the device, of a in tiles of 1 x 128 and b in blocks of `rows` x 128."""
    (codes_a_MK, scales_a), (codes_b_NK, scales_b) = lay_out(a_MK, 1), lay_out(b_NK, rows)
    recipes = {1: ScalingType.BlockWise1x128, BLOCK: ScalingType.BlockWise128x128}
    product_MN = scaled_mm(codes_a_MK, codes_b_NK.mT, scales_a, recipes[1], scales_b, recipes[rows])
    return product_MN[: len(a_MK), : len(b_NK)]


def lay_out(x_RC: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Codes, padded to whole blocks of 128 x 128, and scales as cuBLAS wants them: the tiles' by
    columns; those of 128 x 128 transposed, with a multiple of 4 for each block of rows."""
    codes, largest = encode(pad(x_RC, (0, 0, 0, -len(x_RC) % BLOCK)), rows, BLOCK)
    scales_RC = (largest / LARGEST)[:, 0, :, 0]
    if rows == 1:
        scales = scales_RC.mT.contiguous().mT
    else:
        scales = pad(scales_RC, (0, -scales_RC.shape[1] % 4)).mT
    return codes.flatten(-4, -3).flatten(-2), scales


class Product(torch.autograd.Function):
    """x W^T and its gradients, from a matrix that is rounded already (V3, figure 6)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        x_NI = round_blocks(x.reshape(-1, x.shape[-1]).float(), 1, BLOCK)
        ctx.save_for_backward(x_NI, weight_OI)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        product_NO = multiply_rounded(x_NI, weight_OI, BLOCK, x.dtype)
        return product_NO.to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_NI, weight_OI = ctx.saved_tensors
        gradient_NO = gradient.reshape(-1, gradient.shape[-1]).float()
        of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            tiles_NO = round_blocks(gradient_NO, 1, BLOCK)
            product_NI = multiply_rounded(tiles_NO, weight_OI.mT, BLOCK, ctx.dtype)
            of_input = product_NI.to(ctx.dtype).reshape(ctx.shape)
        if ctx.needs_input_grad[1]:
            # Forward's tiles, rounded once more along the tokens (V3, section 3.5.2).
            tiles_NO, tiles_NI = (round_blocks(t, BLOCK, 1) for t in (gradient_NO, x_NI))
            product_OI = multiply_rounded(tiles_NO.mT, tiles_NI.mT, 1, ctx.dtype)
            of_weight = product_OI.to(weight_OI.dtype)
        return of_input, of_weight


def multiply_rounded(a_MK: Tensor, b_NK: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """a b^T, of numbers that are rounded already, by the tiles and blocks of `multiply_codes`."""
    if multiplies_in_fp8(a_MK.device, dtype):
        return multiply_codes(a_MK, b_NK, rows)
    return a_MK @ b_NK.float().mT


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
