"""Tokens a second of generating text, against nanoGPT's generate(), which runs all again each time.

python bench/sample.py PATH-TO-nanoGPT [--tokens 256] [--rounds 9] [--json]

Both have the same weights, those of a new model of configs/demo.toml, and take turns; a round is
one text. The ratio is ours over theirs, the median over rounds with the lowest and highest. The
demo's context is 64 tokens, so most of its text is beyond it; the second case has a context that
holds the whole text. Before, both write the likeliest text, which must be the same.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import trainer.step.torch_env  # noqa: E402, F401  before torch

# isort: split
import torch  # noqa: E402
from results import result  # noqa: E402

from model import GPT  # noqa: E402
from nanogauge.cli import Parser, run_command  # noqa: E402
from nanogauge.config import ModelSection, load_config  # noqa: E402
from nanogauge.errors import BadInput, RunFailed  # noqa: E402
from trainer.evaluation.generation import Choice, generate  # noqa: E402

CHOICE = Choice(temperature=0.8, top_k=200)
LONG_CONTEXT = 1024


def load_peer(folder: Path) -> Any:
    """nanoGPT's model.py as a module."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    if spec is None or spec.loader is None or not (folder / "model.py").exists():
        raise BadInput(f"{folder} holds no model.py; give the folder of a clone of nanoGPT.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def peer_of(peer: Any, model: GPT) -> Any:
    """nanoGPT's model with the weights of ours."""
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


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("nanogpt", type=Path, help="folder of a clone of nanoGPT")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a text")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count, after one more")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    given = parser.parse(arguments)
    module = load_peer(given.nanogpt)
    git = ["git", "-C", str(given.nanogpt), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    peer = f"nanoGPT {commit}".rstrip()
    model = load_config(ROOT / "configs" / "demo.toml").model
    results = []
    for context in (model.block_size, LONG_CONTEXT):
        config = model.model_copy(update={"block_size": context})
        case = f"demo model, context {context:,}, {given.tokens} tokens"
        ours, theirs = compare(module, config, given.tokens, given.rounds)
        ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
        found = result("tokens_per_second_ratio", case, ratios, peer)
        results += [found, result("tokens_per_second", case, ours, None)]
        if not given.json:
            print(
                f"{case:44} {statistics.median(ours):7,.0f} tokens/s, {peer} "
                f"{statistics.median(theirs):7,.0f}: {found['value']:.1f} times "
                f"({found['low']:.1f}-{found['high']:.1f})"
            )
    if given.json:
        print(json.dumps({"bench": "sample", "results": results}))
    return 0


if __name__ == "__main__":
    run_command(main)
