"""Generate text with a run's model and print it token by token.

python sample.py runs/NAME [--prompt TEXT] [--prompts FILE] [--tokens 256] [--temperature 0.8] [--top-k K] [--top-p P]
    [--seed 1337] [--checkpoint newest|best|STEP]

A text ends at the end-of-text token or after --tokens. Without a prompt it begins a document;
--prompts takes one prompt a line. The speed is printed last, on stderr.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import trainer.step.torch_env  # noqa: F401  before torch
from nanogauge.cli import Parser, run_command

# isort: split
import torch

from nanogauge.errors import BadInput
from nanogauge.quantities import format_seconds
from trainer.evaluation.generation import Choice, generate, stream_text
from trainer.evaluation.load import CHECKPOINT_HELP, TOKENIZER_HELP, open_trained, tokenizer_of


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line")
    parser.add_argument("--tokens", type=int, default=256, help="maximum tokens per text")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int, help="sample from the K most likely tokens")
    parser.add_argument("--top-p", type=float, help="sample from the most likely tokens of total probability P")
    parser.add_argument("--seed", type=int, default=1337, help="of each text")
    parser.add_argument("--checkpoint", default="newest", help=CHECKPOINT_HELP)
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--tokenizer", help=TOKENIZER_HELP)
    given = parser.parse(arguments)
    choice = checked_choice(given.temperature, given.top_k, given.top_p)
    if given.tokens < 1:
        raise BadInput("--tokens takes a number above 0.")
    prompts = given.prompt + (read_prompts(given.prompts) if given.prompts is not None else [])
    trained = open_trained(given.run, given.checkpoint, given.device, half=True)
    for sentence in trained.skipped:
        print(f"! {sentence}", file=sys.stderr)
    tokenizer = tokenizer_of(trained.config.data, given.tokenizer)
    count, seconds = 0, 0.0
    for number, prompt in enumerate(prompts or [""]):
        if number:
            print("\n---")
        begin = tokenizer.prompt(prompt)
        print(prompt, end="", flush=True)
        generator = torch.Generator().manual_seed(given.seed)
        began = time.perf_counter()
        end = tokenizer.end_of_text
        made = generate(trained.model, begin, given.tokens, choice, generator, end)
        for text, of_tokens in stream_text(made, tokenizer):
            print(text, end="", flush=True)
            count += of_tokens
        seconds += time.perf_counter() - began
    print()
    speed = count / seconds
    text = f"{count:,} tokens in {format_seconds(seconds)}: {speed:,.0f} tokens/s"
    print(f"step {trained.step:,}, {text}", file=sys.stderr)
    return 0


def checked_choice(temperature: float, top_k: int | None, top_p: float | None) -> Choice:
    """Return the sampling options as a Choice.

    Raises:
        BadInput: if one is out of range.
    """
    if not 0 <= temperature < float("inf"):
        raise BadInput(f"--temperature takes a number from 0 on, not {temperature:g}.")
    if top_k is not None and top_k < 1:
        raise BadInput(f"--top-k takes a number above 0, not {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise BadInput(f"--top-p takes a number above 0 and up to 1, not {top_p:g}.")
    return Choice(temperature, top_k, top_p)


def read_prompts(path: Path) -> list[str]:
    """Return the non-empty lines of a file.

    Raises:
        BadInput: if it cannot be read, or has none.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8"
        raise BadInput(f"cannot read the prompts {path}: {reason}.") from None
    if not lines:
        raise BadInput(f"{path} holds no prompt; write one a line.")
    return lines


if __name__ == "__main__":
    run_command(main)
