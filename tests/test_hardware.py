"""GPUs are found by exact name, and their peaks are those of the datasheets."""

import json
from pathlib import Path

import pytest
from examples import documented_spec

import plan
from nanogauge.errors import BadInput
from nanogauge.hardware import Gpu, all_gpus, find_gpu, from_properties, from_row, lookup, read_gpus
from nanogauge.prediction.prediction import predict

PEAKS = {  # dense TFLOP/s with fp32 accumulation, as the datasheets and white papers print them
    "RTX 3090": ("bfloat16", 71.0),
    "RTX 4070": ("bfloat16", 58.3),
    "RTX 4090": ("bfloat16", 165.2),
    "RTX 5090": ("bfloat16", 209.5),
    "RTX 6000 Ada": ("bfloat16", 364.2),
    "P100": ("float32", 9.3),
    "T4": ("float16", 65.0),
    "V100 32GB": ("float16", 125.0),
    "V100S": ("float16", 130.0),
    "A10": ("bfloat16", 125.0),
    "A100 80GB": ("bfloat16", 312.0),
    "L4": ("bfloat16", 121.0),
    "L40S": ("bfloat16", 362.05),
    "H100 SXM": ("bfloat16", 989.4),
    "H100 PCIe": ("bfloat16", 756.0),
    "H200": ("bfloat16", 989.0),
    "B200": ("bfloat16", 2250.0),
    "MI250X": ("bfloat16", 191.5),
    "MI300X": ("bfloat16", 1307.4),
    "RX 7900 XTX": ("float16", 122.8),
    "Apple M2 Ultra": ("float32", 27.2),
}


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_is_the_datasheets(name: str) -> None:
    dtype, tflops = PEAKS[name]
    assert lookup(name, dtype).peak_flops == pytest.approx(tflops * 1e12, rel=0.025)


@pytest.mark.parametrize(
    ("name", "peak", "plain"),
    [("RTX 4090", 82.6, 82.6), ("A100 80GB", 156, 19.5), ("A40", 74.8, 37.4), ("T4", 8.1, 8.1)],
)
def test_tf32_and_the_plain_fp32_units_are_two_rates(name: str, peak: float, plain: float) -> None:
    hardware = lookup(name, "float32")
    assert hardware.peak_flops == pytest.approx(peak * 1e12, rel=0.01)
    assert hardware.float32_flops == pytest.approx(plain * 1e12, rel=0.01)
    assert ("TF32" in hardware.peak_name) == (name != "T4")


def test_every_row_is_whole_and_names_its_sources() -> None:
    assert len(all_gpus()) >= 60
    for gpu in all_gpus():
        rates = gpu.flop_per_clock_per_sm
        assert len(gpu.source) > 10, gpu.name
        assert (gpu.matmul_tflops is None) == (gpu.matmul_source is None), gpu.name
        assert (gpu.interconnect is None) == (gpu.interconnect_gb_per_second is None), gpu.name
        assert "float32" in rates and set(rates) <= {"bfloat16", "float16", "tf32", "float32"}
        assert 5 <= gpu.sms <= 304 and 1.0 <= gpu.boost_ghz <= 2.7, gpu.name
        assert gpu.memory_gib is None or 4 <= gpu.memory_gib <= 256, gpu.name
        assert gpu.bandwidth_gb_per_second is not None, gpu.name
        assert 60 < gpu.bandwidth_gb_per_second <= 8000, gpu.name
        assert gpu.power_watts is None or 45 <= gpu.power_watts <= 1000, gpu.name


def test_no_measured_product_is_far_from_its_peak() -> None:
    """GPUs clock up to a fifth above their boost clock; power holds L4 and T4 at 60 %."""
    for gpu in all_gpus():
        if gpu.matmul_tflops is not None:
            peaks = [gpu.peak_flops(d) for d in ("bfloat16", "float16", "float32")]
            peak = next(p for p in peaks if p is not None)
            assert 0.55 < gpu.matmul_tflops * 1e12 / peak < 1.25, gpu.name


