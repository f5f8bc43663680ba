"""Parts of a RunSpec: shape, training program, optimizer, schedule and cost, and the types of their numbers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from nanogauge.files import package_table

EMBEDDED_TEXT = "embedded"
"""Name of the data set that ships with Python: the text of its documentation."""

SETTINGS: dict[str, str] = package_table("settings.toml")
"""Key of the configuration -> field of RunSpec with the same meaning."""


def _whole(value: object) -> object:
    """Convert an integral float such as 3.68e9 to int, since TOML reads it as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_MOST = 10**15  # a larger count is a typing error
PositiveInt = Annotated[int, BeforeValidator(_whole), Field(gt=0, le=_MOST)]
NaturalNumber = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=_MOST)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Sharding = Literal["replicated", "optimizer", "full", "hybrid"]
Head = Literal["plain", "chunked"]
NO_EXTRA = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=NO_EXTRA)
class Shape:
    """Architecture of a decoder-only transformer."""

    n_layer: PositiveInt
    n_embd: PositiveInt
    n_head: PositiveInt
    context: PositiveInt
    """Context length in tokens."""
    vocabulary: PositiveInt
    """Rows of the embedding."""
    n_kv_head: PositiveInt
    """Key-value heads; fewer than n_head with grouped-query attention."""
    head_size: PositiveInt
    mlp_width: NaturalNumber
    mlp_matrices: PositiveInt = 2
    """Weight matrices of an MLP: 2, or 3 if gated (SwiGLU)."""
    tied_head: bool = True
    """The vocabulary head shares the weights of the embedding."""
    position_table: bool = True
    """Learned position embeddings; False for rotary ones."""
    bias: bool = False
    norm_weights: bool = True
    vector_parameters: NaturalNumber = 0
    """Parameters of further norms and biases, such as those of queries, keys and values alone."""
    table_parameters: NaturalNumber = 0
    """Parameters of other look-up tables, such as value embeddings, which cost no FLOPs."""
    attended: Positive = 1.0
    """Mean fraction of the context that is attended to; below 1 with sliding windows."""

    @classmethod
    def gpt(cls, n_layer: int, n_embd: int, n_head: int, context: int, vocabulary: int, **details: Any) -> Shape:
        """Return the shape of a GPT-2: full attention heads, and an MLP of four times the width.

        Raises:
            ValueError: for a value out of range, or an n_embd that n_head does not divide.
        """
        if n_head < 1 or n_embd % n_head:
            raise ValueError(f"n_embd {n_embd} is not a multiple of n_head {n_head}")
        sizes = n_layer, n_embd, n_head, context, vocabulary
        return cls(*sizes, n_kv_head=n_head, head_size=n_embd // n_head, mlp_width=4 * n_embd, **details)

    @property
    def query_width(self) -> int:
        """Width of the queries of all heads."""
        return self.n_head * self.head_size

    @property
    def key_width(self) -> int:
        """Width of the keys of all heads, and of the values."""
        return self.n_kv_head * self.head_size


Operations = tuple[tuple[str, NaturalNumber, NaturalNumber, PositiveInt], ...]
"""Name of an operation of torch, FLOPs of a call, bytes that it reads and writes, and the number of such calls."""


@dataclass(frozen=True, config=NO_EXTRA)
class Traced:
    """A training step of any module, as a trace of its operations shows it."""

    parameters: PositiveInt
    peak: tuple[tuple[str, NaturalNumber], ...]
    """Kind of tensor and its bytes at the peak of a step; storages count once, however many views they have."""
    moment: str
    """Moment of the step at which the peak occurs."""
    micro_batch: Operations
    """Forward and backward pass of a micro-batch."""
    update: Operations
    """Step of the optimizer."""

    @property
    def peak_bytes(self) -> int:
        return sum(size for _, size in self.peak)

    @property
    def flops(self) -> int:
        """FLOPs of a micro-batch, forward and backward, as torch's FlopCounterMode counts them."""
        return sum(flops * calls for _, flops, _, calls in self.micro_batch)


@dataclass(frozen=True, config=NO_EXTRA)
class Program:
    """A training program, and its details that affect memory and step time.

    programs.toml has those of known programs.
    """

    name: str | None = None
    """Name in programs.toml, such as nanogpt; None if unknown."""
    embeddings_16_bit: bool = False
    """Embedding and look-up tables, with gradients and moments, are in 16 bits."""
    fused_qkv: bool = True
    """One matrix computes queries, keys and values."""
    qk_norm: bool = False
    """Queries and keys are normalized."""
    squared_relu: bool = False
    """The activation of the MLP is squared ReLU instead of GELU."""
    learned_scales: NotNegative = 0.0
    """Learned scales per layer, each of which saves an activation of the model's width."""
    logit_softcap: NotNegative = 0.0
    """Largest magnitude of logits, limited by tanh; 0 for no limit."""
    logits_kept: bool = False
    """The loop keeps the logits until the end of the step, as in nanoGPT."""
    logits_widened: bool = False
    """16-bit logits are cast to fp32 before the loss; False: autocast takes their log-softmax in 16 bits on a GPU."""
    gradients_kept: bool = False
    """The previous gradients still exist during the forward pass, as zero_grad follows it."""
    compiled_loss: bool = True
    """torch.compile includes the loss."""
    donated_buffers: bool = True
    """A compiled backward pass reuses the buffers saved for it (torch after 2.5)."""
    layer_launches: PositiveInt | None = None
    """Kernels launched per layer of a compiled micro-batch; None: as assumed for all programs."""
    launches: PositiveInt | None = None
    """Kernels launched outside of the layers, with a plain head."""
    waits_for_batch: bool = False
    """Each micro-batch is copied from pageable memory, which waits for the GPU to become idle."""
    fp32_exchange: bool = True
    """FSDP gathers embedding and head and reduces gradients in fp32; False: in 16 bits."""
    master_weights: bool = True
    """Weights, gradients and moments are in fp32; False: in 16 bits."""
    wide_residual: bool = True
    """The residual stream is in fp32, as under autocast; False: in 16 bits."""
    newton_schulz_steps: PositiveInt = 5
    """Newton-Schulz iterations of Muon."""
    muon_batched: bool = True
    """Newton-Schulz processes all matrices of a shape as one batch."""
    muon_restored: bool = False
    """Muon keeps copies to undo a non-finite update, as in train.py."""
    fp8_products: bool = False
    """Matrix products of the blocks are in fp8, the rest in dtype."""
    sync_every_micro_step: bool = False
    """Gradients are all-reduced after every micro-batch instead of once a step."""
    overlapped: bool | None = None
    """The all-reduce overlaps the backward pass; None: only if not compiled, as in train.py."""


PLAIN = Program()


@dataclass(frozen=True, kw_only=True, config=NO_EXTRA)
class Optimizer:
    """Optimizer and its hyperparameters; None for those that a log does not contain."""

    name: Literal["adamw", "adamw_foreach", "muon"] = "adamw"
    """adamw is fused AdamW; muon is Muon for the matrices of the blocks, AdamW for the rest."""
    beta1: Fraction | None = None
    beta2: Fraction | None = None
    momentum: Fraction | None = None
    """Momentum of Muon."""
    matrix_learning_rate: Positive | None = None
    """Peak learning rate of Muon; None: that of the schedule."""
    weight_decay: NotNegative | None = None
    grad_clip: NotNegative | None = None
    """Largest gradient norm; 0 for no clipping."""


@dataclass(frozen=True, kw_only=True, config=NO_EXTRA)
class Schedule:
    """Learning-rate schedule."""

    learning_rate: Positive
    """Peak learning rate."""
    min_learning_rate: NotNegative = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: NaturalNumber = 0
    """Steps of linear warm-up."""
    decay_steps: PositiveInt | None = None
    """Step at which min_learning_rate is reached; None: the last step."""
    decay: Literal["cosine", "wsd", "constant"] = "cosine"
    """Decay after the warm-up; wsd (warmup-stable-decay) is constant, then linear."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Fraction of decay_steps in which wsd decays."""


@dataclass(frozen=True, kw_only=True, config=NO_EXTRA)
class Cost:
    """What a kWh of electricity costs."""

    price_per_kwh: Positive | None = None
    """Price per kWh in `currency`; None: no cost is computed."""
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"
    """ISO 4217 code."""
    grams_co2_per_kwh: NotNegative | None = None
    """Carbon intensity in grams of CO2 per kWh; None: no CO2 is computed."""
    machine_watts: NotNegative | None = None
    """Power of all but the GPU boards in watts; None: cost of the boards alone."""
