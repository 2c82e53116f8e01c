"""What a GPU can do is what its maker says; what it is doing is what NVML says, or nothing, and never a crash."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from training.observe import gpu_monitor
from training.observe.gpu_monitor import GpuId, Monitor
from training.planning import devices
from training.planning.devices import DEVICES, find_device, measured_tflops, parse_device, peak_tflops

# -- the table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "torch_name, name",
    [
        ("NVIDIA A40", "A40"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100-PCIE-40GB", "A100-40"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_a_card_is_known_by_the_name_torch_gives_it(torch_name, name):
    assert find_device(torch_name).name == name


@pytest.mark.parametrize(
    "torch_name",
    [
        "NVIDIA RTX A4000",
        "NVIDIA L40",
        "NVIDIA GB200",
        "NVIDIA H200 NVL",
        "NVIDIA H100 NVL",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA GeForce RTX 4090",
        "x86_64",
    ],
)
def test_a_card_with_a_similar_name_is_unknown(torch_name):
    assert find_device(torch_name) is None


def test_a_pcie_card_has_the_peak_of_the_sxm_module_and_the_link_of_a_slot():
    module, card = find_device("NVIDIA A100-SXM4-80GB"), find_device("NVIDIA A100 80GB PCIe")
    assert card.bf16_tflops == module.bf16_tflops and card.link_gb_s == DEVICES["L40S"].link_gb_s < module.link_gb_s


def test_a_device_is_given_by_its_name_in_any_case_or_by_numbers():
    assert parse_device("h100-pcie") is DEVICES["H100-PCIe"] and parse_device(" L40s ") is DEVICES["L40S"]
    custom = parse_device("44.4,149.7,25")
    assert (custom.memory_gib, custom.bf16_tflops, custom.link_gb_s) == (44.4, 149.7, 25)
    assert custom.memory_gb_s is None  # unknown unless it is given
    assert parse_device("44.4,149.7,25,696").memory_gb_s == 696


@pytest.mark.parametrize("text", ["H900", "", "44,100", "44,100,25,1,1", "44,-1,25", "44,nan,25", "44;100;25"])
def test_an_unknown_device_is_refused_with_the_known_names(text):
    with pytest.raises(ValueError, match=r"not known; give one of A40, A6000, .*<GiB>,<TFLOPs>,<GB/s"):
        parse_device(text)


# -- the peak -----------------------------------------------------------------------------------------


def test_the_peak_of_an_unknown_device_is_measured_once():
    measured_tflops.cache_clear()
    cpu = torch.device("cpu")
    tflops, source = peak_tflops(cpu, torch.float32)
    assert source == "measured"
    # a CPU lies between these, however busy
    assert 1e-5 < tflops < 10
    assert peak_tflops(cpu, torch.float32) == (tflops, "measured")  # not timed again: no two timings are equal


def test_the_table_gives_a_known_cards_peak_for_16_bit_floats_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A40")
    monkeypatch.setattr(devices, "measured_tflops", lambda device, dtype: 30.0)
    card = torch.device("cuda", 0)
    assert peak_tflops(card, torch.bfloat16) == (149.7, "table")
    assert peak_tflops(card, torch.float32) == (30.0, "measured")


# -- NVML ---------------------------------------------------------------------------------------------


class NVMLError(Exception):
    pass


class NotFound(NVMLError):
    pass


class StandIn:
    """The part of pynvml that Monitor calls, for two cards: NVML numbers them the other way round than torch.

    Each query of a card reads a list of values, the last one for ever; an exception among them is raised.
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
        return "card a"

    def nvmlDeviceGetHandleByPciBusId(self, bus):
        self.asked_for.append(bus)
        if bus != "00000000:0b:00.0":
            raise NotFound("Not Found")
        return "card b"

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
    """A monitor that has taken exactly so many samples, closed."""
    monitor = Monitor(interval_s=60, gpus=gpus, nvml=nvml)  # its thread takes one at once
    deadline = time.monotonic() + 5
    while len(monitor._samples.get((0, "memory_gib"), [])) < 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    monitor.close()
    for _ in range(samples - 1):
        monitor._sample()
    return monitor


def test_a_row_has_the_means_of_the_samples_since_the_last_row():
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
        # capped in one of two samples; idle in the other, which is no fault
        "gpu/0/throttled": 0.5,
        "gpu/0/throttle_reasons": "power cap",
    }
    assert monitor.read() == {}
    assert monitor.new_messages() == []
    assert nvml.started == nvml.ended == 1


def test_a_thread_samples_until_it_is_closed():
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


def test_cards_are_found_by_what_they_are_not_by_their_number():
    nvml = StandIn()
    row = sampled(nvml, gpus=(A, B)).read()
    assert nvml.asked_for == ["GPU-aaaa", "GPU-bbbb", "MIG-bbbb", "00000000:0b:00.0"]
    assert {key.split("/")[1] for key in row} == {"0", "1"}


def test_no_throttling_has_no_reasons():
    row = sampled(StandIn(bits=[0x01 | 0x02 | 0x10])).read()
    assert row["gpu/0/throttled"] == 0.0 and "gpu/0/throttle_reasons" not in row


def test_a_query_that_a_card_does_not_answer_costs_that_field_and_is_said_once():
    monitor = sampled(StandIn(power=[NVMLError("Not Supported")]), samples=3)
    row = monitor.read()
    assert "gpu/0/power_w" not in row and row["gpu/0/clock_mhz"] == 1900.0 and len(row) == 8
    assert monitor.new_messages() == ["GPU 0 has no power_w from here on: Not Supported"]
    assert monitor.new_messages() == []


def test_an_older_driver_is_asked_by_older_names():
    unknown = [NotFound("Function Not Found")]
    nvml = StandIn(bits=unknown, temperature=unknown, **{"old bits": [0x40], "old temperature": [92]})
    row = sampled(nvml).read()
    assert row["gpu/0/throttle_reasons"] == "hardware thermal" and row["gpu/0/temperature_c"] == 92


def test_a_card_that_nvml_does_not_know_costs_that_card():
    monitor = sampled(StandIn(), gpus=(A, GpuId("cccc", "00000000:0c:00.0")))
    assert {key.split("/")[1] for key in monitor.read()} == {"0"}
    assert monitor.new_messages() == ["GPU 1 (00000000:0c:00.0) is not monitored: NVML does not know it: Not Found"]


def test_an_nvml_that_does_not_start_costs_the_monitor_and_not_the_training():
    nvml = StandIn()
    nvml.nvmlInit = lambda: (_ for _ in ()).throw(NVMLError("Driver Not Loaded"))
    monitor = Monitor(gpus=(A,), nvml=nvml)
    assert monitor.read() == {}
    assert monitor.new_messages() == ["GPUs are not monitored: NVML does not start: Driver Not Loaded"]
    monitor.close()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monitor = Monitor(gpus=(A,))
    assert monitor.read() == {} and "pip install nvidia-ml-py" in monitor.new_messages()[0]


def test_whatever_happens_in_the_thread_ends_the_thread_alone():
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
