"""Samples the GPUs of this node with NVML in a background thread."""

from __future__ import annotations

import importlib
import os
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from gsa.units import GIB
from training.config import ConfigError

# Bits of nvml.h, a stable ABI. Reasons that are no fault are left out: idle, clocks that were set, sync boost, display.
THROTTLE_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}


@dataclass(frozen=True)
class GpuId:
    """Identifies a GPU to NVML, whose own indices ignore CUDA_VISIBLE_DEVICES and the order of CUDA.

    uuid: as torch gives it, without a prefix. pci_bus_id: domain:bus:device.function in hexadecimal.
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


def require_usable_gpus() -> None:
    """Raises ConfigError when the NVIDIA driver knows GPUs that torch does not see: a run would use the CPU instead.

    A person consents to that by DS_ACCELERATOR=cpu, or by CUDA_VISIBLE_DEVICES that names no GPU.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu" or visible in ("", "-1", "NoDevFiles"):
        return
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        count, driver = nvml.nvmlDeviceGetCount(), nvml.nvmlSystemGetDriverVersion()
        nvml.nvmlShutdown()
    except (
        Exception
    ):  # no driver, or not one that answers: NVML's errors are attributes of a module that may be missing
        return
    if count:
        limited = "" if visible is None else f", with CUDA_VISIBLE_DEVICES={visible}"
        raise ConfigError(
            f"the NVIDIA driver {driver} sees {count} GPU(s), and torch {torch.__version__} (CUDA "
            f"{torch.version.cuda or 'none'}) sees none{limited}; install a driver or a torch that go together, or set "
            f"DS_ACCELERATOR=cpu to use the CPU"
        )


Query = Callable[[ModuleType, object], float]


def _throttle_bits(nvml: ModuleType, handle: object) -> float:
    try:
        return nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except nvml.NVMLError_FunctionNotFound:  # the function's name before driver 535
        return nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)


def _temperature(nvml: ModuleType, handle: object) -> float:
    try:
        return nvml.nvmlDeviceGetTemperatureV(handle, nvml.NVML_TEMPERATURE_GPU)
    except nvml.NVMLError_FunctionNotFound:  # the function's name before driver 570
        return nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)


_BITS = "throttle bits"
"""Not a field of a row: `read` makes two fields of it."""
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
    """Samples GPUs in a background thread. One process per node should have one, not every rank.

    gpus: default: those that torch sees. nvml: default: pynvml; a parameter because NVML runs only where there is an
    NVIDIA driver, and tests pass a stand-in. An error of NVML never raises: a query that a GPU does not answer is not
    asked again, a GPU that NVML does not know is not sampled, without NVML nothing is; `new_messages` reports it once.
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
        except AttributeError as err:  # a torch whose device properties lack the UUID or the PCI address
            self._messages.append(f"GPUs are not monitored: this version of torch does not identify them: {err}")
            return
        handles = {i: self._handle(i, gpu) for i, gpu in enumerate(gpus)}
        self._queries = [(i, h, field) for i, h in handles.items() if h is not None for field in _QUERIES]
        self._thread = threading.Thread(target=self._watch, name="gpu monitor", daemon=True)
        self._thread.start()

    def _open(self, nvml: ModuleType | None) -> ModuleType | None:
        """The library after nvmlInit. None, with a message, when it is missing or does not start."""
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
        except Exception as err:  # nothing here may end the training
            with self._lock:
                self._messages.append(f"GPUs are no longer monitored: {type(err).__name__}: {err}")

    def _sample(self) -> None:
        working = []
        for index, handle, field in self._queries:
            try:
                value = float(_QUERIES[field](self._nvml, handle))
            except self._nvml.NVMLError as err:
                with self._lock:
                    self._messages.append(f"GPU {index}: {field} is no longer sampled: {err}")
                continue
            working.append((index, handle, field))
            with self._lock:
                self._samples.setdefault((index, field), []).append(value)
        self._queries = working

    def read(self) -> dict[str, float | str]:
        """The gpu/{i}/... fields of a row (GPU_METRICS in training/record/metric_schema.py), from the samples since the
        last call: means, and throttle_reasons where there was one. A field without a sample is left out.
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
        """What has failed since the last call, one line per failure."""
        with self._lock:
            messages, self._messages = self._messages, []
        return messages

    def close(self) -> None:
        """Ends the thread and shuts NVML down."""
        self._stop.set()
        if self._thread is None:
            return
        self._thread.join()
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError:
            pass  # the driver is gone, and with it what shutting down would release


def _throttling(gpu: str, samples: list[int]) -> dict[str, float | str]:
    """The fields "throttled" and "throttle_reasons" of one GPU, from samples of NVML's bits."""
    faults = sum(THROTTLE_REASONS)
    row: dict[str, float | str] = {f"{gpu}/throttled": statistics.fmean(bool(bits & faults) for bits in samples)}
    reasons = [name for bit, name in THROTTLE_REASONS.items() if any(bits & bit for bits in samples)]
    if reasons:
        row[f"{gpu}/throttle_reasons"] = ",".join(reasons)
    return row
