r"""Compare a run with its prediction; the same as `nanogauge report`.

python report.py runs/NAME --claims predictions/seed_zh.toml
python report.py runs/ONE runs/OTHER
python report.py --nanogpt-log LOG --config configs/rtx4070_fineweb.toml --gpu "RTX 4070" \
    --out runs/imported
"""

from __future__ import annotations

from collections.abc import Sequence

from nanogauge.cli import run_command
from nanogauge.commands import report
from nanogauge.schema import Hardware


def main(arguments: Sequence[str]) -> int:
    return report.main(arguments, measure_cpu)


def measure_cpu(dtype: str) -> Hardware:
    from trainer.calibrate import this_processor  # imports torch, which only --this-cpu needs

    return this_processor(dtype)


if __name__ == "__main__":
    run_command(main)
