"""Run the sensors in a process of their own, on the scripted driver of fake_nvml.c."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
UUID_OF_TORCH = "12345678-1234-1234-1234-123456789abc"

SAMPLE = """
import json, sys, time
import pynvml
from nanogauge.measure.gpus import WatchedGpu
from nanogauge.measure.sensors import driver_info, measure_idle, open_sensors
device, seconds, hz, jump_after, jump_seconds, idle = json.loads(sys.argv[1])
several = [WatchedGpu(*card) for card in device] if isinstance(device, list) else device
begin = time.monotonic()
def clock():
    t = time.monotonic() - begin
    return t + jump_seconds if t > jump_after else t
if idle:
    print(json.dumps({"idle": vars(measure_idle(several, hz, seconds)), "waited": clock()}))
    sys.exit()
sensors = open_sensors(several, hz, clock)
opening = time.monotonic() - begin
changes, spreads, early = [], [], []
while (left := seconds - (time.monotonic() - begin)) > 0:
    time.sleep(min(0.5, left))
    changes += sensors.changes()
    spreads += [sensors.power_since_last(), sensors.power_since_last()]
    early += sensors.readings()
closing = time.monotonic()
late = sensors.close()
close_seconds = time.monotonic() - closing
changes += sensors.changes() + sensors.changes()
print(json.dumps({
    "readings": [r.model_dump() for r in early + late], "early": len(early),
    "reasons": sensors.reasons(), "cpu_seconds": sensors.cpu_seconds,
    "changes": [vars(c) for c in changes], "spreads": [s and vars(s) for s in spreads],
    "open_seconds": opening, "close_seconds": close_seconds,
    "info": vars(driver_info(device)) if sensors.has_gpu and several is device else None,
    "torch": "torch" in sys.modules,
}))
"""


class Run:
    """A process that reads the sensors for some seconds on a driver with this script."""

    def __init__(
        self,
        folder: Path,
        script: str = "",
        seconds: float = 0.3,
        device: str | int | list[tuple[str | int, int | None]] = UUID_OF_TORCH,
        hz: float = 20,
        jump: tuple[float, float] = (1e9, 0),
        idle: bool = False,
    ) -> None:
        path = folder / f"{abs(hash(script))}.txt"
        path.write_text(script)
        variables = {"FAKE_NVML_SCRIPT": str(path), "LD_LIBRARY_PATH": str(folder)}
        command = [sys.executable, "-c", SAMPLE, json.dumps([device, seconds, hz, *jump, idle])]
        pipe, there = subprocess.PIPE, {**os.environ, **variables}
        self._process = subprocess.Popen(command, env=there, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)

    @functools.cached_property
    def said(self) -> dict[str, Any]:
        """The output of the process, after waiting for its end."""
        out, err = self._process.communicate(timeout=60)
        assert (self._process.returncode, err) == (0, "")
        found: dict[str, Any] = json.loads(out)
        return found
