"""A run folder like our own, made of a log that another program wrote."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nanogauge import __version__
from nanogauge.claims import Claims
from nanogauge.config import Config
from nanogauge.errors import BadInput
from nanogauge.importers.nanogpt_log import parse, to_run_log
from nanogauge.records import Prediction
from nanogauge.report.build import CLAIMS_NAME
from nanogauge.report.compare import build_rows
from nanogauge.runfolder import create, make_folder, write_aside
from nanogauge.runlog import FILE_NAME, RunLog, read_log


def import_nanogpt_log(
    log_path: Path,
    config: Config,
    prediction: Prediction,
    claims: Claims | None,
    claims_path: Path | None,
    out: Path,
) -> None:
    """Write out/ from a nanoGPT log; an earlier import there is replaced, a trained run never.

    Raises:
        BadInput: if the log or the claims are unusable, or out holds a run of another origin.
    """
    log = parse(log_path)
    if log.iterations[-1][0] > config.train.max_steps:
        raise BadInput(
            f"{log_path} goes to iteration {log.iterations[-1][0]:,} but the configuration has "
            f"train.max_steps = {config.train.max_steps:,}; give the configuration of that run."
        )
    build_rows(claims, config, prediction, None)  # a claim that cannot be computed fails here
    to_run_log(log, config.train.max_steps, prediction.hardware.name, "")
    if (out / FILE_NAME).exists():
        if read_log(out).starts[0].source == "train":
            raise BadInput(f"{out} holds a run that was trained here; choose another --out.")
        make_folder(out)
        (out / FILE_NAME).unlink()
    machine: dict[str, object] = {
        "gpu": prediction.hardware.name,
        "log": log_path.name,
        "log_sha256": hashlib.sha256(log_path.read_bytes()).hexdigest(),
        "imported_by": f"nanogauge {__version__}",
        "note": "The log does not name its card, software or power: the GPU is the one that was "
        "given on the command line.",
    }
    run = create(out, config, machine, prediction)
    if claims_path is not None:
        write_aside(out / CLAIMS_NAME, claims_path.read_bytes())
    lines = to_run_log(log, config.train.max_steps, prediction.hardware.name, run.prediction_sha256)
    with RunLog(out) as writer:
        for line in lines:
            writer.write(line)