@pytest.mark.parametrize("gpu", all_gpus(), ids=lambda gpu: gpu.name)
def test_every_spelling_finds_its_own_row(gpu: Gpu) -> None:
    """Drivers report up to 8 % less memory than the board has. Without a memory size, boards of one name that differ in
    memory may be confused.
    """
    assert find_gpu(gpu.name) is gpu
    for name in (gpu.name, *gpu.driver_names):
        if gpu.memory_gib is not None:
            for share in (1.0, 0.92):
                assert find_gpu(name, int(share * gpu.memory_gib * 2**30)) is gpu
        found = find_gpu(name)
        assert found is not None
        assert found is gpu or found.memory_gib != gpu.memory_gib
        assert found is gpu or found.architecture == gpu.architecture
        spellings = name.upper(), f"NVIDIA {name}", name.replace(" ", "_"), name.replace("-", " ")
        assert all(find_gpu(spelling) is found for spelling in spellings)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("RTX 4070 12GB", "RTX 4070"),
        ("rtx 4070Ti", "RTX 4070 Ti"),
        ("GeForce RTX 4070 Ti Super", "RTX 4070 Ti SUPER"),
        ("RTX 4090 24 GB", "RTX 4090"),
        ("RTX 4060 Ti 8GB", "RTX 4060 Ti"),
        ("NVIDIA GeForce RTX 4060 Ti 16GB", "RTX 4060 Ti 16GB"),
        ("RTX 4090 Laptop 16GB", "RTX 4090 Laptop"),
        ("V100", "V100 32GB"),
        ("A100 SXM 80GB", "A100 80GB"),
        ("A100 80GB PCIe", "A100 PCIe 80GB"),
        ("H100 80GB HBM3", "H100 SXM"),
        ("H100 NVL 94GB", "H100 NVL"),
        ("H100 96GB HBM2e", "H100 96GB HBM2e"),
        ("Radeon RX 7900XTX", "RX 7900 XTX"),
        ("M3 Max 64GB", "Apple M3 Max"),
    ],
)
def test_spellings_of_published_runs_are_understood(name: str, row: str) -> None:
    found = find_gpu(name)
    assert found is not None
    assert found.name == row


def test_boards_of_one_name_are_distinguished_by_memory() -> None:
    for name, sizes in {"NVIDIA GeForce RTX 4060 Ti": (8, 16), "NVIDIA H100": (80, 96)}.items():
        for gib in sizes:
            gpu = find_gpu(name, int(0.97 * gib * 2**30))
            assert gpu is not None
            assert gpu.memory_gib == gib


def test_a_board_with_another_memory_has_no_row() -> None:
    assert find_gpu("NVIDIA GeForce RTX 4090", 48 * 2**30) is None
    with pytest.raises(BadInput, match="nearest: RTX 4090,"):
        lookup("RTX 4090 48GB", "bfloat16")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("NVIDIA GeForce RTX 4070 Max-Q", "RTX 4070"),
        ("NVIDIA RTX A4000 with Max-Q Design", "RTX A4000"),
        ("NVIDIA A4000", "RTX A4000"),
        ("RTX 6000", "RTX 6000 Ada"),
        ("A100", "A100 40GB"),
        ("H100 SXM 96GB", "H100 SXM"),
        ("RTX 407", "RTX 4070"),
        ("4070", "RTX 4070"),
        ("", "none"),
    ],
)
def test_a_partial_name_is_refused_with_the_nearest(name: str, near: str) -> None:
    assert find_gpu(name) is None
    with pytest.raises(BadInput) as refused:
        lookup(name, "bfloat16")
    nearest = str(refused.value).partition("nearest: ")[2].partition(";")[0].split(", ")
    assert near in nearest
    assert len(nearest) <= 3


def test_similar_names_are_different_gpus() -> None:
    pairs = [
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "NVIDIA GeForce RTX 4070"),
        ("NVIDIA RTX A4000", "NVIDIA A40"),
        ("NVIDIA L40S", "NVIDIA L40"),
        ("NVIDIA L40", "NVIDIA L4"),
        ("RTX 4000 SFF Ada", "RTX 4000 Ada"),
        ("NVIDIA A100-PCIE-40GB", "NVIDIA A100-SXM4-40GB"),
        ("NVIDIA GH200 480GB", "NVIDIA H200"),
    ]
    for one, other in pairs:
        first, second = find_gpu(one), find_gpu(other)
        assert first is not None and second is not None
        assert first is not second


@pytest.mark.parametrize(
    ("name", "instead"), [("T4", "float16 or float32"), ("V100 32GB", "float16 or float32"), ("P40", "dtype float32")]
)
def test_a_gpu_without_bfloat16_says_what_to_use(name: str, instead: str) -> None:
    with pytest.raises(BadInput, match=instead):
        lookup(name, "bfloat16")


def test_a_plan_asks_for_the_free_memory_where_sizes_vary() -> None:
    config = Path(__file__).parents[1] / "configs" / "rtx4070_fineweb.toml"
    arguments = [str(config), "--gpu", "Apple M3 Max", "--run.dtype", "float16"]
    with pytest.raises(BadInput, match="--free-vram-gib"):
        plan.main(arguments)
    assert plan.main([*arguments, "--free-vram-gib", "48", "--json"]) == 0


