"""A loop under the watchdog: python hanging.py FOLDER LIMIT_SECONDS STEP_SECONDS HANG_AT

It makes steps of STEP_SECONDS and hangs in step HANG_AT, in a call that never returns; step 2 announces that it takes
three times the limit, and does. After step 7 it ends.
"""

import sys
import threading
import time
from pathlib import Path

from nanogauge.runlog.writer import RunLog
from nanogauge.schema import Event, Start, Step
from trainer.run.watchdog import Watchdog


def forward_that_never_returns() -> None:
    threading.Event().wait()


def main() -> None:
    folder, limit, step_seconds, hang_at = Path(sys.argv[1]), *map(float, sys.argv[2:])
    log = RunLog(folder)
    log.write(Start(max_steps=8, prediction_sha256="", device="none"))
    watchdog = Watchdog(folder, limit, lambda text: log.write(Event(level="alarm", what="hang", text=text)))
    watchdog.start()
    for step in range(8):
        if step == hang_at:
            forward_that_never_returns()
        long = 3 * limit if step == 2 else 0.0
        watchdog.beat(expect_seconds=long)
        time.sleep(step_seconds + long)
        log.write(Step(step=step))
    watchdog.close()


if __name__ == "__main__":
    main()
