"""The documented run and its variants on the stand-in for a card: memory, launches, compilation."""

import shutil
import statistics
from pathlib import Path

import pytest
from conftest import DOCUMENTED, Run, train, waits

from nanogauge.programs import TRAINING_PROGRAMS

SHORT = ("--train.grad-accum=2", "--train.max-steps=3", "--train.eval-batches=1")
EAGER = "--run.compile=false"
GPT2 = ("--model.n-embd=768", "--train.micro-batch=4")
VARIANTS: dict[str, tuple[str, ...]] = {
    "documented": (),
    "fast": (),
    "plain head": ("--train.head=plain",),
    "float16": ("--run.dtype=float16",),
    "recomputed": ("--train.checkpointing=full",),
    "8 sequences": ("--train.micro-batch=8",),
    "eager": (EAGER,),
    "eager, plain head": (EAGER, "--train.head=plain", "--train.micro-batch=4"),
    "eager, deterministic": (EAGER, "--run.deterministic=true"),
    "eager, recomputed": (EAGER, "--train.checkpointing=full"),
    "eager, 24 sequences": (EAGER, "--train.micro-batch=24"),
    "eager, 124M": (EAGER, *GPT2),
    "eager, capped": (EAGER, "--model.logit-softcap=15", "--train.micro-batch=4"),
    "eager, fast": (EAGER, "--train.micro-batch=4"),
}
FACTORS: dict[str, float] = {}


def train_variant(name: str, out: Path, tokens: Path, *flags: str, **variables: str) -> Run:
    config = DOCUMENTED.with_stem("rtx4070_fineweb_fast") if name.endswith("fast") else DOCUMENTED
    flags = (*SHORT, f"--data.path={tokens}", "--train.prompts=[]", *VARIANTS[name], *flags)
    done = train(out, *flags, config=config, fresh=bool(variables), **variables)
    assert done.status == 0, done.text
    return done


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Run:
    out = tmp_path_factory.mktemp("documented") / "r"
    return train_variant("documented", out, tokens, TORCH_LOGS="recompiles,dynamic")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_allocators_peak_is_the_predicted_one(name: str, documented: Run, tokens: Path, tmp_path: Path) -> None:
    done = documented if name == "documented" else train_variant(name, tmp_path / "r", tokens)
    peak = done.rows["peak_allocated_bytes"]
    shutil.rmtree(tmp_path / "r", ignore_errors=True)
    FACTORS[name] = peak["factor"]
    assert peak["prediction"] == "held"
    assert peak["factor"] == pytest.approx(1, abs=0.03)


def test_half_of_the_peaks_are_within_two_percent() -> None:
    assert len(FACTORS) == len(VARIANTS)
    assert statistics.median(abs(factor - 1) for factor in FACTORS.values()) <= 0.02


def test_a_documented_step_waits_only_asleep_and_launches_what_is_predicted(documented: Run) -> None:
    *_, step = documented.steps()
    update = next(i for i, call in enumerate(step) if "multi_tensor_apply" in call)
    kinds = [call.split()[0] for call in step[:update]]
    launches = sum(kind in ("kernel", "triton", "gemm", "memset") for kind in kinds)
    ours = TRAINING_PROGRAMS["nanogauge"]
    assert ours.layer_launches and ours.launches
    assert launches / 2 == pytest.approx(12 * ours.layer_launches + ours.launches + 3 * 3, abs=4)
    assert waits(step) == ["sync event blocking"] * 2


def test_the_documented_model_is_compiled_once_with_static_shapes(documented: Run) -> None:
    assert [line["mode"] for line in documented.lines("compile")] == ["compiled"]
    assert "size mismatch" not in documented.text and "create_symbol" not in documented.text
