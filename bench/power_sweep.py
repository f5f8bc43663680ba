"""Steps of a configuration at several power limits of this card: seconds, watts, joules a token.

sudo HOME="$HOME" .venv/bin/python bench/power_sweep.py CONFIG [--limits 200,170,140]

Setting a limit needs the rights of root. The limit that was there is restored at the end, after
Ctrl-C and after a crash, by a process that outlives this one. The curve is kept beside the
calibrations: the report's other settings then stand on it. Trains on random tokens; no data is
read and nothing else is written.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import trainer.step.torch_env  # noqa: E402, F401  before torch

# isort: split
import torch  # noqa: E402
from results import result  # noqa: E402

from nanogauge.cli import Parser, run_command  # noqa: E402
from nanogauge.config import (  # noqa: E402
    Config,
    add_config_flags,
    config_overrides,
    load_config,
)
from nanogauge.errors import BadInput, RunFailed  # noqa: E402
from nanogauge.measure.gpu import open_sensors  # noqa: E402
from nanogauge.measure.power_limit import LimitRefused, PowerLimit  # noqa: E402
from nanogauge.power_curves import PowerCurve, PowerPoint, keep_power_curve  # noqa: E402
from trainer.calibrate import describe_hardware  # noqa: E402
from trainer.run.resources import make_model  # noqa: E402
from trainer.step.device import autocast, choose_dtype, synchronize  # noqa: E402
from trainer.step.optimizer import make_optimizer  # noqa: E402

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""of the limit in force, where no limits are given"""
SETTLE_SECONDS = 5.0
"""of steps after a change; the driver's power is a mean over a second or so"""


class NoEnergy(Exception):
    """The driver told no energy; the message is why."""


def measure_at(
    device: str | int, step: Callable[[], None], tokens: int, seconds: float
) -> tuple[float, float, float]:
    """Seconds of a step, W, and J a token, over steps that take so many seconds or more.

    Args:
        device: the card, as open_sensors names it.
        step: makes one step, and returns when it has ended.
        tokens: of a step.
        seconds: for how long at least.

    Raises:
        NoEnergy: if the driver gives neither counter nor power.
    """
    begin = time.monotonic()
    sensors = open_sensors(device, 10.0, lambda: time.monotonic() - begin, Path("/nonexistent"))
    count, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        step()
        count += 1
    readings = [r for r in sensors.close() if r.energy_joules is not None]
    if not readings or readings[-1].energy_joules is None:
        raise NoEnergy(sensors.absent.get("energy_joules", sensors.reason or "no reading"))
    last = readings[-1]
    assert last.energy_joules is not None and last.elapsed_seconds is not None
    watts = last.energy_joules / last.elapsed_seconds
    step_seconds = passed / count
    return step_seconds, watts, watts * step_seconds / tokens


def sweep(
    device: str | int,
    limits: Sequence[float] | None,
    step: Callable[[], None],
    tokens: int,
    seconds: float,
    settle_seconds: float = SETTLE_SECONDS,
) -> list[PowerPoint]:
    """Measure at each limit, the highest first; the limit is as it was when this returns or fails.

    Args:
        device: the card, by UUID or index.
        limits: in W; None takes SHARES of the limit in force, as far as the card allows them.
        step: makes one step, and returns when it has ended.
        tokens: of a step.
        seconds: for how long each limit is measured.
        settle_seconds: steps before that, at each limit.

    Raises:
        LimitRefused: if the limit cannot be set.
        NoEnergy: if the driver tells no power.
    """
    points = []
    with PowerLimit(device) as limit:
        least, most = limit.range_watts
        wanted = limits or [
            watts for share in SHARES if least <= (watts := share * limit.before_watts) <= most
        ]
        for watts in sorted(set(wanted), reverse=True):
            limit.set_watts(watts)
            until = time.perf_counter() + settle_seconds
            while time.perf_counter() < until:
                step()
            found = measure_at(device, step, tokens, seconds)
            point = PowerPoint(
                limit_watts=watts, step_seconds=found[0], watts=found[1], joules_per_token=found[2]
            )
            print(_line(point), file=sys.stderr, flush=True)
            points.append(point)
    return points[::-1]


def _line(point: PowerPoint) -> str:
    return (
        f"{point.limit_watts:6.0f} W limit  {point.step_seconds:8.4f} s a step  "
        f"{point.watts:6.1f} W drawn  {1e3 * point.joules_per_token:8.4f} mJ a token"
    )


def make_step(config: Config, device: torch.device, dtype: str) -> Callable[[], None]:
    """A training step of this configuration on random tokens, which waits for the device."""
    model = make_model(config).to(device)
    optimizer = make_optimizer(model, config.optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    loss_of = torch.compile(model) if config.run.compile else model
    size = (config.train.micro_batch, config.model.block_size)
    tokens = torch.randint(config.model.vocab_size, size, device=device)

    def step() -> None:
        for _ in range(config.train.grad_accum):
            with autocast(device, dtype):
                loss = loss_of(tokens, tokens) / config.train.grad_accum
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip or 1e9)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)

    return step


def _give_to_caller(path: Path) -> None:
    """Under sudo: what was made in the caller's home is the caller's."""
    owner, group = os.environ.get("SUDO_UID"), os.environ.get("SUDO_GID")
    if owner is not None and group is not None:
        for made in (path, path.parent, path.parent.parent):
            os.chown(made, int(owner), int(group))


def _limits(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        limits = [float(part) for part in text.split(",")]
    except ValueError:
        limits = []
    if len(set(limits)) < 2 or min(limits) <= 0:
        raise BadInput("--limits takes two or more numbers of watts, as in 200,170,140.")
    return limits


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("config", type=Path, nargs="?", help="configuration of the run")
    parser.add_argument("--limits", metavar="W,W,...", help="limits, in W")
    parser.add_argument("--seconds", type=float, default=20.0, help="measured at each limit")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    add_config_flags(parser)
    given = parser.parse(arguments)
    limits = _limits(given.limits)
    config = load_config(
        given.config or ROOT / "configs" / "rtx4070_fineweb.toml", config_overrides(given)
    )
    if not torch.cuda.is_available():
        print("skipped: no GPU", file=sys.stderr if given.json else sys.stdout)
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = choose_dtype(config.run.dtype, device)
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    step = make_step(config, device, dtype)
    step()  # compiles
    try:
        points = sweep(uuid, limits, step, config.tokens_per_step, given.seconds)
    except (LimitRefused, NoEnergy) as error:
        print(f"skipped: {error}", file=sys.stderr if given.json else sys.stdout)
        return 0
    model = config.model
    curve = PowerCurve(
        device=describe_hardware(device, dtype)[0].name,
        workload=f"{model.n_layer} layers x {model.n_embd}, {config.train.micro_batch} x "
        f"{model.block_size}, {dtype}",
        measured_unix=time.time(),
        points=points,
    )
    results = [
        result(name, f"limit {p.limit_watts:g} W, {curve.workload}", [getattr(p, name)], None)
        for p in points
        for name in ("step_seconds", "watts", "joules_per_token")
    ]
    if given.json:
        print(json.dumps({"bench": "power_sweep", "results": results}))
    else:
        print(f"{curve.device}: {curve.workload}")
        print("\n".join(_line(point) for point in points))
    if len(points) > 1:
        try:
            path = keep_power_curve(curve)
            _give_to_caller(path)
        except OSError as error:
            raise RunFailed(f"the curve could not be kept: {error.strerror}.") from error
        print(f"kept in {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
