"""What several tests begin from: the documented run, and logs of the form that nanoGPT prints."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from commands import ROOT
from hypothesis import strategies as st

from nanogauge.claims import Claims, load_claims
from nanogauge.config import Config, OptimizerSection, load_config
from nanogauge.hardware import lookup
from nanogauge.predict.prediction import predict
from nanogauge.prepare.shards import Origin
from nanogauge.records import Hardware, Prediction
from nanogauge.runspec import RunSpec

DOCUMENTED = ROOT / "configs" / "rtx4070_fineweb.toml"
SEED_CLAIMS = ROOT / "predictions" / "seed_zh.toml"
SHARED = ROOT.parent / "shared"
"""material beside a developer's checkout; tests that hold against it are skipped elsewhere"""


CPU = Hardware(
    name="some CPU",
    kind="cpu",
    architecture="cpu",
    peak_flops=1e11,
    peak_name="measured",
    matmul_flops=1e11,
    memory_bytes=2**34,
    bandwidth_bytes_per_second=1e10,
    power_limit_watts=None,
    process_bytes=3 * 10**8,
    source="measured",
)
"""a processor of round figures"""

GPT2_ORIGIN = Origin(
    tokenizer="gpt2",
    vocab_size=50257,
    end_of_text=50256,
    dataset="made by the test",
    dataset_config="none",
    revision=None,
)
"""of shards that a test writes"""


def beyond_gpt2() -> st.SearchStrategy[dict[str, Any]]:
    """Options of a model that make it another than GPT-2, as its configuration has them."""
    return st.fixed_dictionaries(
        {
            "positions": st.sampled_from(["learned", "rotary"]),
            "norm": st.sampled_from(["layernorm", "rmsnorm"]),
            "qk_norm": st.booleans(),
            "activation": st.sampled_from(["gelu", "relu2"]),
            "tied_head": st.booleans(),
            "zero_init": st.booleans(),
            "logit_softcap": st.sampled_from([0.0, 15.0]),
        }
    )


def optimizers() -> st.SearchStrategy[OptimizerSection]:
    """Of either kind, with any of its schedules, of sizes that people use."""
    return st.builds(
        OptimizerSection,
        name=st.sampled_from(["adamw", "muon"]),
        matrix_learning_rate=st.none() | st.sampled_from([1e-3, 0.02]),
        momentum=st.sampled_from([0.0, 0.95]),
        warmup_steps=st.integers(0, 500),
        decay_steps=st.none() | st.integers(1, 10_000),
        schedule=st.sampled_from(["cosine", "wsd", "constant"]),
        decay_share=st.sampled_from([0.1, 0.4, 1.0]),
        grad_clip=st.sampled_from([0.0, 1.0]),
    )


@cache
def documented_config() -> Config:
    return load_config(DOCUMENTED)


@cache
def documented_spec() -> RunSpec:
    return documented_config().to_spec()


@cache
def documented_prediction() -> Prediction:
    return predict(documented_spec(), lookup("RTX 4070", "bfloat16"))


def claims_text(*claims: str) -> str:
    """A claims file; each claim is the TOML of its key, unit and numbers."""
    quoted = (f'[[claim]]\nquote = "q"\nenglish = "e"\n{claim}\n' for claim in claims)
    return "\n".join(['[document]\ntitle = "A document"\n', *quoted])


def claims_of(folder: Path, *claims: str) -> Claims:
    path = folder / "claims.toml"
    path.write_text(claims_text(*claims), encoding="utf-8")
    return load_claims(path)


def nanogpt_log(
    iterations: int,
    log_every: int,
    eval_every: int,
    step_ms: Callable[[int], float],
    evaluation_ms: float,
    compile_ms: float,
) -> str:
    """What nanoGPT prints: an iteration's time holds the evaluation and checkpoint in it."""
    lines = []
    for i in range(iterations + 1):  # its loop ends after the iteration numbered max_iters
        loss = 3.52 + 7.35 / (1 + i / 300)
        if i % eval_every == 0:
            lines.append(f"step {i}: train loss {loss:.4f}, val loss {loss:.4f}")
            if i > 0:
                lines.append("saving checkpoint to out")
        if i % log_every == 0:
            time = step_ms(i)
            time += evaluation_ms * (i % eval_every == 0) + compile_ms * (i == 0)
            mfu = 12.5 if i else -100
            lines.append(f"iter {i}: loss {loss:.4f}, time {time:.2f}ms, mfu {mfu:.2f}%")
    return "\n".join(lines) + "\n"


STEP_MS, EVALUATED_MS, FIRST_MS = 3909.8, 19_180.0, 32_025.0


def documented_log(step_ms: float = STEP_MS) -> str:
    """A log with the summary figures of a public run on an RTX 4070, by GitHub user lzwjava.

    20,000 iterations printed every 200, of 3909.8 ms, within 0.3 % of each other; an evaluation
    (with its checkpoint) every 500, which makes an iteration 19,180 ms; 32,025 ms for the first.
    """
    evaluation = EVALUATED_MS - STEP_MS
    return nanogpt_log(
        iterations=20_000,
        log_every=200,
        eval_every=500,
        step_ms=lambda i: step_ms + 5 * math.sin(i) * (i % 500 != 0),
        evaluation_ms=evaluation,
        compile_ms=FIRST_MS - STEP_MS - evaluation,
    )
