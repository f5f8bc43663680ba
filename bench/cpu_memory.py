"""Compare predicted with measured memory on this CPU: of train.py over random GPTs, and of traced modules.

python bench/cpu_memory.py [--seed 2] [--shapes 6] [--json]

Models of transformers with random sizes are traced by RunSpec.from_module and trained; the error is that of the traced
peak against torch.profiler's record of all allocations.

Each shape is trained eager and compiled: width 64-512, depth 1-12, context 64-512, batch 1-16, vocabulary 264-50,304,
each drawn log-uniformly. The error is that of the frozen prediction's expected peak against the kernel's VmHWM.
"""

import itertools
import math
import random
import tempfile
from pathlib import Path
from typing import Any

from results import SMALLEST_SHAPE, Bench, Result, case_of, flags_of, result, run_script

# isort: split
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from nanogauge.runlog.folder import load_with_log
from nanogauge.runspec import RunSpec


def random_shape(generator: random.Random) -> dict[str, int]:
    def log_uniform(low: int, high: int) -> int:
        return round(math.exp(generator.uniform(math.log(low), math.log(high))))

    width = 64 * log_uniform(1, 8)
    return {
        "model.n-embd": width,
        "model.n-head": width // 64,
        "model.n-layer": log_uniform(1, 12),
        "model.block-size": log_uniform(64, 512),
        "model.vocab-size": log_uniform(264, 50304),
        "train.micro-batch": log_uniform(1, 16),
    }


def train(shape: dict[str, int], compiled: bool, steps: int) -> tuple[float, float]:
    """Return the predicted and the measured peak of a run in bytes."""
    settings = shape | {"train.max-steps": steps, "train.eval-batches": 2}
    settings |= {"train.eval-every": 1000, "train.checkpoint-every": 1000}
    with tempfile.TemporaryDirectory() as out:
        flags = [f"--run.out={out}", f"--run.compile={str(compiled).lower()}", *flags_of(settings)]
        run_script("train.py", "configs/demo.toml", *flags)
        folder, recorded = load_with_log(Path(out) / "demo")
    predicted = folder.prediction.quantities["peak_process_bytes"]
    assert recorded.end is not None and recorded.end.peak_process_bytes is not None
    return predicted.expected, recorded.end.peak_process_bytes


MODULES = "GPT2LMHeadModel LlamaForCausalLM Qwen2ForCausalLM GPTNeoXForCausalLM MistralForCausalLM BertForMaskedLM"
MODULES += " ViTForImageClassification ResNetForImageClassification T5ForConditionalGeneration"


def traced_over_recorded(name: str, generator: random.Random) -> tuple[str, float]:
    """Return the sizes of a random model of transformers, and its traced over its recorded peak."""
    heads, layers, batch, length = (generator.randint(*ends) for ends in ((2, 6), (1, 4), (2, 8), (64, 256)))
    width, vocabulary, of_model = 32 * heads, generator.randint(300, 3000), getattr(transformers, name)
    sizes: dict[str, Any] = dict.fromkeys(("hidden_size", "d_model", "embedding_size"), width)
    sizes |= dict.fromkeys(("intermediate_size", "d_ff"), 3 * width) | {"d_kv": 32, "vocab_size": vocabulary}
    sizes |= dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads"), heads)
    sizes |= dict.fromkeys(("num_hidden_layers", "num_layers"), layers) | {"pad_token_id": 0}
    sizes |= {"hidden_sizes": [width, 2 * width], "depths": [layers, layers], "image_size": 64, "patch_size": 8}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = of_model(of_model.config_class(decoder_start_token_id=0, **sizes)).train()
        images = model.main_input_name == "pixel_values"
        inputs = torch.randn(batch, 3, 64, 64) if images else torch.randint(vocabulary, (batch, length))
        data = {model.main_input_name: inputs, "labels": inputs.new_zeros(batch).long() if images else inputs}
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):
            model(**data).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    peak = max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    traced = RunSpec.from_module(model, data, steps=1).traced
    assert traced is not None
    return f"{name}, width {width}, {layers} layers, batch {batch}", traced.peak_bytes / peak


def measure(args: Any) -> list[Result]:
    generator = random.Random(args.seed)
    errors: dict[str, list[float]] = {"eager": [], "compiled": []}
    if args.smallest:
        del errors["compiled"]
    modules = MODULES.split()[: 1 if args.smallest else None]
    cases = [traced_over_recorded(name, random.Random(f"{args.seed} {name}")) for name in modules]
    results = [result("traced_peak_ratio", case, [ratio], "torch.profiler") for case, ratio in cases]
    off = [abs(ratio - 1) for _, ratio in cases]
    results.append(result("traced_peak_median_error", f"{len(off)} modules", off, "torch.profiler"))
    for _ in range(args.shapes):
        shape = SMALLEST_SHAPE if args.smallest else random_shape(generator)
        for mode, values in errors.items():
            expected, measured = train(shape, mode == "compiled", args.steps)
            values.append(abs(expected / measured - 1))
            ratio = [expected / measured]
            results.append(result("cpu_process_memory_ratio", case_of(shape), ratio, mode))
    for mode, values in errors.items():
        case = f"train.py, {mode}, {args.steps} steps, seed {args.seed}"
        results.append(result("cpu_process_memory_median_error", case, values, "train.py"))
    return results


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_argument("--seed", type=int, default=2, help="seed of the shapes")
    bench.add_size("--shapes", 6, 1, "number of shapes")
    bench.add_size("--steps", 20, 2, "training steps per shape")
    bench.run(measure)
