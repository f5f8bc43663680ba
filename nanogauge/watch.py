"""Measure an unchanged program from outside: its printed steps, its processes and its GPUs."""

import math
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice, tee
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from rich.console import Console

from nanogauge.analysis.claims import load_claims
from nanogauge.analysis.report_model import build_report, claims_of
from nanogauge.analysis.verdicts import build_rows
from nanogauge.device import local_hardware
from nanogauge.doctor.machine import capture_environment
from nanogauge.errors import BadInput
from nanogauge.files import make_folder, write_atomic
from nanogauge.importers.convert import absent_events, remarks
from nanogauge.importers.described import Given, describe
from nanogauge.importers.formats import TEXT_FORMATS, Format
from nanogauge.importers.import_run import predict_logged
from nanogauge.importers.live import LiveConverter
from nanogauge.importers.parsed import LoggedEvaluation, LoggedProcess, log_interval, not_in_log, split_runs, warning
from nanogauge.importers.reader import LogParser, recognize
from nanogauge.importers.text import strip_controls
from nanogauge.measure.child import Child
from nanogauge.measure.gpus import WatchedGpu
from nanogauge.measure.host import process_bytes, process_tree
from nanogauge.measure.sensors import DriverInfo, Sensors, driver_info, measure_idle
from nanogauge.prediction.workload import resolve_dtype
from nanogauge.report.background import CPU_SECONDS, GPU_SECONDS, BackgroundReport
from nanogauge.report.html import write_report
from nanogauge.report.terminal import print_report
from nanogauge.runlog.folder import CLAIMS_NAME, create
from nanogauge.runlog.lock import acquire_lock
from nanogauge.runlog.reader import LOG_NAME, has_begun, lines_of
from nanogauge.runlog.writer import RunLog
from nanogauge.runspec import RunSpec
from nanogauge.schema import End, Event, LogLine, Prediction, Start

_OUTPUT = "output.log"
_POWER_HZ, _IDLE_SECONDS, _TICK_SECONDS = 10.0, 2.0, 0.5
_SEARCHED_LINES = 100_000
"""Lines in which the program's first step is looked for."""
_LONGEST_PIECE_BYTES = 2**20
_STOPPED = (129, 130, 143)
"""Exit statuses after SIGHUP, SIGINT and SIGTERM."""
_OF_STEPS = ("tokens_total", "data_epochs", "flops_total_6n", "flops_total_palm", "first_step_seconds", "val_loss")


