"""Each GPU is found by its exact name, and its peak is the datasheet's."""

from __future__ import annotations

import pytest

from nanogauge.errors import BadInput
from nanogauge.hardware import Gpu, all_gpus, find_gpu, from_properties, lookup

PEAKS = {  # dense TFLOP/s with fp32 accumulation, as the datasheets and white papers print them
    "RTX 3090": ("bfloat16", 71.0),
    "RTX 4070": ("bfloat16", 58.3),
    "RTX 4090": ("bfloat16", 165.2),
    "RTX 5090": ("bfloat16", 209.5),
    "A100 40GB": ("bfloat16", 312.0),
    "A100 80GB": ("bfloat16", 312.0),
    "H100 SXM": ("bfloat16", 989.4),
    "H100 PCIe": ("bfloat16", 756.0),
    "L4": ("bfloat16", 121.0),
    "T4": ("float16", 65.0),
    "V100 16GB": ("float16", 125.0),
    "V100 32GB": ("float16", 125.0),
}


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_is_the_datasheets(name: str) -> None:
    dtype, tflops = PEAKS[name]
    assert lookup(name, dtype).peak_flops == pytest.approx(tflops * 1e12, rel=0.005)


def test_every_row_names_its_sources() -> None:
    """No number without where it is from: the datasheet's, and the measured one's."""
    for gpu in all_gpus():
        assert len(gpu.source) > 10, gpu.name
        assert (gpu.matmul_tflops is None) == (gpu.matmul_source is None), gpu.name


def rows_and_spellings() -> list[tuple[Gpu, str]]:
    return [(gpu, name) for gpu in all_gpus() for name in (gpu.name, *gpu.driver_names)]


@pytest.mark.parametrize(("gpu", "name"), rows_and_spellings(), ids=lambda v: getattr(v, "name", v))
def test_every_spelling_finds_its_own_row(gpu: Gpu, name: str) -> None:
    """By name and memory exactly, and neither case nor maker matters.

    Drivers show up to 7 % less memory than is on the board; that must not choose a neighbour
    (4070 and 4070 SUPER). Without the memory, only boards that compute alike may share a name.
    """
    for share in (1.0, 0.93):
        assert find_gpu(name, int(share * gpu.memory_gib * 2**30)) is gpu
    found = find_gpu(name)
    assert found is not None
    if found is not gpu:
        assert found.flop_per_clock_per_sm == gpu.flop_per_clock_per_sm
        assert (found.sms, found.boost_ghz) == (gpu.sms, gpu.boost_ghz)
        assert found.memory_gib != gpu.memory_gib
    assert find_gpu(name.upper()) is found
    assert find_gpu("NVIDIA " + name.removeprefix("NVIDIA ")) is found


def test_no_two_rows_have_one_name() -> None:
    """The name that people type says which row is meant, without a memory size."""
    for gpu in all_gpus():
        assert find_gpu(gpu.name) is gpu


def test_boards_of_one_name_are_told_apart_by_their_memory() -> None:
    """The driver calls both 4060 Ti the same."""
    for gib in (8, 16):
        gpu = find_gpu("NVIDIA GeForce RTX 4060 Ti", int(0.97 * gib * 2**30))
        assert gpu is not None
        assert gpu.memory_gib == gib


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "RTX 4070"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti"),
        ("NVIDIA RTX A4000", "RTX 4070"),
        ("NVIDIA L40S", "L4"),
        ("RTX 407", "RTX 4070"),
        ("4070", "RTX 4070"),
        ("", "none"),
    ],
)
def test_a_part_of_a_name_is_no_name(name: str, near: str) -> None:
    """A laptop's 4070 has 36 SMs, a 4070 Ti SUPER 66: neither is any row here."""
    assert find_gpu(name, 12 * 2**30) is None
    with pytest.raises(BadInput) as refused:
        lookup(name, "bfloat16")
    assert near in str(refused.value).partition("nearest:")[2]


@pytest.mark.parametrize("name", ["T4", "V100 16GB", "V100 32GB"])
def test_a_card_without_bfloat16_says_what_to_use(name: str) -> None:
    with pytest.raises(BadInput, match="float16 or float32"):
        lookup(name, "bfloat16")


def test_a_card_without_a_row_is_computed_from_its_own_properties() -> None:
    """36 SMs of Ada at 2.175 GHz: 36 x 512 x 2.175 = 40.1 TFLOP/s; what is not known is None."""
    hardware = from_properties(
        "NVIDIA GeForce RTX 4070 Laptop GPU", (8, 9), 36, 8 * 2**30, 2.175e9, 115.0, "bfloat16"
    )
    assert hardware.peak_flops == pytest.approx(40.1e12, rel=0.001)
    assert "driver's highest clock" in hardware.peak_name
    assert hardware.power_limit_watts == 115.0
    assert hardware.memory_bytes == 8 * 2**30
    assert hardware.bandwidth_bytes_per_second is None
    assert hardware.matmul_flops is None


def test_a_rows_rate_is_that_of_its_compute_capability() -> None:
    """The 4070 as an unknown card, at its own boost clock, has the peak of its row."""
    row = find_gpu("RTX 4070")
    assert row is not None
    for dtype in ("bfloat16", "float16", "float32"):
        computed = from_properties("x", (8, 9), row.sms, 0, row.boost_ghz * 1e9, None, dtype)
        assert computed.peak_flops == pytest.approx(row.peak_flops(dtype))


@pytest.mark.parametrize(
    ("capability", "clock", "dtype"),
    [((99, 0), 2e9, "bfloat16"), ((8, 9), None, "bfloat16"), ((7, 5), 2e9, "bfloat16")],
    ids=["unknown capability", "unknown clock", "no such units"],
)
def test_a_peak_that_is_not_known_is_none(
    capability: tuple[int, int], clock: float | None, dtype: str
) -> None:
    """Never another card's, and never zero: MFU is then not measured."""
    hardware = from_properties("Strange card", capability, 60, 2**34, clock, None, dtype)
    assert hardware.peak_flops is None
    assert "Strange card" in hardware.peak_name
