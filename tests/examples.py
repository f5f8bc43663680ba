"""What several tests begin from: the documented run, and logs of the form that nanoGPT prints."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT
from hypothesis import strategies as st

from nanogauge.analysis.claims import Claims, load_claims
from nanogauge.config import Config, OptimizerSection, load_config
from nanogauge.hardware import lookup
from nanogauge.prediction.prediction import predict
from nanogauge.runspec import RunSpec
from nanogauge.schema import Hardware, Prediction
from trainer.data.manifest import Origin, Split, Tokens
from trainer.data.shards import ShardWriter

DOCUMENTED = ROOT / "configs" / "rtx4070_fineweb.toml"
SEED_CLAIMS = ROOT / "predictions" / "seed_zh.toml"
SHARED = ROOT.parent / "shared"
"""logs and documents of others beside a developer's checkout, which are not ours to commit"""


def needs_shared(name: str) -> pytest.MarkDecorator:
    """Mark a test that reads a file of SHARED: it is skipped, with the file's name, elsewhere."""
    return pytest.mark.skipif(not (SHARED / name).exists(), reason=f"needs ../shared/{name}")


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
    return RunSpec.from_config(documented_config())


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


def write_document(writer: ShardWriter, split: Split, document: Tokens) -> None:
    """Append a document, which may extend over several shards."""
    writer.start_split(split)
    begins = 1
    while document.size:
        part, document = document[: writer.room], document[writer.room :]
        writer.append(split, part, begins)
        begins = 0
