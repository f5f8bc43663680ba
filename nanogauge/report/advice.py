"""What to change for the next run: computed from this one, and told only if it is worth it.

Nothing here is a rule of thumb: a piece of advice names the setting, and what it would have saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanogauge.hardware import find_gpu
from nanogauge.predict.prediction import compile_seconds
from nanogauge.predict.step_time import counted_clock_hz
from nanogauge.quantities import format_seconds
from nanogauge.records import Prediction
from nanogauge.report.clocks import MeasuredClock, slowed
from nanogauge.report.measured import Measurements
from nanogauge.report.what_if import Scenario
from nanogauge.runlog import Recorded
from nanogauge.runspec import EMBEDDED_TEXT, RunSpec
from nanogauge.schedule import checkpoints, evaluations

WORTH = 0.0025
"""of the run's time: what saves less is not worth a sentence"""


@dataclass(frozen=True)
class Advice:
    """On one run; each piece is None where nothing is to be changed, or too little saved."""

    spec: RunSpec
    prediction: Prediction
    measurements: Measurements
    recorded: Recorded
    clock: MeasuredClock
    share: float | None
    """of the step that goes with the clock"""
    scenarios: Sequence[Scenario]

    def _worth(self, seconds: float, text: str) -> str | None:
        ran_seconds = self.measurements.ledger.ran_s
        assert ran_seconds is not None
        return text if seconds >= WORTH * ran_seconds else None

    def evaluation(self) -> str | None:
        """Half as often; and as well, half as long."""
        spent, done = self.measurements.ledger.eval_s, len(self.recorded.evals)
        if not spent or not done:
            return None
        every, batches = self.spec.eval_every or 0, self.spec.eval_batches or 0
        fewer = evaluations(self.spec) - evaluations(replace(self.spec, eval_every=2 * every))
        saved = fewer * spent / done
        text = (
            f"evaluation every {2 * every:,} steps instead of {every:,} saves "
            f"{format_seconds(saved)}"
        )
        if batches > 1:
            half = spent * (batches - batches // 2) / batches
            text += f"; {batches // 2:,} batches instead of {batches:,} save {format_seconds(half)}"
        return self._worth(saved, text)

    def checkpoints(self) -> str | None:
        """Half as many, unless this very run needed them."""
        spent = self.measurements.ledger.checkpoint_s
        if not spent or self.recorded.lost_steps:
            return None
        every = self.spec.checkpoint_every or 0
        planned = checkpoints(self.spec)
        kept = checkpoints(replace(self.spec, checkpoint_every=2 * every))
        saved = (planned - kept) * self._checkpoint_seconds()
        return self._worth(
            saved,
            f"a checkpoint every {2 * every:,} steps instead of {every:,} saves "
            f"{format_seconds(saved)}, and a run that dies loses twice as much",
        )

    def _checkpoint_seconds(self) -> float:
        written = sum(line.seconds is not None for line in self.recorded.checkpoints)
        return (self.measurements.ledger.checkpoint_s or 0.0) / max(written, 1)

    def restarts(self) -> str | None:
        """Half the work is lost with twice the checkpoints, which have their price."""
        lost, every = self.measurements.ledger.lost_s or 0.0, self.spec.checkpoint_every or 0
        if not self.recorded.lost_steps or every < 2:
            return None
        more = checkpoints(replace(self.spec, checkpoint_every=every // 2))
        price = (more - checkpoints(self.spec)) * self._checkpoint_seconds()
        saved = lost / 2 - price
        return self._worth(
            saved,
            f"a checkpoint every {every // 2:,} steps instead of {every:,} would have saved about "
            f"{format_seconds(saved)}: half of what was made again, less {format_seconds(price)} "
            "of more checkpoints",
        )

    def data(self) -> str | None:
        """None of text that is in memory, which no disk makes faster."""
        if self.spec.dataset == EMBEDDED_TEXT:
            return None
        waited = self.measurements.ledger.data_wait_s or 0.0
        return self._worth(
            waited,
            f"reading the shards from a faster disk saves up to {format_seconds(waited)}",
        )

    def compilation(self) -> str | None:
        """What a compiler saves that finds its own results of an earlier run."""
        again = sum(startup.compile_seconds for startup in self.recorded.startups[1:])
        spent = (self.measurements.ledger.compile_s or 0.0) - again
        predicted = compile_seconds(self.spec, self.prediction.hardware)
        if not predicted.expected:
            return None
        saved = (1 - predicted.low / predicted.expected) * spent  # low is from a warm cache
        return self._worth(
            saved,
            f"what was compiled is kept (docs/install.md): it saves up to {format_seconds(saved)} "
            "when this model is trained again",
        )

    def throttling(self, lost: float) -> str | None:
        """On what held the clock down, where the steps lost so many seconds by it."""
        words = " ".join(self.clock.reasons)
        if "brake" in words:
            what = "a power supply and cables that hold (power brake)"
        elif "thermal" in words:
            what = "more air for the card"
        else:
            what = "finding out why (nvidia-smi -q -d PERFORMANCE)"
        return self._worth(lost, f"{what} saves about {format_seconds(lost)}")

    def power_limit(self) -> str | None:
        """Where it was set below the card's own, and the clock was below the one counted with."""
        limits = self.recorded.sensors.known("power_limit_watts")
        row, counted = (
            find_gpu(self.prediction.hardware.name),
            counted_clock_hz(self.prediction.hardware),
        )
        hz, own = self.clock.hz, row.power_watts if row is not None else None
        laptop = row is not None and "Laptop" in row.name  # its limit is the maker's
        if hz is None or counted is None or own is None or self.share is None or laptop:
            return None
        if not len(limits) or not self.clock.capped or hz >= counted:
            return None
        limit = float(np.median(limits)) / (self.recorded.starts[-1].sensed_cards or 1)
        if limit > own - 1:
            return None
        saved = slowed(self.share, counted, hz) * (self.measurements.ledger.step_s or 0.0)
        return self._worth(
            saved,
            f"the power limit of {limit:.0f} W is below the card's own {own:.0f} W: raising it "
            f"saves at most {format_seconds(saved)}, if the clock then rises from "
            f"{hz / 1e9:.3f} to {counted / 1e9:.3f} GHz",
        )

    def micro_batch(self) -> str | None:
        """The larger micro-batch, if it is sure to fit and its steps are expected to be shorter."""
        steps = {s.id: s.step_seconds.expected for s in self.scenarios}
        larger = next((s for s in self.scenarios if s.id == "micro_batch"), None)
        if larger is None or larger.verdict != "fits":
            return None
        saved = (steps["again"] - steps["micro_batch"]) * self.spec.steps
        return self._worth(
            saved, f"{larger.label} ({larger.change}) saves about {format_seconds(saved)}"
        )
