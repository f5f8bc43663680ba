"""Predict a run before it starts; the same as `nanogauge plan`, and able to measure this machine.

python plan.py configs/rtx4070_fineweb.toml --gpu "RTX 4070" --claims predictions/seed_zh.toml python plan.py
configs/rtx4070_fineweb.toml --gpu "RTX 4070" --by 08:00
python plan.py configs/rtx4070_fineweb.toml --calibrate
python plan.py --best 8h --gpu "RTX 4070" --write MINE.toml
python plan.py --doctor configs/demo.toml
"""

from collections.abc import Sequence

from nanogauge.cli import run_command
from nanogauge.commands import plan
from nanogauge.commands.doctor import DeviceTools


def main(arguments: Sequence[str]) -> int:
    return plan.main(arguments, load_tools)


def load_tools() -> DeviceTools:
    # They import torch, which only --calibrate and --doctor need.
    from trainer.calibrate import calibrate, probe
    from trainer.data.dataset import count_tokens

    return DeviceTools(calibrate, probe, count_tokens)


if __name__ == "__main__":
    run_command(main)
