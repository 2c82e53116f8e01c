"""What an accelerator can do, by its name, and what it is doing, by NVML."""

from __future__ import annotations

import functools
import importlib
import math
import re
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Literal

import torch

from gsa.units import GIB
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

    The table is used for 16-bit floats on a known card. Otherwise a matrix product is timed: it stays below the peak.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        found = find_device(torch.cuda.get_device_name(device))
        if found is not None:
            return found.bf16_tflops, "table"
    return measured_tflops(device, dtype), "measured"


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


# -- what it is doing ---------------------------------------------------------------------------------

# Bits of nvml.h, a stable ABI. Left out: idle, clocks set by a person, sync boost and display, which are no fault.
THROTTLE_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}


@dataclass(frozen=True)
class GpuId:
    """How NVML is told which GPU is meant: its index there ignores CUDA_VISIBLE_DEVICES and CUDA's own order.

    uuid: as torch has it, without a prefix. pci_bus_id: domain:bus:device.function in hexadecimal.
    """

    uuid: str
    pci_bus_id: str


def visible_gpus() -> list[GpuId]:
    """The GPUs of this node that this process may use, in torch's order."""
    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found.append(GpuId(str(p.uuid), f"{p.pci_domain_id:08x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0"))
    return found


Query = Callable[[ModuleType, object], float]


def _throttle_bits(nvml: ModuleType, handle: object) -> float:
    try:
        return nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except nvml.NVMLError_FunctionNotFound:  # its name before driver 535
        return nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)


def _temperature(nvml: ModuleType, handle: object) -> float:
    try:
        return nvml.nvmlDeviceGetTemperatureV(handle, nvml.NVML_TEMPERATURE_GPU)
    except nvml.NVMLError_FunctionNotFound:  # its name before driver 570
        return nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)


_BITS = "throttle bits"
_QUERIES: dict[str, Query] = {
    "utilisation": lambda nvml, handle: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
    "power_w": lambda nvml, handle: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    "power_limit_w": lambda nvml, handle: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
    "clock_mhz": lambda nvml, handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
    "max_clock_mhz": lambda nvml, handle: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
    "memory_gib": lambda nvml, handle: nvml.nvmlDeviceGetMemoryInfo(handle).used / GIB,
    "temperature_c": _temperature,
    _BITS: _throttle_bits,
}


class Monitor:
    """Samples every visible GPU of this node in a thread; one process of a node, not every rank, should hold one.

    gpus: which; the default asks torch. nvml: the library, pynvml by default; it is a parameter because NVML itself
    runs only where there is an NVIDIA driver, and tests bring a stand-in. Nothing here raises because of NVML: a query
    that a card does not answer loses that field, an NVML that does not start leaves the monitor without samples, and
    `new_messages` says so once.
    """

    def __init__(
        self, *, interval_s: float = 0.5, gpus: Sequence[GpuId] | None = None, nvml: ModuleType | None = None
    ) -> None:
        self._interval_s = interval_s
        self._messages: list[str] = []
        self._samples: dict[tuple[int, str], list[float]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._nvml = self._open(nvml)
        if self._nvml is None:
            return
        try:
            gpus = visible_gpus() if gpus is None else gpus
        except AttributeError as err:  # of torch's properties
            self._messages.append(f"GPUs are not monitored: this torch does not tell them apart: {err}")
            return
        handles = {i: self._handle(i, gpu) for i, gpu in enumerate(gpus)}
        self._asked = [(i, h, field) for i, h in handles.items() if h is not None for field in _QUERIES]
        self._thread = threading.Thread(target=self._watch, name="gpu monitor", daemon=True)
        self._thread.start()

    def _open(self, nvml: ModuleType | None) -> ModuleType | None:
        """The library, started; None, and a message, when it is not there."""
        if nvml is None:
            try:
                nvml = importlib.import_module("pynvml")
            except ImportError:
                self._messages.append("GPUs are not monitored: pynvml is missing; pip install nvidia-ml-py")
                return None
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as err:
            self._messages.append(f"GPUs are not monitored: NVML does not start: {err}")
            return None
        return nvml

    def _handle(self, index: int, gpu: GpuId) -> object | None:
        for get, name in (
            (self._nvml.nvmlDeviceGetHandleByUUID, f"GPU-{gpu.uuid}"),
            (self._nvml.nvmlDeviceGetHandleByUUID, f"MIG-{gpu.uuid}"),
            (self._nvml.nvmlDeviceGetHandleByPciBusId, gpu.pci_bus_id),
        ):
            try:
                return get(name)
            except self._nvml.NVMLError as err:
                fault = err
        self._messages.append(f"GPU {index} ({gpu.pci_bus_id}) is not monitored: NVML does not know it: {fault}")
        return None

    def _watch(self) -> None:
        try:
            while not self._stop.is_set():
                self._sample()
                self._stop.wait(self._interval_s)
        except Exception as err:  # whatever it is, training goes on, and is told
            with self._lock:
                self._messages.append(f"GPUs are no longer monitored: {type(err).__name__}: {err}")

    def _sample(self) -> None:
        answered = []
        for index, handle, field in self._asked:
            try:
                value = float(_QUERIES[field](self._nvml, handle))
            except self._nvml.NVMLError as err:
                with self._lock:
                    self._messages.append(f"GPU {index} has no {field} from here on: {err}")
                continue
            answered.append((index, handle, field))
            with self._lock:
                self._samples.setdefault((index, field), []).append(value)
        self._asked = answered

    def read(self) -> dict[str, float | str]:
        """gpu/{i}/... of training.metrics: means of the samples since the last read; no field without a sample.

        Utilisation and "throttled" are shares, 0 to 1; throttle_reasons is there when there was one.
        """
        with self._lock:
            samples, self._samples = self._samples, {}
        row: dict[str, float | str] = {}
        for (index, field), values in samples.items():
            if field == _BITS:
                row |= _throttling(f"gpu/{index}", [int(value) for value in values])
            else:
                row[f"gpu/{index}/{field}"] = statistics.fmean(values)
        return row

    def new_messages(self) -> list[str]:
        """What has failed since the last call, one line for each."""
        with self._lock:
            messages, self._messages = self._messages, []
        return messages

    def close(self) -> None:
        """Ends the thread and lets go of NVML."""
        self._stop.set()
        if self._thread is None:
            return
        self._thread.join()
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError:
            pass  # a driver that is gone has nothing left to let go of


def _throttling(gpu: str, samples: list[int]) -> dict[str, float | str]:
    """The two fields of one GPU from its samples of NVML's bits."""
    costly = sum(THROTTLE_REASONS)
    row: dict[str, float | str] = {f"{gpu}/throttled": statistics.fmean(bool(bits & costly) for bits in samples)}
    seen = [name for bit, name in THROTTLE_REASONS.items() if any(bits & bit for bits in samples)]
    if seen:
        row[f"{gpu}/throttle_reasons"] = ",".join(seen)
    return row