class Watch:
    """A program that is run once, and measured into a run folder.

    Args:
        command: the program and its arguments.
        out: the run folder to write.
        given: what the user says about the run.
        claims: claims file to compare it with.

    Raises:
        BadInput: if the folder already holds a run, or the claims or the configuration cannot be used.
    """

    def __init__(self, command: Sequence[str], out: Path, given: Given, claims: Path | None) -> None:
        if has_begun(out):
            raise BadInput(f"{out} already holds a run; choose another --out.")
        self._command, self._out = command, out
        self._claims = load_claims(claims) if claims is not None else None
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(given.gpus or 1)))).split(",")
        devices = [int(name) if name.isdecimal() else name for name in visible if name not in ("", "-1")]
        driver = driver_info(devices[0]) if devices else DriverInfo()
        self._gpus = [WatchedGpu(device) for device in devices[: given.gpus or 1] if driver.name is not None]
        self._given = replace(given, local_gpu=driver.name)
        # A processor is measured before the program uses it.
        self._cpu = None if self._gpus else local_hardware()
        self._idle = measure_idle(self._gpus, _POWER_HZ, _IDLE_SECONDS)
        self._machine = capture_environment("", driver if self._gpus else None, os.cpu_count() or 1, Path.cwd())
        make_folder(out)
        self._lock = acquire_lock(out)
        if claims is not None:
            write_atomic(out / CLAIMS_NAME, claims.read_bytes())
        nothing = LoggedProcess(0, start_logged=True, evaluations=[LoggedEvaluation(0)])
        spec, gpu, _ = describe(out / _OUTPUT, Format("unknown", ""), [nothing], self._given)
        predicted = self._predict(spec, gpu)  # refuses wrong flags
        self._freeze(*(predicted if given.config is not None else self._predict(RunSpec.undescribed(), None)))
        self._pieces: SimpleQueue[tuple[float, bytes] | None] = SimpleQueue()
        self._receiving = Lock()
        self._incomplete = {1: b"", 2: b""}  # last line of each output so far
        self._parser: LogParser | None = None
        self._converter: LiveConverter | None = None  # None until the output has said what the run is
        self._runs: list[list[LoggedProcess]] = []
        self._peak_bytes = 0

    def run(self) -> int:
        """Run the program to its end and write the report; return the program's exit status."""
        self._began, self._began_unix = time.monotonic(), time.time()
        with (self._out / _OUTPUT).open("wb", buffering=0) as self._output:
            child = self._child = Child(self._command, self._receive)
            self._begin_log(first_step=0)
            self._sensors = Sensors(self._gpus, _POWER_HZ, self._elapsed)
            background = BackgroundReport.start(self._out, GPU_SECONDS if self._gpus else CPU_SECONDS)
            follower = Thread(target=self._follow)
            follower.start()
            status, cpu_seconds = child.wait()
            ended = self._elapsed()
            for number in self._incomplete:
                self._receive(number, b"", ended=True)
        self._pieces.put(None)
        follower.join()
        background.stop()
        try:
            self._end_log(status, ended, cpu_seconds)
            self._lock.close()
            report, folder, recorded = build_report(self._out, claims_of(self._out, None))
            paths = write_report(report, folder, recorded)
            print_report(report, Console(stderr=True), paths[-1])
        except (BadInput, OSError) as error:  # the status is the program's
            print(f"nanogauge watch: no report: {error}", file=sys.stderr)
        return status

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _predict(self, spec: RunSpec, gpu: str | None) -> tuple[RunSpec, Prediction]:
        """Return the spec on its device, and its prediction."""
        local = self._cpu
        if self._gpus and spec.device != "cpu":
            local = local_hardware(resolve_dtype(spec, on_gpu=True), self._gpus[0].device)
        prediction = predict_logged(spec, gpu and self._given.gpu, True, local)
        build_rows(self._claims, spec, prediction, None)  # raises for a claim that cannot be computed
        return spec.resolved(prediction.dtype, prediction.gpus), prediction

    def _freeze(self, spec: RunSpec, prediction: Prediction) -> None:
        """Write the folder's files for a log that has not begun; BadInput if they cannot be written."""
        machine = self._machine | {"device": prediction.hardware.name}
        self._sha256 = create(self._out, spec, machine, prediction).prediction_sha256
        self._spec, self._prediction = spec, prediction

    def _begin_log(self, first_step: int) -> None:
        self._log = RunLog(self._out, self._elapsed)
        self._start = Start(
            elapsed_seconds=0.0,
            unix_time=self._began_unix,
            source="watch",
            max_steps=self._spec.steps,
            first_step=first_step,
            prediction_sha256=self._sha256,
            device=self._prediction.hardware.name,
            idle_power_watts=self._idle.power_watts,
            idle_utilization=self._idle.utilization,
            ranks=self._spec.world_size,
            sensed_cards=len(self._gpus) or None,
        )
        self._write(self._start)

    def _write(self, *lines: LogLine) -> None:
        for line in lines:
            self._log.write(line)

    def _receive(self, number: int, data: bytes, ended: bool = False) -> None:
        """Take a piece of output; only whole lines are kept and read, so that the two outputs do not mix."""
        with self._receiving:
            data = self._incomplete[number] + data
            whole = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
            if ended or len(data) > _LONGEST_PIECE_BYTES:
                whole = len(data)
            self._incomplete[number] = data[whole:]
            with suppress(OSError):  # a full disk must not stop the program
                self._output.write(data[:whole])
            self._pieces.put((self._elapsed(), data[:whole]))

    def _lines(self) -> Iterator[tuple[float, str]]:
        """Yield the lines of the output with their times as they come, and log the sensors meanwhile."""
        sensed = -math.inf
        while True:
            piece: tuple[float, bytes] | None = (0.0, b"")
            with suppress(Empty):
                piece = self._pieces.get(timeout=_TICK_SECONDS)
            if self._elapsed() - sensed > _TICK_SECONDS:
                sensed = self._elapsed()
                self._log_sensors()
            if piece is None:
                return
            yield from ((piece[0], line) for line in re.split("[\r\n]+", piece[1].decode(errors="replace")) if line)

    def _log_sensors(self) -> None:
        changes = self._sensors.changes()
        self._write(*(Event(what="absent", text=f"{change.text}.", about=change.field) for change in changes))
        self._write(*self._sensors.readings())
        now_bytes = sum(process_bytes(pid) or 0 for pid in process_tree(self._child.pid))
        self._peak_bytes = max(self._peak_bytes, now_bytes)

    def _follow(self) -> None:
        """Log the steps in the output, as soon as one says which program prints it."""
        lines, ahead = tee(self._lines())
        format = recognize(strip_controls(line) for _, line in islice(ahead, _SEARCHED_LINES))
        del ahead  # it would keep all lines
        if format is not None:
            self._parser = LogParser(format, lambda: self._arrived)
        for number, (self._arrived, line) in enumerate(lines, start=1):
            if self._parser is not None:
                self._parser.read(number, line)
                self._log_steps(self._parser, ended=False)
        if self._parser is not None:
            self._parser.finish([])
            self._log_steps(self._parser, ended=True)

    def _log_steps(self, parser: LogParser, ended: bool) -> None:
        """Log the new steps of the first run in the output; before them, freeze its prediction."""
        self._runs = split_runs(parser.log.processes)
        if not self._runs:
            return
        run = self._runs[0]
        if self._converter is None and (ended or len(run[0].steps) == 1):
            self._describe(parser.format, run[0], ended)
        if self._converter is not None:
            self._write(*self._converter.lines(run, ended or len(self._runs) > 1))

    def _describe(self, format: Format, process: LoggedProcess, ended: bool) -> None:
        """Freeze the prediction and begin the log again if the output has said what the run is, or has ended."""
        path, old, kept = self._out / LOG_NAME, self._log, self._out / f"{LOG_NAME}.old"
        try:
            spec, gpu, events = describe(self._out / _OUTPUT, format, [process], self._given)
            spec, prediction = self._predict(spec, gpu)
            if not ended and any(event.what == "length" for event in events):
                return
            path.rename(kept)
            self._freeze(spec, prediction)
        except BadInput as error:
            if kept.exists():  # the disk is full: the log continues without steps
                kept.rename(path)
            if ended:
                self._write(warning("refused", f"The steps are not in the log: {error}"))
            return
        self._begin_log(process.first_step)
        with old:
            before = [line for line in lines_of(kept.read_bytes(), kept) if line is not None]
        kept.unlink()
        self._write(*before[1:], *events)
        self._converter = LiveConverter(format, self._start, spec.compile is not False)

    def _end_log(self, status: int, wall_seconds: float, cpu_seconds: float) -> None:
        """Log what was not seen, and the end."""
        self._write(*self._sensors.close())
        run = self._runs[0] if self._converter is not None else []
        if self._converter is None:
            self._write(*(not_in_log(row, "no step was seen") for row in _OF_STEPS))
        else:
            steady = self._converter.steady_seconds
            self._write(*absent_events(run, bool(steady), statistics.median(steady) if steady else None))
            self._write(*remarks(replace(self._converter.format, absent={}), run))
        if not self._runs:
            programs = ", ".join(format.title for format in TEXT_FORMATS.values())
            text = f"No step of {programs} is in the output: what was trained, its steps and its losses were not seen."
            self._write(warning("unrecognized", text))
        elif (others := len(self._runs) - 1) > 0:
            text = f"The program made {others} more runs, which nanogauge import {_OUTPUT} --run-number K reads."
            self._write(warning("several_runs", text))
        updates, ending, reason = run[-1].updates if run else 0, "finished", None
        if status:
            ending, reason = "stopped" if status in _STOPPED else "failed", f"exit status {status}"
        elif run and self._spec.steps - updates >= (log_interval(run) or 1):
            ending, reason = "stopped", "the program ended by itself"
        elif run:
            updates = max(updates, self._spec.steps)  # the last steps may not be printed
        with self._log:
            self._write(
                End(
                    status=ending,
                    steps=updates,
                    elapsed_seconds=wall_seconds,
                    wall_seconds=wall_seconds,
                    peak_host_bytes=self._peak_bytes or None,
                    cpu_seconds=cpu_seconds,
                    reason=reason,
                    peak_allocated_bytes=max((p.peak_allocated_bytes or 0 for p in run), default=0) or None,
                    peak_reserved_bytes=max((p.peak_reserved_bytes or 0 for p in run), default=0) or None,
                )
            )
