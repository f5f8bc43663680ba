"""What a run will need, whether it fits, when it ends, and which claims about it cannot be true.

python plan.py configs/rtx4070_fineweb.toml --gpu "RTX 4070" --claims predictions/seed_zh.toml
python plan.py configs/rtx4070_fineweb.toml --gpu "RTX 4070" --fit --by 08:00
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from nanogauge.claims import load_claims
from nanogauge.cli import Parser, run_command
from nanogauge.config import add_config_flags, config_overrides, load_config
from nanogauge.errors import BadInput
from nanogauge.hardware import lookup
from nanogauge.planning import free_memory, make_wish, plan_deadline, plan_fit
from nanogauge.predict.deadline import TOKENS_PER_PARAMETER
from nanogauge.predict.prediction import predict, resolve_dtype
from nanogauge.records import SCHEMA
from nanogauge.report.compare import build_rows
from nanogauge.report.plan_text import print_plan


def make_parser() -> Parser:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("config", type=Path, help="configuration of the run")
    parser.add_argument("--gpu", required=True, help='a row of nanogauge/hardware.toml: "RTX 4070"')
    parser.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="so many of them share the micro-batches"
    )
    parser.add_argument("--free-vram-gib", type=float, metavar="GIB", help="memory that is free")
    parser.add_argument("--claims", type=Path, help="claims to hold against the plan")
    parser.add_argument("--fit", action="store_true", help="the largest models that would fit")
    parser.add_argument("--by", metavar="08:00", help="what would end by then")
    parser.add_argument("--start", metavar="22:00", help="when the run starts; now if not given")
    parser.add_argument(
        "--tokens-per-parameter",
        type=float,
        default=TOKENS_PER_PARAMETER,
        metavar="N",
        help="of the model that would end --by then; 20 is Chinchilla's",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    add_config_flags(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    given = make_parser().parse(arguments)
    if given.gpus < 1:
        raise BadInput("--gpus takes a number of GPUs from 1 on.")
    now = datetime.now().astimezone().replace(microsecond=0)
    wish = make_wish(now, given.start, given.by, given.tokens_per_parameter)
    config = load_config(given.config, config_overrides(given))
    claims = load_claims(given.claims) if given.claims is not None else None
    dtype = resolve_dtype(config, "gpu")
    prediction = predict(config, lookup(given.gpu, dtype), dtype, given.gpus)
    rows, findings = build_rows(claims, config, prediction, None)
    free = free_memory(prediction.hardware, given.free_vram_gib, given.gpus)
    fit = plan_fit(config, prediction, free, models=given.fit)
    deadline = plan_deadline(config, prediction, free, wish)
    if not given.json:
        print_plan(config, prediction, rows, findings, fit, deadline, now)
        return 0
    plan = {
        "schema": SCHEMA,
        "gpus": given.gpus,
        "rows": [row.model_dump(mode="json") for row in rows],
        "fit": fit.model_dump(mode="json"),
        "deadline": deadline.model_dump(mode="json"),
        "inconsistencies": [finding.model_dump(mode="json") for finding in findings],
    }
    print(json.dumps(plan, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    run_command(main)
