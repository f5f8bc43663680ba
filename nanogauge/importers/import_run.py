"""Import of another program's log as a run folder."""

from pathlib import Path

from nanogauge import __version__
from nanogauge.analysis.claims import load_claims
from nanogauge.analysis.verdicts import build_rows
from nanogauge.errors import BadInput
from nanogauge.files import make_folder, sha256_file, write_atomic
from nanogauge.hardware import find_gpu, lookup
from nanogauge.importers.convert import to_run_log
from nanogauge.importers.described import Given, describe
from nanogauge.importers.parsed import LoggedProcess, ParsedLog, split_runs, warning
from nanogauge.importers.reader import parse_log
from nanogauge.prediction.prediction import predict
from nanogauge.prediction.workload import resolve_dtype
from nanogauge.runlog.folder import CLAIMS_NAME, create
from nanogauge.runlog.reader import LOG_NAME, read_log
from nanogauge.runlog.writer import RunLog
from nanogauge.runspec import RunSpec
from nanogauge.schema import Event, Hardware, Prediction, Start


def import_log(path: Path, given: Given, claims_path: Path | None, out: Path, run_number: int | None = None) -> None:
    """Write a run folder from a log; replace an earlier import there, but never a trained run.

    Args:
        run_number: number of the run in a file with several, from 1; None for the last.

    Raises:
        BadInput: if the log or the claims cannot be used, the log contradicts the configuration, or out contains a
            trained run.
    """
    claims = load_claims(claims_path) if claims_path is not None else None
    log = parse_log(path)
    run, events = _select_run(log, path, run_number)
    spec, gpu, remarks = describe(path, log.format, run, given)
    if spec.device == "cpu" and given.gpu is not None:
        raise BadInput('--gpu names a card, but run.device is "cpu"; drop one of them.')
    prediction = predict_logged(spec, gpu, gpu is not None and gpu == given.gpu)
    build_rows(claims, spec, prediction, None)  # raises for a claim that cannot be computed
    device = prediction.hardware.name
    lines = to_run_log(log.format, run, spec, device)
    if (out / LOG_NAME).exists():
        if read_log(out).starts[0].is_live:
            raise BadInput(f"{out} holds a run that was trained here; choose another --out.")
        make_folder(out)
        (out / LOG_NAME).unlink()
    machine: dict[str, object] = {
        ("device" if prediction.hardware.kind == "cpu" else "gpu"): device,
        "log": path.name,
        "log_sha256": sha256_file(path),
        "imported_by": f"nanogauge {__version__}",
        "note": "What the log does not say of device and configuration is as given to the import.",
    }
    spec = spec.resolved(prediction.dtype, prediction.gpus)
    sha256 = create(out, spec, machine, prediction).prediction_sha256
    if claims_path is not None:
        write_atomic(out / CLAIMS_NAME, claims_path.read_bytes())
    with RunLog(out) as writer:
        for line in [*lines[:-1], *events, *log.events, *remarks, lines[-1]]:
            is_start = isinstance(line, Start)
            writer.write(line.model_copy(update={"prediction_sha256": sha256}) if is_start else line)


def predict_logged(spec: RunSpec, gpu: str | None, named: bool, local: Hardware | None = None) -> Prediction:
    """Return the prediction for a GPU, which must be known if the user names it, or else for the local device."""
    on_cpu = (spec.device if local is None else local.kind) == "cpu"
    if gpu is not None and (named or find_gpu(gpu) is not None):
        return predict(spec, lookup(gpu, resolve_dtype(spec, on_gpu=True)))
    device = "processor" if on_cpu else "card"
    hardware = local or Hardware(
        name="CPU" if on_cpu else gpu or "unknown GPU",
        kind="cpu" if on_cpu else "other",
        architecture="cpu" if on_cpu else "unknown",
        peak_flops=None,
        peak_name=f"not known: the log does not name its {device}",
        matmul_flops=None,
        memory_bytes=None,
        bandwidth_bytes_per_second=None,
        power_limit_watts=None,
        source="the log",
    )
    prediction = predict(spec, hardware)
    # The memory of a process before it creates its model is known only for train.py.
    row, reason = "peak_process_bytes", "what that program held before its model is not known"
    quantities = {r: q for r, q in prediction.quantities.items() if r != row or not on_cpu}
    unpredicted = prediction.unpredicted | ({row: reason} if on_cpu else {})
    return prediction.model_copy(update={"quantities": quantities, "unpredicted": unpredicted})


def _select_run(log: ParsedLog, path: Path, run_number: int | None) -> tuple[list[LoggedProcess], list[Event]]:
    """Return one run of the file, and a warning if the file contains others."""
    runs = split_runs(log.processes)
    if not runs:
        raise BadInput(f"{path} holds no whole step of a run.")
    number = len(runs) if run_number is None else run_number
    if not 1 <= number <= len(runs):
        count = "one run" if len(runs) == 1 else f"{len(runs)} runs"
        raise BadInput(f"{path} holds {count}; there is no --run-number {run_number}.")
    if len(runs) == 1:
        return runs[0], []
    ranges = "; ".join(
        f"{n}: steps {run[0].first_step:,} to {run[-1].last_step:,} from line {run[0].line:,} on"
        for n, run in enumerate(runs[-5:], start=max(len(runs) - 4, 1))
    )
    which = f"number {number}{', the last' if number == len(runs) else ''}"
    text = f"The log holds {len(runs)} runs ({ranges}). This is {which}; --run-number selects another."
    return runs[number - 1], [warning("several_runs", text)]
