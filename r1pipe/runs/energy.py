"""Energy counters of the machine, where it has any that this process may read.

GPUs: NVML's total energy (Volta and newer; needs the package nvidia-ml-py). CPUs: RAPL's package
counters under /sys/class/powercap, which many systems let only root read, and virtual machines do
not have. RAPL counts all that the machine does, other programs included; memory is not in it.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules since the last look, summed over `counters`; None if there are none.

    Each counter gives joules since some time in the past; `wraps` says at how many it starts over.
    """

    def __init__(self, counters: list[Callable[[], float]], wraps: list[float | None]):
        self._counters, self._wraps = counters, wraps
        self._last = [read() for read in counters]

    def read(self) -> float | None:
        """Joules since the last call, or since the meter was made."""
        try:
            now = [read() for read in self._counters]
        except Exception:  # a counter that has gone, in NVML's own words: a run goes on without
            self._counters = []
        if not self._counters:
            return None
        total = 0.0
        for before, after, wrap in zip(self._last, now, self._wraps, strict=True):
            total += after - before + (wrap if wrap and after < before else 0.0)
        self._last = now
        return total


def open_rapl(root: Path = POWERCAP) -> EnergyMeter:
    """One counter per processor package; microjoules in a file."""
    counters, wraps = [], []
    for zone in sorted(root.glob("intel-rapl:*")):  # AMD's as well
        if zone.name.count(":") > 1:
            continue  # a part of a package
        with contextlib.suppress(OSError, ValueError):
            read_microjoules(zone / "energy_uj")
            wraps.append(read_microjoules(zone / "max_energy_range_uj"))
            counters.append(lambda path=zone / "energy_uj": read_microjoules(path))
    return EnergyMeter(counters, wraps)


def read_microjoules(path: Path) -> float:
    """In joules."""
    return int(path.read_text()) / 1e6


def open_nvml(uuids: list[str]) -> EnergyMeter:
    """One counter per GPU. By UUID: CUDA's numbers are not NVML's."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]

        def counter(handle: object) -> Callable[[], float]:
            return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3

        return EnergyMeter([counter(handle) for handle in handles], [None] * len(handles))
    except Exception:  # of pynvml, which may be missing, or of a GPU that keeps no count
        return EnergyMeter([], [])
