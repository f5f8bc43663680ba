"""Tokens a second of generating text, against nanoGPT's generate(), which runs all again each time.

python bench/sample.py PATH-TO-nanoGPT [--tokens 256] [--rounds 9] [--json]

Both have the same weights, those of a new model of configs/demo.toml, and take turns; a round is
one text. The ratio is ours over theirs, the median over rounds with the lowest and highest. The
demo's context is 64 tokens, so most of its text is beyond it; the second case has a context that
holds the whole text. Before, both write the likeliest text, which must be the same.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from typing import Any

from results import ROOT, Bench, Result, ratios, result

# isort: split
import torch
from step_vs_nanogpt import nanogpt_folder
from training_pair import load_nanogpt

from model import GPT
from nanogauge.config import ModelSection, load_config
from nanogauge.errors import RunFailed
from trainer.evaluation.generation import Choice, generate

CHOICE = Choice(temperature=0.8, top_k=200)
LONG_CONTEXT = 1024


def peer_of(peer: Any, model: GPT) -> Any:
    """Return nanoGPT's model with the weights of ours."""
    config = model.config.model_dump()
    known = peer.GPTConfig.__dataclass_fields__
    with contextlib.redirect_stdout(sys.stderr):  # it prints its size
        made = peer.GPT(peer.GPTConfig(**{k: v for k, v in config.items() if k in known}))
    made.load_state_dict(model.state_dict())
    return made.eval()


def compare(
    peer: Any, config: ModelSection, count: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Tokens a second of each round, ours and theirs, after one round that does not count.

    Raises:
        RunFailed: if the likeliest text within a block is not the same.
    """
    torch.manual_seed(1)
    model = GPT(config).eval()
    theirs = peer_of(peer, model)
    start = torch.zeros((1, 1), dtype=torch.long)
    within = min(count, config.block_size - 1)
    likeliest = list(generate(model, [0], within, Choice(temperature=0), torch.Generator()))
    if theirs.generate(start, within, top_k=1)[0, 1:].tolist() != likeliest:
        raise RunFailed("the two write different texts: they are not the same model.")
    rates: tuple[list[float], list[float]] = ([], [])
    for seed in range(rounds + 1):
        torch.manual_seed(seed)
        chance = torch.Generator().manual_seed(seed)
        began = time.perf_counter()
        made = sum(1 for _ in generate(model, [0], count, CHOICE, chance))
        between = time.perf_counter()
        theirs.generate(start, count, CHOICE.temperature, CHOICE.top_k)
        rates[0].append(made / (between - began))
        rates[1].append(count / (time.perf_counter() - between))
    return rates[0][1:], rates[1][1:]


def measure(given: Any) -> list[Result]:
    module = load_nanogpt(given.nanogpt)
    git = ["git", "-C", str(given.nanogpt), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    peer = f"nanoGPT {commit}".rstrip()
    model = load_config(ROOT / "configs" / "demo.toml").model
    results = []
    for context in (model.block_size, LONG_CONTEXT):
        config = model.model_copy(update={"block_size": context})
        case = f"demo model, context {context:,}, {given.tokens} tokens"
        ours, theirs = compare(module, config, given.tokens, given.rounds)
        results += [
            result("tokens_per_second_ratio", case, ratios(ours, theirs), peer),
            result("tokens_per_second", case, ours, None),
            result("tokens_per_second", f"{case}, {peer}", theirs, None),
        ]
    return results


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_argument("nanogpt", type=nanogpt_folder, help="folder of a clone of nanoGPT")
    bench.add_size("--tokens", 256, 8, "tokens of a text")
    bench.add_size("--rounds", 9, 1, "rounds that count, after one more")
    bench.run(measure)
