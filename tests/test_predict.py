"""The prediction: near the documented run, monotonic, and consistent with its parts."""

import math
from dataclasses import replace

import pytest
from examples import CPU, beyond_gpt2, documented_prediction, documented_spec, optimizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogauge.config import Config, CostSection, DataSection, ModelSection, RunSection, TrainSection
from nanogauge.hardware import Gpu, all_gpus, from_row, lookup
from nanogauge.prediction.constants import FITTED
from nanogauge.prediction.prediction import predict
from nanogauge.prediction.search import largest_micro_batch, memory_of
from nanogauge.quantities import QUANTITIES
from nanogauge.runspec import RunSpec, with_shape
from nanogauge.schema import Hardware, Prediction

DTYPES = ("bfloat16", "float16", "float32")
TIMED_GPUS = [gpu for gpu in all_gpus() if gpu.architecture in FITTED.classes]


@st.composite
def specs(draw: st.DrawFn) -> RunSpec:
    heads = draw(st.sampled_from([1, 4, 12]))
    config = Config(
        run=RunSection(name="x", compile=draw(st.booleans())),
        model=ModelSection(
            n_layer=draw(st.integers(1, 48)),
            n_head=heads,
            n_embd=heads * draw(st.sampled_from([8, 32, 64, 128])),
            block_size=draw(st.sampled_from([32, 256, 1024, 4096])),
            vocab_size=draw(st.sampled_from([64, 8192, 50304, 131072])),
            bias=draw(st.booleans()),
            dropout=draw(st.sampled_from([0.0, 0.1])),
            **draw(beyond_gpt2()),
        ),
        data=DataSection(path="x", tokens=draw(st.none() | st.integers(1, 10**12))),
        train=TrainSection(
            micro_batch=draw(st.integers(1, 64)),
            grad_accum=draw(st.integers(1, 64)),
            max_steps=draw(st.integers(1, 100_000)),
            eval_every=draw(st.integers(1, 2000)),
            eval_batches=draw(st.integers(1, 1000)),
            checkpoint_every=draw(st.integers(1, 2000)),
            head=draw(st.sampled_from(["plain", "chunked"])),
            checkpointing=draw(st.sampled_from(["none", "full"])),
        ),
        optimizer=draw(optimizers()),
        cost=CostSection(price_per_kwh=draw(st.none() | st.just(0.3))),
    )
    return RunSpec.from_config(config)


@st.composite
def devices(draw: st.DrawFn) -> tuple[Hardware, str]:
    if draw(st.integers(0, 4)) == 0:
        return CPU, "float32"
    gpu = draw(st.sampled_from(TIMED_GPUS))
    dtype = draw(st.sampled_from([d for d in DTYPES if gpu.peak_flops(d) is not None]))
    return from_row(gpu, dtype), dtype


def test_the_documented_run_is_in_the_predicted_intervals() -> None:
    """The public log has 3.9098 s a step, 32.0 s for the first, 78,838 s in all."""
    found = documented_prediction().quantities
    measured = {"step_seconds": 3.9098, "total_seconds": 78_838, "first_step_seconds": 32.025}
    for row, value in measured.items():
        assert found[row].low < value < found[row].high, row
    assert found["step_seconds"].expected == pytest.approx(3.9098, rel=0.08)
    assert found["total_seconds"].expected == pytest.approx(78_838, rel=0.08)
    # 41 evaluations of 2 x 200 batches took 15.27 s each, a checkpoint in most of them.
    assert documented_prediction().ledger["eval_s"] == pytest.approx(41 * 15.27, rel=0.25)
    assert found["mfu_palm"].low < 0.690 < found["mfu_palm"].high


@settings(max_examples=30, deadline=None)
@given(specs(), devices())
def test_a_prediction_is_whole_and_adds_up(spec: RunSpec, device: tuple[Hardware, str]) -> None:
    hardware, dtype = device
    prediction = predict(replace(spec, dtype=dtype), hardware)
    quantities = prediction.quantities
    always = {row for row, quantity in QUANTITIES.items() if not quantity.optional}
    assert set(quantities) | set(prediction.unpredicted) == always
    assert not set(quantities) & set(prediction.unpredicted)
    for row, estimate in quantities.items():
        assert 0 < estimate.low <= estimate.expected <= estimate.high, row
        assert math.isfinite(estimate.high), row
        assert (estimate.low == estimate.high) == QUANTITIES[row].exact, row
        assert estimate.unit == QUANTITIES[row].unit
        assert estimate.formula and estimate.source
    step = sum(part.value for part in prediction.step_parts)
    assert step == pytest.approx(quantities["step_seconds"].expected)
    assert sum(prediction.ledger.values()) == pytest.approx(quantities["total_seconds"].expected)
    assert prediction.ledger["step_s"] == pytest.approx(spec.steps * step)
    if hardware.kind != "cpu":
        memory = sum(part.value for part in prediction.memory_parts)
        assert memory == pytest.approx(quantities["peak_allocated_bytes"].expected)
        assert quantities["peak_process_bytes"].expected > memory
    assert all(part.value >= 0 for part in (*prediction.step_parts, *prediction.memory_parts))


