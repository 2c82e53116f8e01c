"""What an accelerator can do, by its name."""

from __future__ import annotations

import functools
import math
import re
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch

from training.config import ConfigError


@dataclass(frozen=True)
class Device:
    """Capacity and peaks of one accelerator.

    memory_gib: memory that CUDA offers to processes (torch calls it the total capacity), in units of 2**30 bytes.
    bf16_tflops: dense peak of the tensor cores, in 10**12 operations per second; a multiply-add is two operations.
    fp32_tflops: peak without tensor cores, which torch uses for float32 by default; None when unknown.
    memory_gb_s: bandwidth of the memory, in 10**9 bytes per second; None when unknown.
    link_gb_s: bandwidth to the other GPUs that collectives reach, per GPU and direction, in 10**9 bytes per second.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float | None
    memory_gb_s: float | None
    link_gb_s: float


# Peaks and bandwidths are from the maker's data sheets; where a sheet gives the peak with sparsity (H100), half of it.
# Memory is the total capacity in torch's out-of-memory messages from such cards, 1-2 % below what the driver lists.
# Links: a slot of PCIe 4 x16 has 32 GB/s each way, of PCIe 5 64; NVLink of A100, H100 and B200 has 300, 450 and 900.
# Protocols take about a fifth of that (NCCL's maintainers give 370 of 450). NVLink bridges connect A40, A6000 and PCIe
# cards in pairs only and are left out: a ring over four cards crosses a slot.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("A40", 44.4, 149.7, 37.4, 696.0, 25.0),
        Device("A6000", 47.5, 154.8, 38.7, 768.0, 25.0),
        Device("A100-40", 39.4, 312.0, 19.5, 1555.0, 240.0),
        Device("A100-80", 79.1, 312.0, 19.5, 2039.0, 240.0),
        Device("L40S", 44.4, 362.0, 91.6, 864.0, 25.0),
        Device("H100", 79.1, 989.4, 66.9, 3350.0, 370.0),
        Device("H100-PCIe", 79.1, 756.5, 51.2, 2000.0, 50.0),
        Device("H200", 139.8, 989.4, 66.9, 4800.0, 370.0),
        Device("B200", 178.3, 2250.0, None, 8000.0, 740.0),
    )
}

_TORCH_NAMES: dict[str, Device | None] = {
    "a40": DEVICES["A40"],
    "rtx a6000": DEVICES["A6000"],
    "a100-sxm4-40gb": DEVICES["A100-40"],
    "a100-sxm4-80gb": DEVICES["A100-80"],
    # PCIe cards with the chip of the SXM modules
    "a100-pcie-40gb": replace(DEVICES["A100-40"], link_gb_s=25.0),
    "a100 80gb pcie": replace(DEVICES["A100-80"], memory_gb_s=1935.0, link_gb_s=25.0),
    "l40s": DEVICES["L40S"],
    "h100 80gb hbm3": DEVICES["H100"],
    "h100 pcie": DEVICES["H100-PCIe"],
    "h200": DEVICES["H200"],
    "h200 nvl": None,  # lower clocks than the module of that name
    "b200": DEVICES["B200"],
}
"""Words of torch.cuda.get_device_name in lower case. None marks a card that a shorter entry would wrongly match."""


def find_device(torch_name: str) -> Device | None:
    """The device with this torch.cuda.get_device_name, by the longest entry that it contains; None when unknown.

    A MIG slice is unknown, since it has only a part of its card's peak.
    """
    name = torch_name.lower()
    if re.search(r"\bmig\b", name):
        return None
    # whole words only: "a40" must not match "RTX A4000", nor "b200" "GB200"
    fitting = [known for known in _TORCH_NAMES if re.search(rf"(?<![a-z0-9]){known}(?![a-z0-9])", name)]
    return _TORCH_NAMES[max(fitting, key=len)] if fitting else None


def parse_device(text: str) -> Device:
    """The device that a command line names: a key of DEVICES in any case, or the numbers of another device.

    Numbers are "<GiB>,<TFLOPs>,<GB/s of the link>", with the GB/s of the memory as an optional fourth. The TFLOPs are
    the peak at the run's precision. Raises ConfigError, with the known names, for anything else.
    """
    for name, device in DEVICES.items():
        if text.strip().lower() == name.lower():
            return device
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (3, 4) or not all(math.isfinite(number) and number > 0 for number in numbers):
        raise ConfigError(
            f"GPU {text!r} is not known; give one of {', '.join(DEVICES)}, or <GiB>,<TFLOPs>,<GB/s to other GPUs>"
            f"[,<GB/s of its memory>], e.g. 44.4,149.7,25"
        )
    memory_gib, tflops, link = numbers[:3]
    return Device(text.strip(), memory_gib, tflops, tflops, numbers[3] if len(numbers) == 4 else None, link)


# -- peak ---------------------------------------------------------------------------------------------


def peak_tflops(device: torch.device, dtype: torch.dtype) -> tuple[float, Literal["table", "measured"]]:
    """The device's dense peak in 10**12 operations per second, and the origin of the number.

    The table is used for 16-bit floats on a known card. Otherwise a matrix product is timed: it stays below the peak. A
    CPU without 16-bit units multiplies float32 much faster than bfloat16; then float32 is its peak.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        found = find_device(torch.cuda.get_device_name(device))
        if found is not None:
            return found.bf16_tflops, "table"
    dtypes = {dtype, torch.float32} if device.type == "cpu" else {dtype}
    return max(measured_tflops(device, one) for one in dtypes), "measured"


@functools.cache
def measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Speed of a square matrix product in 10**12 operations per second, the best of three; measured once per process.

    The size grows until a product takes 10 ms or is 8192 x 8192: well under a second, even for a slow dtype.
    """
    size = 256
    while (seconds := _matmul_seconds(device, dtype, size)) < 0.01 and size < 8192:
        size *= 2
    return 2 * size**3 / seconds / 1e12


def _matmul_seconds(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Seconds of the fastest of three products of (size, size) matrices."""
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for trial in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if trial:  # the first product loads kernels
            best = min(best, time.perf_counter() - began)
    return best
