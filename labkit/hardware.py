"""What a machine can do at best: measured here, or from a data sheet, and the bound that follows for a piece of work."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import psutil
import torch

from labkit.timing import compare


@dataclass(frozen=True)
class Machine:
    """The machine a notebook runs on. ``memory_gib`` is the device's own: GPU memory if there is a GPU, else RAM."""

    name: str
    device: str  # "cuda" or "cpu"
    cores: int  # CPU cores this process may use
    memory_gib: float
    torch: str

    def __str__(self) -> str:
        return f"{self.name} ({self.device}, {self.cores} cores, {self.memory_gib:.0f} GiB, torch {self.torch})"


def quick_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies it in hardware, else float32.

    Emulated, bfloat16 takes several times as long as float32 to read a prompt, though it still reads the weights faster.
    """
    able = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot say
    return torch.bfloat16 if any(able[name] for name in able if name.endswith("bf16")) else torch.float32


@dataclass(frozen=True)
class Accelerator:
    """Data-sheet values: dense (no structured sparsity) FLOP/s, memory in bytes, bandwidth in bytes/s."""

    bf16_flops: float
    fp8_flops: float | None  # None where the hardware has no FP8 units
    bandwidth: float
    memory: float
    source: str


# Data sheets print tensor-core rates "with sparsity": those are halved here. Memory is given in decimal GB there.
ACCELERATORS = {
    "A100 80GB SXM": Accelerator(312e12, None, 2.039e12, 80e9, "https://www.nvidia.com/en-us/data-center/a100/"),
    "L4": Accelerator(121e12, 242.5e12, 300e9, 24e9, "https://www.nvidia.com/en-us/data-center/l4/"),
    "L40S": Accelerator(362e12, 733e12, 864e9, 48e9, "https://www.nvidia.com/en-us/data-center/l40s/"),
    "H100 SXM": Accelerator(989e12, 1979e12, 3.35e12, 80e9, "https://www.nvidia.com/en-us/data-center/h100/"),
    "H200 SXM": Accelerator(989e12, 1979e12, 4.8e12, 141e9, "https://www.nvidia.com/en-us/data-center/h200/"),
    "MI300X": Accelerator(
        1307e12, 2615e12, 5.3e12, 192e9, "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"
    ),
}


@dataclass(frozen=True)
class Roofline:
    """The least time a piece of work can take. ``intensity`` and ``ridge`` are in FLOP per byte moved."""

    seconds: float
    bound: str  # "compute" or "memory"
    intensity: float
    ridge: float


def machine() -> Machine:
    """Describe the machine this process runs on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Machine(properties.name, "cuda", cores, properties.total_memory / 2**30, torch.__version__)
    return Machine(_cpu_name(), "cpu", cores, psutil.virtual_memory().total / 2**30, torch.__version__)


def copy_bandwidth(*, mib: int = 256, device: str = "cpu", threads: int = 1) -> float:
    """Measured memory bandwidth in bytes/s: a device-to-device copy of ``mib`` MiB, counting bytes read plus written.

    Choose ``mib`` well above the last-level cache, or the cache is what gets measured. ``threads`` counts CPU threads.
    """
    source = torch.ones(mib * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    timings = compare({"copy": lambda: target.copy_(source)}, repeats=7, threads=threads)
    return 2 * source.nbytes / timings.seconds("copy")


def matmul_rate(*, n: int = 1024, dtype: torch.dtype = torch.float32, device: str = "cpu", threads: int = 1) -> float:
    """Measured matrix-product rate in FLOP/s: an (n, n)·(n, n) product, 2n³ FLOPs."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    timings = compare({"matmul": lambda: a @ b}, repeats=7, threads=threads)
    return 2 * n**3 / timings.seconds("matmul")


def roofline(flops: float, bytes_moved: float, *, flops_per_s: float, bytes_per_s: float) -> Roofline:
    """The roofline bound (Williams et al., 2009, https://doi.org/10.1145/1498765.1498785).

    ``flops`` in FLOP, ``bytes_moved`` in bytes to and from memory; the rates in FLOP/s and bytes/s. Work cannot end before
    its arithmetic is done, nor before its bytes are moved; at best the two overlap fully.

    Raises ``ValueError`` if a rate or both amounts are not positive.
    """
    if flops_per_s <= 0 or bytes_per_s <= 0 or flops < 0 or bytes_moved <= 0:
        raise ValueError("roofline needs positive rates, positive bytes and FLOPs that are not negative")
    compute, memory = flops / flops_per_s, bytes_moved / bytes_per_s
    return Roofline(
        seconds=max(compute, memory),
        bound="compute" if compute >= memory else "memory",
        intensity=flops / bytes_moved,
        ridge=flops_per_s / bytes_per_s,
    )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
