"""The clock: every second is counted once, and the loop never waits for a busy device."""

from collections import deque
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogauge.measure.clock import Clock, StepTimes, Stopwatch
from nanogauge.measure.torch_device import CompileTimer

pytestmark = pytest.mark.alone


@dataclass
class Machine:
    """A host and a device with a queue, in whole milliseconds so that sums are exact."""

    host_ms: int = 0
    device_ms: int = 0
    """Time at which the device has done all queued work."""
    compiled_ms: int = 0
    waits: list[int] = field(default_factory=list)
    """Duration of each wait of the host."""

    def now(self) -> int:
        return self.host_ms

    def work(self, host_ms: int) -> None:
        self.host_ms += host_ms

    def compile(self, host_ms: int) -> None:
        self.host_ms += host_ms
        self.compiled_ms += host_ms

    def launch(self, device_ms: int) -> None:
        """Queue work on the device."""
        self.device_ms = max(self.device_ms, self.host_ms) + device_ms

    def synchronize(self) -> None:
        self.wait_until(self.device_ms)

    def wait_until(self, moment_ms: int) -> None:
        self.waits.append(max(0, moment_ms - self.host_ms))
        self.host_ms = max(self.host_ms, moment_ms)


@dataclass
class Queue:
    """The device's timeline."""

    machine: Machine
    lag: int = 1

    def mark(self) -> int:
        self.machine.device_ms = max(self.machine.device_ms, self.machine.host_ms)
        return self.machine.device_ms

    def wait(self, moment: int) -> None:
        self.machine.wait_until(moment)

    def seconds(self, begin: int, end: int) -> float:
        return end - begin


def clock_of(machine: Machine, on_device: bool) -> Clock:
    return Clock(
        machine.synchronize,
        machine.now,
        timeline=Queue(machine) if on_device else None,
        compiled_seconds=lambda: machine.compiled_ms,
    )


Work = tuple[str, int, int, int]
"""Step or window; milliseconds of the host, of compilation, of the device."""
WORK = st.tuples(st.sampled_from(["step", "window"]), *[st.integers(0, 50)] * 3)


def one_step(clock: Clock, machine: Machine, host: int, compiling: int, device: int) -> Stopwatch:
    watch = clock.begin_step(split=True)
    with watch.waiting():
        machine.work(host)
    machine.compile(compiling)
    machine.launch(device)
    watch.lap("forward")
    clock.end_step(watch)
    return watch


@given(st.lists(WORK, max_size=30), st.booleans())
def test_every_moment_is_counted_exactly_once(work: list[Work], on_device: bool) -> None:
    """Steps, windows and compilation in any order add up exactly to the wall time."""
    machine = Machine()
    clock = clock_of(machine, on_device)
    counted = 0.0
    under_way: deque[Stopwatch] = deque()

    def read(leave: int) -> None:
        nonlocal counted
        while len(under_way) > leave:
            times = under_way.popleft().read()
            counted += times.step_seconds + times.compile_seconds

    for what, host, compiling, device in work:
        if what == "step":
            under_way.append(one_step(clock, machine, host, compiling, device))
            read(clock.lag)
        else:
            read(0)
            with clock.window() as window:
                machine.work(host)
                machine.compile(compiling)
                machine.launch(device)
            counted += window.seconds + window.compile_seconds
    read(0)
    machine.synchronize()
    assert counted == clock.elapsed_seconds()


def twenty_steps(machine: Machine, host: int, device: int) -> list[StepTimes]:
    clock = clock_of(machine, on_device=True)
    under_way: deque[Stopwatch] = deque()
    times: list[StepTimes] = []
    for _ in range(20):
        under_way.append(one_step(clock, machine, host=host, compiling=0, device=device))
        while len(under_way) > clock.lag:
            times.append(under_way.popleft().read())
    return times


def test_the_host_waits_for_a_busy_device_only_once_and_one_step_late() -> None:
    machine = Machine()
    times = twenty_steps(machine, host=10, device=100)
    assert [t.step_seconds for t in times[1:]] == [100] * 18, "the device was never idle"
    assert [t.data_wait_seconds for t in times] == [10] + [0] * 18, "except before the first batch"
    assert len(machine.waits) == 19


def test_the_wait_of_the_device_for_its_batches_is_measured() -> None:
    times = twenty_steps(Machine(), host=60, device=40)[1:]
    found = {(t.step_seconds, t.data_wait_seconds, t.forward_seconds) for t in times}
    assert found == {(60, 20, 40)}


def test_compilation_is_excluded_from_step_times() -> None:
    machine = Machine()
    clock = clock_of(machine, on_device=False)
    watch = one_step(clock, machine, host=5, compiling=700, device=20)
    assert watch.read() == StepTimes(25, 700, 5, None, None, None)
    watch = one_step(clock, machine, host=5, compiling=0, device=20)
    assert watch.read() == StepTimes(25, 0, 5, 20, None, None)


def test_each_compilation_is_timed() -> None:
    """A new shape compiles again."""
    watch = CompileTimer()
    watch.listen()
    seconds = watch.seconds
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    double(torch.ones(3))
    first = seconds()
    assert first > 0
    double(torch.ones(3))
    assert seconds() == first
    double(torch.ones(4))
    assert seconds() > first
