"""Makes torch report one Hopper GPU, for decisions before any computing. Nothing can run on it."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

DRIVER = 13010


def fake_gpu(patch: pytest.MonkeyPatch, name: str = "NVIDIA H100 80GB HBM3") -> torch.device:
    """Undone with `patch`. Patches only public names: private ones differ between the CPU's and
    CUDA's builds."""

    def get_driver_version(version: ctypes._Pointer) -> int:
        version._obj.value = DRIVER
        return 0

    properties = SimpleNamespace(name=name, total_memory=80 * 2**30, uuid="0")
    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    patch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    patch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    load = ctypes.CDLL
    driver = SimpleNamespace(cuDriverGetVersion=get_driver_version)
    patch.setattr(
        ctypes, "CDLL", lambda name, *rest: driver if name == "libcuda.so.1" else load(name, *rest)
    )
    return torch.device("cuda", 0)
