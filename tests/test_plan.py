"""plan.py: what fits, what ends in time, and refusals. Its answers are checked by further plans."""

import json
import math
import re
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from commands import DEMO, ROOT, build_fake_driver, run, run_here
from examples import DOCUMENTED, documented_config, documented_prediction

GIB = 2**30
FAST = ROOT / "configs" / "rtx4070_fineweb_fast.toml"


@pytest.fixture(autouse=True)
def without_summer_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def plan(*flags: object, gpu: str = "RTX 4070", **environment: str) -> dict[str, Any]:
    """Return the plan of the documented run as JSON."""
    arguments = [DOCUMENTED, "--gpu", gpu, "--json", *flags]
    done = run("plan.py", *arguments, **environment) if environment else run_here("plan.py", *arguments)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def estimates(planned: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {row["id"]: row["analytic"] for row in planned["rows"] if row["analytic"]}


def micro_batch(micro: int) -> list[str]:
    """Return the flags of this micro-batch at the documented 512 sequences a step."""
    return [f"--train.micro-batch={micro}", f"--train.grad-accum={512 // micro}"]


def test_the_largest_micro_batch_fits_by_its_own_plan_and_the_next_does_not() -> None:
    free = "--free-vram-gib=8"
    fit = plan(free)["fit"]
    largest, sure = fit["largest_micro_batch"], fit["largest_sure_micro_batch"]
    assert 1 <= sure < largest < 512
    assert plan(free, *micro_batch(largest))["fit"]["fits"]
    assert not plan(free, *micro_batch(2 * largest))["fit"]["fits"]
    assert plan(free, *micro_batch(sure))["fit"]["verdict"] == "fits"
    assert plan(free, *micro_batch(2 * sure))["fit"]["verdict"] != "fits"


def test_a_plan_names_faster_settings_that_train_the_same_and_are_sure_to_fit() -> None:
    slow = plan("--train.head=plain")
    flags = slow["fit"]["faster"][0].split()
    assert flags[:2] == ["--train.head", "chunked"] and "--run.tune" in flags
    fast = plan("--train.head=plain", *flags)
    assert fast["fit"]["verdict"] == "fits" and fast["fit"]["faster"] is None
    steps = [estimates(planned)["step_seconds"]["expected"] for planned in (fast, slow)]
    assert steps[0] / steps[1] == pytest.approx(slow["fit"]["faster"][1])


def test_a_plan_takes_the_plain_head_only_where_it_is_faster_and_sure_to_fit() -> None:
    """Eager, a soft cap of chunks is computed in fp32."""
    eager = ("--run.compile=false", "--free-vram-gib=24")
    capped = (*eager, "--model.logit-softcap=15")
    for flags, head in ((capped, "plain"), ((*capped, "--free-vram-gib=12"), "chunked"), (eager, "chunked")):
        assert plan(*flags)["rows"] == plan(*flags, f"--train.head={head}")["rows"]


def test_a_fit_is_doubtful_where_the_interval_holds_the_free_memory() -> None:
    peak = estimates(plan())["peak_process_bytes"]
    low, high = peak["low"], peak["high"]
    sizes = {0.99 * low: "does not fit", 0.99 * high: "doubtful", 1.01 * high: "fits"}
    for size, verdict in sizes.items():
        fit = plan(f"--free-vram-gib={size / GIB}")["fit"]
        assert fit["verdict"] == verdict
        assert fit["certain"] == (verdict != "doubtful")
        assert fit["fits"] == (size >= peak["expected"])


@pytest.mark.parametrize("sure", [False, True])
def test_as_many_steps_of_the_given_run_end_by_a_time_as_it_says(sure: bool) -> None:
    flags = ["--start=22:00", "--by=08:00", *["--sure"] * sure]
    table = plan(*flags)
    span = [datetime.fromisoformat(table["deadline"][end]) for end in ("start", "by")]
    assert (span[1] - span[0]).total_seconds() == table["best"]["seconds"] == 36_000
    given = table["best"]["runs"]["as given"]
    assert (given["n_embd"], given["micro_batch"]) == (384, 16)

    def seconds(n: int) -> float:
        end = "high" if sure else "expected"
        return estimates(plan(f"--train.max-steps={n}"))["total_seconds"][end]

    assert seconds(given["max_steps"]) <= 36_000 < seconds(math.ceil(1.02 * given["max_steps"]))


def test_a_plan_names_its_recipe_and_what_of_it_was_not_measured() -> None:
    said = " ".join(run_here("plan.py", FAST, "--gpu", "RTX 4070").stdout.split())
    for words in ("rotary positions", "squared ReLU", "Muon for the matrices", "logits within 15"):
        assert words in said.partition("quantity")[0], words
    assert "beyond GPT-2 was counted, not measured" in said
    documented = " ".join(run_here("plan.py", DOCUMENTED, "--gpu", "RTX 4070").stdout.split())
    recipe = "Recipe: GPT-2 with dropout 0.1; AdamW; learning rate up to 0.001 in 500 steps, "
    assert f"{recipe}down along a cosine to 0.0001 at step 20,000." in documented
    assert "beyond GPT-2" not in documented
    assert re.search(r"Finish: \S+ \d\d:\d\d, between \S+ \d\d:\d\d", documented)


def test_a_run_of_centuries_has_no_clock_time() -> None:
    finish = plan("--train.max-steps=1e15")["deadline"]["finish"]
    assert finish == {"low": None, "expected": None, "high": None}


def test_several_gpus_share_the_micro_batches_and_add_up_their_power() -> None:
    eight, flags = plan("--gpus=8"), ["--train.grad-accum=4"]
    one, many = estimates(plan(*flags)), estimates(eight)
    # DDP's copy of the gradients, and the head's gradient of a micro-batch, elsewhere in place
    buckets = 4 * (one["parameters_total"]["expected"] + 50304 * 384)
    more = many["peak_allocated_bytes"]["expected"] - one["peak_allocated_bytes"]["expected"]
    assert more == pytest.approx(buckets)
    assert many["power_watts"]["high"] == 8 * one["power_watts"]["high"]
    total, energy = many["total_seconds"]["high"], many["energy_kwh"]["high"]
    assert energy == pytest.approx(many["power_watts"]["high"] * total / 3.6e6)
    flops = many["flops_total_palm"]["expected"] / documented_config().train.max_steps
    peak = documented_prediction().hardware.peak_flops
    assert peak is not None
    share = flops / many["step_seconds"]["expected"] / (8 * peak)
    assert many["mfu_palm"]["expected"] == pytest.approx(share)
    labels = {row["id"]: row["quantity"] for row in eight["rows"]}
    assert "each of 8 GPUs" in labels["peak_process_bytes"]
    assert "all 8 GPUs" in labels["power_watts"]


def test_a_lowered_power_limit_takes_longer_and_less_power(tmp_path: Path) -> None:
    """For a row of the user's own file too."""
    file = tmp_path / "my.toml"
    rows = (ROOT / "nanogauge" / "hardware.toml").read_text(encoding="utf-8")
    file.write_text(rows.replace('"RTX 4070"', '"My GPU"'), encoding="utf-8")
    shipped, own = estimates(plan()), estimates(plan("--gpu-file", file, gpu="my gpu"))
    lowered = estimates(plan("--gpu-file", file, "--power-limit=150", gpu="my gpu"))
    assert own["power_watts"] == shipped["power_watts"]
    assert lowered["power_watts"]["expected"] == pytest.approx(0.97 * 150)
    assert lowered["step_seconds"]["expected"] > 1.05 * own["step_seconds"]["expected"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--by=25:00"], "--by takes a time of day such as 08:00"),
        (["--by=tomorrow"], "--by takes a time of day such as 08:00"),
        (["--start=8"], "--start takes a time of day such as 08:00"),
        (["--gpus=0"], "--gpus takes a number of GPUs"),
        (["--gpus=3"], "set --train.grad-accum to a multiple of 3"),
        (["--power-limit=0"], "--power-limit takes watts above 0"),
        (["--calibrate", "--power-limit=150"], "leave out --gpu-file and --power-limit"),
    ],
)
def test_a_plan_refuses_invalid_times_and_numbers(flags: list[str], words: str) -> None:
    done = run_here("plan.py", DOCUMENTED, "--gpu", "RTX 4070", *flags)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a driver with one RTX 4070, 2 of its 12 GiB used by others."""
    return build_fake_driver(tmp_path_factory.mktemp("driver"))


def test_free_memory_is_reported_by_the_driver_of_the_same_gpu(driver: Path) -> None:
    library = {"LD_LIBRARY_PATH": str(driver)}
    present = plan(**library)["fit"]
    assert present["free_bytes"] == 10 * GIB
    assert present["free_source"] == "as the driver says"
    assert plan("--gpus=2", **library)["fit"]["free_bytes"] == 11 * GIB
    assert plan(gpu="RTX 4090", **library)["fit"]["free_bytes"] == 23 * GIB
    assert plan(gpu="A100 40GB", **library)["fit"]["free_bytes"] == 40 * GIB
    assert plan("--free-vram-gib=3", **library)["fit"]["free_bytes"] == 3 * GIB


def test_a_run_that_cannot_fit_is_refused_with_the_flags_that_would(tmp_path: Path) -> None:
    """4,096 x 1,024 logits of 50,304 exceed the memory of any test machine."""
    flags = ["--run.name=big", "--model.vocab-size=50304", "--train.micro-batch=4096"]
    flags += ["--model.block-size=1024"]
    done = run("train.py", DEMO, f"--run.out={tmp_path / 'runs'}", *flags)
    assert done.returncode == 2, done.stdout
    (sentence,) = done.stderr.splitlines()
    assert "does not fit: the run peaks at" in sentence and "--force" in sentence
    assert not (tmp_path / "runs").exists()
    advised = re.search(r"--train.micro-batch (\d+) --train.grad-accum (\d+)", sentence)
    assert advised is not None
    micro, accumulation = map(int, advised.groups())
    assert micro * accumulation == 4096
