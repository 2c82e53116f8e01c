"""A row has what NVML reports about the GPUs. What NVML does not report is missing from the row; nothing fails."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest

from training.observe import gpu_monitor
from training.observe.gpu_monitor import GpuId, Monitor


class NVMLError(Exception):
    pass


class NotFound(NVMLError):
    pass


class StandIn:
    """The part of pynvml that Monitor calls, for two GPUs: one is found by its UUID, one only by its PCI address.

    Each query takes the next value of a list and repeats the last one; an exception among them is raised.
    """

    NVMLError, NVMLError_FunctionNotFound = NVMLError, NotFound
    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    def __init__(self, **changes):
        self.answers = {
            "utilisation": [90, 100],
            "power": [300_000],
            "limit": [350_000],
            "clock": [1900],
            "max_clock": [2520],
            "memory": [2**34],
            "temperature": [65],
            "bits": [0x04, 0x01],
        } | changes
        self.started = self.ended = 0
        self.asked_for: list[str] = []

    def _answer(self, name):
        values = self.answers[name]
        value = values.pop(0) if len(values) > 1 else values[0]
        if isinstance(value, Exception):
            raise value
        return value

    def nvmlInit(self):
        self.started += 1

    def nvmlShutdown(self):
        self.ended += 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.asked_for.append(uuid)
        if uuid != "GPU-aaaa":
            raise NotFound("Not Found")
        return "gpu a"

    def nvmlDeviceGetHandleByPciBusId(self, bus):
        self.asked_for.append(bus)
        if bus != "00000000:0b:00.0":
            raise NotFound("Not Found")
        return "gpu b"

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=self._answer("utilisation"), memory=0)

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._answer("power")

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return self._answer("limit")

    def nvmlDeviceGetClockInfo(self, handle, kind):
        assert kind == self.NVML_CLOCK_SM
        return self._answer("clock")

    def nvmlDeviceGetMaxClockInfo(self, handle, kind):
        assert kind == self.NVML_CLOCK_SM
        return self._answer("max_clock")

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=self._answer("memory"))

    def nvmlDeviceGetTemperatureV(self, handle, sensor):
        return self._answer("temperature")

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return self._answer("old temperature")

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return self._answer("bits")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self._answer("old bits")


A, B = GpuId("aaaa", "00000000:0a:00.0"), GpuId("bbbb", "00000000:0b:00.0")


def sampled(nvml, gpus=(A,), samples=2):
    """A closed monitor that has taken exactly this many samples."""
    monitor = Monitor(interval_s=60, gpus=gpus, nvml=nvml)  # its thread takes the first sample at once
    deadline = time.monotonic() + 5
    while len(monitor._samples.get((0, "memory_gib"), [])) < 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    monitor.close()
    for _ in range(samples - 1):
        monitor._sample()
    return monitor


def test_read_returns_means_of_the_samples_since_the_last_read():
    nvml = StandIn()
    monitor = sampled(nvml)
    assert monitor.read() == {
        "gpu/0/utilisation": 0.95,
        "gpu/0/power_w": 300.0,
        "gpu/0/power_limit_w": 350.0,
        "gpu/0/clock_mhz": 1900.0,
        "gpu/0/max_clock_mhz": 2520.0,
        "gpu/0/memory_gib": 16.0,
        "gpu/0/temperature_c": 65.0,
        # one of two samples is capped; the other is idle, which is no fault
        "gpu/0/throttled": 0.5,
        "gpu/0/throttle_reasons": "power cap",
    }
    assert monitor.read() == {}
    assert monitor.new_messages() == []
    assert nvml.started == nvml.ended == 1


def test_the_thread_samples_until_the_monitor_is_closed():
    nvml = StandIn()
    monitor = Monitor(interval_s=0.001, gpus=(A,), nvml=nvml)
    deadline = time.monotonic() + 30
    while len(monitor._samples[0, "power_w"]) <= 10:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monitor.close()
    ended_with = len(monitor._samples[0, "power_w"])
    time.sleep(0.05)
    assert len(monitor._samples[0, "power_w"]) == ended_with
    assert not monitor._thread.is_alive() and monitor._thread.daemon


def test_gpus_are_found_by_uuid_or_pci_address_not_by_index():
    nvml = StandIn()
    row = sampled(nvml, gpus=(A, B)).read()
    assert nvml.asked_for == ["GPU-aaaa", "GPU-bbbb", "MIG-bbbb", "00000000:0b:00.0"]
    assert {key.split("/")[1] for key in row} == {"0", "1"}


def test_a_row_without_throttling_has_no_reasons():
    row = sampled(StandIn(bits=[0x01 | 0x02 | 0x10])).read()
    assert row["gpu/0/throttled"] == 0.0 and "gpu/0/throttle_reasons" not in row


def test_a_query_that_a_gpu_does_not_answer_drops_its_field_with_one_message():
    monitor = sampled(StandIn(power=[NVMLError("Not Supported")]), samples=3)
    row = monitor.read()
    assert "gpu/0/power_w" not in row and row["gpu/0/clock_mhz"] == 1900.0 and len(row) == 8
    assert monitor.new_messages() == ["GPU 0: power_w is no longer sampled: Not Supported"]
    assert monitor.new_messages() == []


def test_older_drivers_are_queried_by_the_older_function_names():
    unknown = [NotFound("Function Not Found")]
    nvml = StandIn(bits=unknown, temperature=unknown, **{"old bits": [0x40], "old temperature": [92]})
    row = sampled(nvml).read()
    assert row["gpu/0/throttle_reasons"] == "hardware thermal" and row["gpu/0/temperature_c"] == 92


def test_a_gpu_that_nvml_does_not_know_is_left_out_with_a_message():
    monitor = sampled(StandIn(), gpus=(A, GpuId("cccc", "00000000:0c:00.0")))
    assert {key.split("/")[1] for key in monitor.read()} == {"0"}
    assert monitor.new_messages() == ["GPU 1 (00000000:0c:00.0) is not monitored: NVML does not know it: Not Found"]


def test_without_nvml_the_monitor_has_no_samples_and_one_message():
    nvml = StandIn()
    nvml.nvmlInit = lambda: (_ for _ in ()).throw(NVMLError("Driver Not Loaded"))
    monitor = Monitor(gpus=(A,), nvml=nvml)
    assert monitor.read() == {}
    assert monitor.new_messages() == ["GPUs are not monitored: NVML does not start: Driver Not Loaded"]
    monitor.close()


def test_the_message_about_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monitor = Monitor(gpus=(A,))
    assert monitor.read() == {} and "pip install nvidia-ml-py" in monitor.new_messages()[0]


def test_an_error_in_the_thread_ends_only_the_thread():
    nvml = StandIn(memory=[RuntimeError("a bug")])
    monitor = Monitor(interval_s=0.001, gpus=(A,), nvml=nvml)
    monitor._thread.join(timeout=5)
    assert not monitor._thread.is_alive()
    assert monitor.new_messages() == ["GPUs are no longer monitored: RuntimeError: a bug"]
    monitor.close()


def test_every_name_the_monitor_calls_is_in_the_real_library():
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed: its names cannot be compared")
    names = [name for name in dir(StandIn) if name.lower().startswith("nvml")]
    assert len(names) == 18 and [name for name in names if name not in dir(pynvml)] == []
    bits = {
        pynvml.nvmlClocksEventReasonSwPowerCap,
        pynvml.nvmlClocksEventReasonHwSlowdown,
        pynvml.nvmlClocksEventReasonSwThermalSlowdown,
        pynvml.nvmlClocksEventReasonHwThermalSlowdown,
        pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
    }
    assert set(gpu_monitor.THROTTLE_REASONS) == bits
    assert pynvml.NVML_CLOCK_SM == StandIn.NVML_CLOCK_SM
    assert pynvml.NVML_TEMPERATURE_GPU == StandIn.NVML_TEMPERATURE_GPU
    assert [field for field, _ in pynvml.c_nvmlUtilization_t._fields_] == ["gpu", "memory"]
    assert "used" in [field for field, _ in pynvml.c_nvmlMemory_t._fields_]
