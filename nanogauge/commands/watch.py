"""Run a program unchanged, measure it from outside, and report on it."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nanogauge.cli import Parser
from nanogauge.config import add_config_flags, config_overrides
from nanogauge.errors import BadInput
from nanogauge.measure.child import block_signals

_EXAMPLES = """
  %(prog)s -- python train.py config/train_gpt2.py
  %(prog)s --claims claims.toml --out runs/mine -- torchrun --nproc_per_node=2 train.py
"""


def main(arguments: Sequence[str]) -> int:
    parser = Parser(f"{__doc__}\n{_EXAMPLES}", usage="%(prog)s [options] -- COMMAND ...")
    parser.add_argument("--out", type=Path, help="run folder to write (default: runs/SCRIPT-TIME)")
    parser.add_argument("--claims", type=Path, help="claims to compare with the run")
    parser.add_argument("--config", type=Path, help="configuration of the run (default: what it prints)")
    parser.add_argument("--gpu", help="the GPU to predict for (default: this machine's)")
    parser.add_argument("--gpus", type=int, metavar="N", help="number of GPUs (default: as printed; 1 is measured)")
    add_config_flags(parser)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    given, command = parser.parse(arguments[:at]), arguments[at + 1 :]
    if not command or not command[0]:
        raise BadInput("put the program after two dashes: nanogauge watch -- python train.py")
    if sys.platform != "linux":
        raise BadInput("nanogauge watch needs Linux; elsewhere import the program's log (nanogauge import).")
    block_signals()
    from nanogauge.importers.described import Given  # numpy starts threads
    from nanogauge.watch import Watch

    script = next((word for word in command if word.endswith(".py")), command[0])
    out = given.out or Path("runs", f"{Path(script).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    described = Given(given.config, config_overrides(given), given.gpu, given.gpus)
    return Watch(command, out, described, given.claims).run()
