"""The run folder: config.toml, machine.json and prediction.json, written before the first step."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from nanogauge.config import Config, load_config
from nanogauge.errors import BadInput
from nanogauge.files import make_folder, read_whole, refuse_to_lead_out, scrubbed, write_atomic
from nanogauge.runlog.history import Recorded
from nanogauge.runlog.reader import FILE_NAME as LOG_NAME
from nanogauge.runlog.reader import LogReader, has_begun
from nanogauge.schema import Prediction

Machine = dict[str, object]
"""machine.json: names and versions, each a string, a number, None, or a list or dict of them"""


@dataclass(frozen=True)
class RunFolder:
    path: Path
    config: Config
    machine: Machine
    prediction: Prediction
    prediction_sha256: str


def create(path: Path, config: Config, machine: Machine, prediction: Prediction) -> RunFolder:
    """Write everything that is known before step 0; returns the folder with the frozen hash.

    Raises:
        BadInput: if the folder cannot be written, or already holds a run.
    """
    make_folder(path)
    if has_begun(path):
        raise BadInput(
            f"{path} already holds a run; continue it with --resume auto, "
            "or give this one another --run.name."
        )
    machine = scrubbed(machine)
    prediction = Prediction.model_validate(scrubbed(prediction.model_dump()))
    data = prediction.model_dump_json(indent=1).encode()
    try:
        write_atomic(path / "config.toml", config.to_toml().encode())
        write_atomic(path / "machine.json", json.dumps(machine, indent=1).encode())
        write_atomic(path / "prediction.json", data)
    except OSError as error:
        raise BadInput(f"cannot write to {path}: {error.strerror}; free space there.") from None
    return RunFolder(path, config, machine, prediction, hashlib.sha256(data).hexdigest())


def load(path: Path) -> RunFolder:
    """Read what was written before step 0.

    Raises:
        BadInput: if the folder or one of its files is missing or damaged.
    """
    if not path.is_dir():
        raise BadInput(f"there is no run folder {path}; runs/ holds those that were trained.")
    if not (path / LOG_NAME).exists():
        raise BadInput(
            f"{path} is not a run folder: it has no {LOG_NAME}; give the folder of a run."
        )
    for name in ("config.toml", "machine.json", "prediction.json", LOG_NAME):
        refuse_to_lead_out(path / name)
    config = load_config(path / "config.toml")
    try:
        machine = json.loads(read_whole(path / "machine.json"))
        if not isinstance(machine, dict):
            raise ValueError("machine.json holds no object")
        data = read_whole(path / "prediction.json")
        prediction = Prediction.model_validate_json(data)
    except OSError as error:
        raise BadInput(f"cannot read {error.filename}: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise BadInput(
            f"machine.json or prediction.json in {path} is damaged; restore it."
        ) from None
    return RunFolder(path, config, machine, prediction, hashlib.sha256(data).hexdigest())


def load_with_log(path: Path, reader: LogReader | None = None) -> tuple[RunFolder, Recorded]:
    """Read a run folder and its log, the latter by a reader that may know its beginning already.

    Raises:
        BadInput: as load and read_log, or if the prediction was changed after the run began.
    """
    folder = load(path)
    recorded = (reader or LogReader(path)).read()
    if any(s.prediction_sha256 != folder.prediction_sha256 for s in recorded.starts):
        raise BadInput(
            f"{path / 'prediction.json'} was changed after the run began: its hash is not the one "
            "in the log; restore the frozen prediction."
        )
    return folder, recorded
