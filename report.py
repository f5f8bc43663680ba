r"""Compare a run with its prediction; the same as `nanogauge report`.

python report.py runs/NAME --claims predictions/seed_zh.toml
python report.py runs/ONE runs/OTHER
python report.py --log LOG --gpu "RTX 4070" --out runs/imported
"""

from nanogauge.cli import run_command
from nanogauge.commands.report import main

if __name__ == "__main__":
    run_command(main)
