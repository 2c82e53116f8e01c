"""Devices are found by name or given by numbers; peaks come from the table of vendors' figures or from a measurement."""

from __future__ import annotations

import pytest
import torch

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
