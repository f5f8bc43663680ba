"""Parse the command line of train.py, without importing torch, as the supervisor parses it too."""

from argparse import SUPPRESS
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanogauge.analysis.claims import load_claims
from nanogauge.cli import Parser
from nanogauge.config import Config, add_config_flags
from nanogauge.errors import BadInput
from nanogauge.sinks.mode import obeying_config
from trainer.run.resume import check_names


@dataclass(frozen=True)
class Options:
    """Command-line options of train.py that are not part of the run's configuration."""

    resume: bool = False
    """Resume from the newest checkpoint; if the run folder is empty, start a new run."""
    rehearse: int | None = None
    """Number of steps in the steady state after which to stop; None for the whole run."""
    claims: Path | None = None
    force: bool = False
    allow_change: Collection[str] = ()
    """Configuration keys and names of resume.IDENTITY that may differ from the run to resume."""


def train_parser(description: str) -> Parser:
    """Return the parser of train.py's command line."""
    parser = Parser(description, usage="%(prog)s CONFIG [options]")
    parser.add_argument("config", type=Path, help="configuration of the run")
    parser.add_argument(
        "--resume", choices=["auto"], nargs="?", const="auto", help="continue from the newest checkpoint"
    )
    parser.add_argument(
        "--allow-change",
        nargs="+",
        default=[],
        metavar="NAME",
        help="resume although this key of the configuration, or code, torch, device, dtype or data, has changed",
    )
    parser.add_argument(
        "--init-from",
        dest="run.init_from",
        default=SUPPRESS,
        metavar="GPT2",
        help="weights to start from: a Hugging Face folder, or a hub name such as gpt2",
    )
    parser.add_argument("--rehearse", type=int, metavar="N", help="stop after N steady steps")
    parser.add_argument("--claims", type=Path, help="claims to compare with the run in its report")
    parser.add_argument(
        "--force", action="store_true", help="start in spite of a no-go of the doctor or too little memory"
    )
    parser.add_argument(
        "--supervise", action="store_true", help="restart the run from its newest checkpoint whenever it crashes"
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        metavar="N",
        help="with --supervise: give up after N restarts in a row without a new step (10)",
    )
    add_config_flags(parser)
    return parser


def read_command(arguments: Sequence[str], description: str | None) -> tuple[Options, Config]:
    """Parse the command line and load the configuration of the run.

    Raises:
        BadInput: if an argument or the configuration is invalid.
    """
    assert description is not None
    given = train_parser(description).parse(arguments)
    if given.max_restarts is not None:
        raise BadInput("--max-restarts is for --supervise; give both.")
    if given.rehearse is not None and given.rehearse < 1:
        raise BadInput("--rehearse takes a number of steps above 0.")
    check_names(given.allow_change)
    config = obeying_config(given)
    assert config is not None
    if given.claims is not None:
        load_claims(given.claims)
    options = Options(given.resume == "auto", given.rehearse, given.claims, given.force, given.allow_change)
    return options, config
