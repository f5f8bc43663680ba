"""The committed configurations of common devices, as plans."""

import tomllib

import pytest
from commands import ROOT, run

from nanogauge.config import load_config
from nanogauge.hardware import lookup
from nanogauge.prediction.prediction import predict
from nanogauge.runspec import RunSpec
from nanogauge.schema import Hardware

TABLE = tomllib.loads((ROOT / "bench" / "presets.toml").read_text())


def test_each_configuration_ends_in_its_hours_with_the_loss_that_the_command_finds() -> None:
    done = run("bench/presets.py", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if ".toml`, " in line]
    rows = {line.split("`")[1]: line.split(" | ") for line in lines}
    page = (ROOT / "docs" / "presets.md").read_text()
    for preset in TABLE["preset"]:
        name, dtype = f"{preset['name']}.toml", preset.get("dtype", "bfloat16")
        device = lookup(preset["gpu"], dtype) if "gpu" in preset else Hardware(**TABLE["laptop"])
        plan = predict(RunSpec.from_config(load_config(ROOT / "configs" / name)), device)
        assert plan["total_seconds"].expected < 1.15 * 3600 * preset["hours"], name
        assert plan.fits(preset.get("free_gib") or (device.memory_bytes or 0) / 2**30), name
        assert plan["val_loss"].expected == pytest.approx(float(rows[name][4].split()[0]), abs=0.05)
        assert f"`{name}`" in page
