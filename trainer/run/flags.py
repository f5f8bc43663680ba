"""The command line of train.py, which its supervisor reads too, without torch."""

from __future__ import annotations

from argparse import SUPPRESS, Namespace
from collections.abc import Sequence

from nanogauge.claims import load_claims
from nanogauge.cli import Parser, shipped
from nanogauge.config import Config, add_config_flags, config_overrides, load_config
from nanogauge.errors import BadInput
from trainer.run.resume import check_names


def train_parser(description: str) -> Parser:
    """What train.py accepts."""
    parser = Parser(description)
    parser.add_argument("config", type=shipped, help="configuration of the run")
    parser.add_argument("--resume", choices=["auto"], help="go on from the newest checkpoint")
    parser.add_argument(
        "--allow-change",
        nargs="+",
        default=[],
        metavar="NAME",
        help="take this key of the configuration, code, torch, device, dtype or data as it is now, "
        "other than the run to resume began with",
    )
    parser.add_argument("--init-from", dest="run.init_from", default=SUPPRESS, metavar="GPT2")
    parser.add_argument("--rehearse", type=int, metavar="N", help="stop after N steady steps")
    parser.add_argument(
        "--claims", type=shipped, help="claims to hold against the run in its report"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="start in spite of the doctor, and even where the memory cannot suffice",
    )
    parser.add_argument(
        "--supervise",
        action="store_true",
        help="start the run again, from its newest checkpoint, whenever it crashes",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        metavar="N",
        help="with --supervise: give up after so many in a row without a new step (10)",
    )
    add_config_flags(parser)
    return parser


def read_command(arguments: Sequence[str], description: str | None) -> tuple[Namespace, Config]:
    """The command line and the configuration of the run.

    Raises:
        BadInput: if one is wrong.
    """
    assert description is not None
    given = train_parser(description).parse(arguments)
    if given.max_restarts is not None:
        raise BadInput("--max-restarts is for --supervise; give both.")
    if given.rehearse is not None and given.rehearse < 1:
        raise BadInput("--rehearse takes a number of steps above 0.")
    check_names(given.allow_change)
    config = load_config(given.config, config_overrides(given))
    if given.claims is not None:
        load_claims(given.claims)
    return given, config