def test_a_gpu_without_a_row_is_computed_from_its_properties() -> None:
    hardware = from_properties("NVIDIA GeForce RTX 4070 Max-Q", (8, 9), 36, 8 * 2**30, 2.175e9, 115.0, "bfloat16")
    assert hardware.peak_flops == pytest.approx(40.1e12, rel=0.001)
    assert hardware.float32_flops == pytest.approx(20.0e12, rel=0.005)
    assert "driver's highest clock" in hardware.peak_name
    assert hardware.power_limit_watts == 115.0
    assert hardware.memory_bytes == 8 * 2**30
    assert hardware.bandwidth_bytes_per_second is None
    assert hardware.matmul_flops is None


def test_a_gpu_without_a_row_gets_a_step_time_with_its_bandwidth() -> None:
    described = ("x", (8, 9), 80, 16 * 2**30, 2.55e9, 320.0, "bfloat16")
    without = predict(documented_spec(), from_properties(*described))
    assert "step_seconds" not in without.quantities
    known = predict(documented_spec(), from_properties(*described, 736e9))
    row = predict(documented_spec(), lookup("RTX 4080 SUPER", "bfloat16"))
    assert known.quantities["step_seconds"].expected == pytest.approx(row.quantities["step_seconds"].expected, rel=0.01)


def test_a_rows_rate_is_that_of_its_compute_capability() -> None:
    for gpu in all_gpus():
        if gpu.compute_capability is None or gpu.compute_capability == "12.1":
            continue
        major, minor = gpu.compute_capability.split(".")
        clock = gpu.boost_ghz * 1e9
        described = ("x", (int(major), int(minor)), gpu.sms, 0, clock, None)
        computed = from_properties(*described, "float32")
        assert computed.architecture == gpu.architecture, gpu.name
        assert computed.float32_flops == pytest.approx(gpu.float32_flops), gpu.name
        if gpu.kind == "geforce" and gpu.name != "TITAN RTX":
            for dtype in gpu.flop_per_clock_per_sm.keys() - {"tf32"}:
                peak = from_properties(*described, dtype).peak_flops
                assert peak == pytest.approx(from_row(gpu, dtype).peak_flops), gpu.name


@pytest.mark.parametrize(
    ("capability", "clock", "dtype"),
    [((99, 0), 2e9, "bfloat16"), ((8, 9), None, "bfloat16"), ((7, 5), 2e9, "bfloat16")],
    ids=["unknown capability", "unknown clock", "no such units"],
)
def test_a_peak_that_is_not_known_is_none(capability: tuple[int, int], clock: float | None, dtype: str) -> None:
    hardware = from_properties("Strange card", capability, 60, 2**34, clock, None, dtype)
    assert hardware.peak_flops is None
    assert "Strange card" in hardware.peak_name


def own_rows(folder: Path, **changed: object) -> Path:
    row = find_gpu("RTX 4070")
    assert row is not None
    fields = row.model_dump(exclude_none=True) | {"name": "My card", "driver_names": []} | changed
    lines = (f"{name} = " + json.dumps(value).replace('":', '" =') for name, value in fields.items())
    path = folder / "my.toml"
    path.write_text("[[gpu]]\n" + "\n".join(lines))
    return path


def test_a_users_file_adds_gpu_rows(tmp_path: Path) -> None:
    """Its rows come before the shipped ones; a broken file is refused with the reason."""
    own = read_gpus(own_rows(tmp_path, sms=50))
    hardware = lookup("my card", "bfloat16", own=own)
    assert (hardware.sms, hardware.board_power_watts) == (50, 200)
    assert lookup("RTX 4070", "bfloat16", own=own).sms == 46
    for broken, message in ((own_rows(tmp_path, sms="x"), "sms"), (tmp_path / "none", "No such file")):
        with pytest.raises(BadInput, match=message):
            read_gpus(broken)
    for text in ("", "gpu = 1", "[gpu]"):
        own_rows(tmp_path).write_text(text)
        with pytest.raises(BadInput, match="no \\[\\[gpu\\]\\] row"):
            read_gpus(tmp_path / "my.toml")


def test_a_lower_power_limit_lengthens_the_step() -> None:
    """A 3090 trains nanochat's d12 1.116 times as long at 250 W as at its own 350 W.

    Source: github.com/marcinbogdanski/nanochat-repro, two cards, 4,686 and 5,230 ms.
    """
    spec = documented_spec()

    def seconds(watts: float | None) -> float:
        return predict(spec, lookup("RTX 3090", "bfloat16", watts)).quantities["step_seconds"].expected

    assert seconds(None) == seconds(350)
    assert seconds(150) > seconds(200) > seconds(250) > seconds(350)
    assert seconds(250) / seconds(350) == pytest.approx(1.116, abs=0.08)
