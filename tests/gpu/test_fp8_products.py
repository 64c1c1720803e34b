"""Products in FP8 by the GPU against those of numbers rounded to e4m3."""

import pytest
import torch

from r1pipe.models.adapter import Target
from r1pipe.models.fp8 import Product, RoundedMatrix, multiplies_in_fp8

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not multiplies_in_fp8(CUDA, torch.bfloat16),
        reason="no CUDA device with products of e4m3 by blocks",
    ),
]


def test_three_products_are_those_of_rounded_numbers() -> None:
    """In bf16 the device computes, in float32 it is emulated: both from the same bf16 numbers."""
    torch.manual_seed(0)
    x_NI = torch.randn(300, 700, device=CUDA).bfloat16()
    weight_OI = torch.randn(200, 700, device=CUDA).bfloat16()
    gradient_NO = torch.randn(300, 200, device=CUDA).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = (t.to(dtype, copy=True).requires_grad_() for t in (x_NI, weight_OI))
        product_NO = Product.apply(x, RoundedMatrix.apply(weight, Target("", "weight")))
        product_NO.backward(gradient_NO.to(dtype))
        found.append([product_NO, x.grad, weight.grad])
    for by_device, emulated in zip(*found, strict=True):
        assert by_device.dtype == torch.bfloat16
        # bf16 keeps 8 bits; the rounded matrix, too, is bf16 there, and its codes may flip.
        error = (by_device.float() - emulated).norm() / emulated.norm()
        assert error < 0.01
