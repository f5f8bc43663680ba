"""Export a run's model as a Hugging Face GPT-2 folder, for transformers and compatible programs.

python export.py runs/NAME [--out DIR] [--checkpoint newest|best|STEP] [--tokenizer NAME]

Writes weights, configuration, tokenizer and a model card with the report's figures to runs/NAME/huggingface, or where
--out says. llama.cpp's own converter makes a GGUF file of the folder: docs/after.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import trainer.step.torch_env  # noqa: F401  before torch
from nanogauge.cli import Parser, run_command
from trainer.evaluation.export import FOLDER_NAME, export_run
from trainer.evaluation.load import CHECKPOINT_HELP, TOKENIZER_HELP, open_trained


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: RUN/{FOLDER_NAME}")
    parser.add_argument("--checkpoint", default="newest", help=CHECKPOINT_HELP)
    parser.add_argument("--tokenizer", help=TOKENIZER_HELP)
    given = parser.parse(arguments)
    trained = open_trained(given.run, given.checkpoint, "cpu", half=False)
    out = given.out or given.run / FOLDER_NAME
    for sentence in [*trained.skipped, *export_run(trained, out, given.tokenizer)]:
        print(f"! {sentence}", file=sys.stderr)
    print(f"{out}  (step {trained.step:,})")
    return 0


if __name__ == "__main__":
    run_command(main)
