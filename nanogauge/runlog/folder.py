"""Writing and reading of the files of a run folder that exist before the first step."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from nanogauge.config import load_config
from nanogauge.errors import BadInput
from nanogauge.files import make_folder, read_whole, refuse_outside_link, scrubbed, write_atomic
from nanogauge.runlog.history import RunHistory
from nanogauge.runlog.reader import LOG_NAME, LogReader, has_begun
from nanogauge.runspec import RunSpec
from nanogauge.schema import Prediction, TimeZone

SPEC_NAME = "spec.json"
CONFIG_TOML = "config.toml"
"""Configuration of train.py; a folder of another program's run has none."""

Machine = dict[str, object]
"""machine.json: names and versions, each a string, a number, None, or a list or dict of them"""


@dataclass(frozen=True)
class RunFolder:
    path: Path
    spec: RunSpec
    machine: Machine
    prediction: Prediction
    prediction_sha256: str
    config_toml: str | None = None
    """Text of config.toml; None if the folder has none."""

    @property
    def time_zone(self) -> TimeZone:
        """Time zone of the machine that trained; UTC where machine.json has none."""
        found = self.machine.get("time_zone")
        return TimeZone.model_validate({} if found is None else found)


def create(
    path: Path, spec: RunSpec, machine: Machine, prediction: Prediction, config_toml: str | None = None
) -> RunFolder:
    """Create the folder of a new run, write its files and freeze its prediction."""
    make_folder(path)
    if has_begun(path):
        raise BadInput(
            f"{path} already holds a run; continue it with --resume auto, or give this one another --run.name."
        )
    machine = scrubbed(machine)
    prediction = Prediction.model_validate(scrubbed(prediction.model_dump()))
    data = prediction.model_dump_json(indent=1).encode()
    try:
        if config_toml is not None:
            write_atomic(path / CONFIG_TOML, config_toml.encode())
        else:
            (path / CONFIG_TOML).unlink(missing_ok=True)
        write_spec(path, spec)
        write_atomic(path / "machine.json", json.dumps(machine, indent=1).encode())
        write_atomic(path / "prediction.json", data)
    except OSError as error:
        raise BadInput(f"cannot write to {path}: {error.strerror}; free space there.") from None
    return RunFolder(path, spec, machine, prediction, hashlib.sha256(data).hexdigest(), config_toml)


def write_spec(path: Path, spec: RunSpec) -> None:
    """Write spec.json into a run folder, without secrets."""
    write_atomic(path / SPEC_NAME, json.dumps(scrubbed(spec.to_dict()), indent=1).encode())


def read_spec(path: Path, prediction: Prediction) -> RunSpec:
    """Read spec.json, or in an older folder without it config.toml."""
    try:
        return RunSpec.from_json(read_whole(path / SPEC_NAME))
    except FileNotFoundError:
        if not (path / CONFIG_TOML).exists():
            raise BadInput(f"{path} has neither {SPEC_NAME} nor {CONFIG_TOML}; restore one of them.") from None
        return RunSpec.from_config(load_config(path / CONFIG_TOML), prediction.dtype, prediction.gpus)
    except OSError as error:
        raise BadInput(f"cannot read {error.filename}: {error.strerror}.") from None
    except ValueError:
        raise BadInput(f"{path / SPEC_NAME} is damaged or of a newer nanogauge; restore it, or update.") from None


def load(path: Path) -> RunFolder:
    """Read the files that were written before the first step."""
    if not path.is_dir():
        raise BadInput(f"there is no run folder {path}; runs/ holds those that were trained.")
    if not (path / LOG_NAME).exists():
        raise BadInput(f"{path} is not a run folder: it has no {LOG_NAME}; give the folder of a run.")
    for name in (SPEC_NAME, CONFIG_TOML, "machine.json", "prediction.json", LOG_NAME):
        refuse_outside_link(path / name)
    try:
        machine = json.loads(read_whole(path / "machine.json"))
        if not isinstance(machine, dict):
            raise ValueError("machine.json holds no object")
        TimeZone.model_validate(machine.get("time_zone") or {})
        data = read_whole(path / "prediction.json")
        prediction = Prediction.model_validate_json(data)
        config = path / CONFIG_TOML
        config_toml = read_whole(config).decode(errors="replace") if config.exists() else None
    except OSError as error:
        raise BadInput(f"cannot read {error.filename}: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise BadInput(f"machine.json or prediction.json in {path} is damaged; restore it.") from None
    spec, sha256 = read_spec(path, prediction), hashlib.sha256(data).hexdigest()
    return RunFolder(path, spec, machine, prediction, sha256, config_toml)


def load_with_log(path: Path, reader: LogReader | None = None) -> tuple[RunFolder, RunHistory]:
    """Read a run folder and its log; a `reader` that has read it before reads only new lines.

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
    if folder.spec.is_undescribed:
        folder = replace(folder, spec=replace(folder.spec, steps=max(1, recorded.steps_done)))
    return folder, recorded


CLAIMS_NAME = "claims.toml"
