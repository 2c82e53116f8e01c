"""What the GPUs of this node are doing, sampled by NVML in a thread."""

from __future__ import annotations

import importlib
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from gsa.units import GIB

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
