"""What the log of a run tells its supervisor: read in a process of its own, and printed as JSON.

    python -m trainer.run.lookback ARGUMENTS OF TRAIN.PY

A log is read with tens of megabytes, which the supervisor would keep for the whole night.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from nanogauge.cli import run_command
from nanogauge.config import config_overrides, load_config
from nanogauge.runlog import has_begun, read_log
from trainer.run.flags import train_parser
from trainer.run.supervisor import Seen


def look(folder: Path) -> Seen:
    """What a run folder's log holds; of a run that has not begun, nothing.

    Raises:
        BadInput: if the log is damaged.
    """
    if not has_begun(folder):
        return Seen()
    recorded = read_log(folder)
    last = recorded.steps.last("step")
    ends = recorded.ends
    return Seen(
        starts=len(recorded.starts),
        ends=len(ends),
        steps=0 if last is None else int(last) + 1,
        restartable=bool(ends and ends[-1].restartable),
    )


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    given = train_parser(__doc__).parse(arguments)
    config = load_config(given.config, config_overrides(given))
    print(json.dumps(dataclasses.asdict(look(config.folder))))
    return 0


if __name__ == "__main__":
    run_command(main)
