"""Compare the speed of text generation with nanoGPT's generate(), which keeps no KV cache.

python bench/sample.py PATH-TO-nanoGPT [--tokens 256] [--rounds 9] [--json]

Both use the weights of a new model of configs/demo.toml and alternate; a round is one text. Their greedy texts must be
identical first. Most of the text lies beyond the demo's context of 64 tokens; in the second case the context holds the
whole text.
"""

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


def peer_of(nanogpt: Any, model: GPT) -> Any:
    """Return nanoGPT's model with our weights."""
    config = model.config.model_dump()
    fields = nanogpt.GPTConfig.__dataclass_fields__
    with contextlib.redirect_stdout(sys.stderr):  # it prints its size
        peer = nanogpt.GPT(nanogpt.GPTConfig(**{k: v for k, v in config.items() if k in fields}))
    peer.load_state_dict(model.state_dict())
    return peer.eval()


def compare(nanogpt: Any, config: ModelSection, count: int, rounds: int) -> tuple[list[float], list[float]]:
    """Return our and nanoGPT's tokens per second for each round after the first.

    Raises:
        RunFailed: if the greedy texts within one context differ.
    """
    torch.manual_seed(1)
    model = GPT(config).eval()
    peer = peer_of(nanogpt, model)
    start = torch.zeros((1, 1), dtype=torch.long)
    within = min(count, config.block_size - 1)
    greedy = list(generate(model, [0], within, Choice(temperature=0), torch.Generator()))
    if peer.generate(start, within, top_k=1)[0, 1:].tolist() != greedy:
        raise RunFailed("the two write different texts: they are not the same model.")
    ours, theirs = [], []
    for seed in range(rounds + 1):
        torch.manual_seed(seed)
        random = torch.Generator().manual_seed(seed)
        began = time.perf_counter()
        generated = sum(1 for _ in generate(model, [0], count, CHOICE, random))
        between = time.perf_counter()
        peer.generate(start, count, CHOICE.temperature, CHOICE.top_k)
        ours.append(generated / (between - began))
        theirs.append(count / (time.perf_counter() - between))
    return ours[1:], theirs[1:]


def measure(args: Any) -> list[Result]:
    nanogpt = load_nanogpt(args.nanogpt)
    git = ["git", "-C", str(args.nanogpt), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    peer = f"nanoGPT {commit}".rstrip()
    model = load_config(ROOT / "configs" / "demo.toml").model
    results = []
    for context in (model.block_size, LONG_CONTEXT):
        config = model.model_copy(update={"block_size": context})
        case = f"demo model, context {context:,}, {args.tokens} tokens"
        ours, theirs = compare(nanogpt, config, args.tokens, args.rounds)
        results += [
            result("tokens_per_second_ratio", case, ratios(ours, theirs), peer),
            result("tokens_per_second", case, ours, None),
            result("tokens_per_second", f"{case}, {peer}", theirs, None),
        ]
    return results


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_argument("nanogpt", type=nanogpt_folder, help="folder of nanoGPT, with its model.py")
    bench.add_size("--tokens", 256, 8, "tokens of a text")
    bench.add_size("--rounds", 9, 1, "counted rounds, after one that warms up")
    bench.run(measure)