@settings(max_examples=20, deadline=None)
@given(specs(), devices())
def test_a_prediction_reads_back_equal(spec: RunSpec, device: tuple[Hardware, str]) -> None:
    hardware, dtype = device
    prediction = predict(replace(spec, dtype=dtype), hardware)
    assert Prediction.model_validate_json(prediction.model_dump_json(indent=1)) == prediction


def larger(spec: RunSpec, what: str, by: int) -> RunSpec:
    grown = {"n_embd": ("n_embd", "head_size", "mlp_width")}.get(what, (what,))
    if what in MODEL_SIZES:
        return with_shape(spec, **{size: by * getattr(spec.shape, size) for size in grown})
    return replace(spec, **{what: by * getattr(spec, what)})


MODEL_SIZES = ["n_layer", "n_embd", "context", "vocabulary"]
TRAIN_SIZES = ["micro_batch", "grad_accum", "steps", "eval_batches"]


@settings(max_examples=80, deadline=None)
@given(spec=specs(), device=devices(), what=st.sampled_from(MODEL_SIZES + TRAIN_SIZES), by=st.integers(2, 4))
def test_more_of_anything_never_takes_less_time_or_memory(
    spec: RunSpec, device: tuple[Hardware, str], what: str, by: int
) -> None:
    hardware, dtype = device
    spec = replace(spec, dtype=dtype)
    small, large = predict(spec, hardware), predict(larger(spec, what, by), hardware)
    for key, seconds in small.ledger.items():
        assert large.ledger[key] >= seconds * (1 - 1e-12), key
    for row in ("step_seconds", "first_step_seconds", "total_seconds", "peak_process_bytes"):
        for end in ("low", "expected", "high"):
            before, after = (getattr(p.quantities[row], end) for p in (small, large))
            assert after >= before * (1 - 1e-12), (row, end)


@settings(max_examples=30, deadline=None)
@given(spec=specs(), device=devices(), compute=st.floats(1, 4), bandwidth=st.floats(1, 4))
def test_a_faster_gpu_is_never_slower(
    spec: RunSpec, device: tuple[Hardware, str], compute: float, bandwidth: float
) -> None:
    hardware, dtype = device
    assert hardware.peak_flops is not None
    assert hardware.bandwidth_bytes_per_second is not None
    reached = hardware.matmul_flops
    faster = hardware.model_copy(
        update={
            "peak_flops": compute * hardware.peak_flops,
            "matmul_flops": None if reached is None else compute * reached,
            "bandwidth_bytes_per_second": bandwidth * hardware.bandwidth_bytes_per_second,
        }
    )
    spec = replace(spec, dtype=dtype)
    before, after = predict(spec, hardware), predict(spec, faster)
    for key, seconds in before.ledger.items():
        assert after.ledger[key] <= seconds * (1 + 1e-12), key


@pytest.mark.parametrize("gpu", TIMED_GPUS, ids=lambda gpu: gpu.name)
def test_no_gpu_is_expected_to_exceed_its_peak(gpu: Gpu) -> None:
    for dtype in (d for d in DTYPES if gpu.peak_flops(d) is not None):
        found = predict(replace(documented_spec(), dtype=dtype), from_row(gpu, dtype)).quantities
        assert found["mfu_6n"].expected < found["mfu_palm"].expected < 1


@settings(max_examples=20, deadline=None)
@given(spec=specs(), device=devices(), gib=st.floats(0.5, 80))
def test_the_largest_micro_batch_fits_and_the_next_does_not(
    spec: RunSpec, device: tuple[Hardware, str], gib: float
) -> None:
    hardware, dtype = device
    free = int(gib * 2**30)
    spec = replace(spec, dtype=dtype)
    sequences = spec.micro_batch * spec.grad_accum

    def fits(micro: int) -> bool:
        changed = replace(spec, micro_batch=micro, grad_accum=sequences // micro)
        return memory_of(changed, hardware).process.expected <= free

    fitting = [m for m in range(1, sequences + 1) if sequences % m == 0 and fits(m)]
    expected = max(fitting, default=None)
    assert largest_micro_batch(spec, hardware, free) == expected


def test_a_device_without_a_known_peak_has_no_time_and_says_why() -> None:
    known = lookup("RTX 4070", "bfloat16")
    unknown = known.model_copy(update={"peak_flops": None, "architecture": "unknown"})
    prediction = predict(documented_spec(), unknown)
    for row in ("step_seconds", "total_seconds", "mfu_palm", "energy_kwh"):
        assert row not in prediction.quantities
        assert "not known" in prediction.unpredicted[row]
    assert prediction.quantities["peak_process_bytes"].expected > 2**32
    assert prediction.ledger == {}
