"""RunSpec describes a training run: shape, batch, schedule, precision, devices, data and cost.

Predictions and reports take a RunSpec, whichever program trains. A field that a log does not contain is None, and only
the quantities that need it are absent.
"""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter
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
_FORBID = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_FORBID)
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
    table_parameters: NaturalNumber = 0
    """Parameters of other look-up tables, such as value embeddings, which cost no FLOPs."""
    attended: Positive = 1.0
    """Mean fraction of the context that is attended to; below 1 with sliding windows."""

    @property
    def query_width(self) -> int:
        """Width of the queries of all heads."""
        return self.n_head * self.head_size

    @property
    def key_width(self) -> int:
        """Width of the keys of all heads, and of the values."""
        return self.n_kv_head * self.head_size


@dataclass(frozen=True, config=_FORBID)
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
    gradients_kept: bool = False
    """The previous gradients still exist during the forward pass, as zero_grad follows it."""
    compiled_loss: bool = True
    """torch.compile includes the loss."""
    donated_buffers: bool = True
    """A compiled backward pass reuses the buffers saved for it (torch after 2.5)."""
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


@dataclass(frozen=True, kw_only=True, config=_FORBID)
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


@dataclass(frozen=True, kw_only=True, config=_FORBID)
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


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Cost:
    """Electricity tariff."""

    price_per_kwh: Positive | None = None
    """Price per kWh in `currency`; None: no cost is computed."""
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"
    """ISO 4217 code."""
    machine_watts: NotNegative | None = None
    """Power of all but the GPU boards in watts; None: cost of the boards alone."""


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class RunSpec:
    """Description of a training run."""

    schema_version: Literal[1] = 1
    name: str | None = None
    shape: Shape
    micro_batch: PositiveInt
    """Sequences in one forward and backward pass on one device."""
    grad_accum: PositiveInt = 1
    """Gradient accumulation: micro-batches per optimizer step of all devices together."""
    steps: PositiveInt
    """Optimizer steps of the whole run."""
    world_size: PositiveInt = 1
    """Devices that share the micro-batches of a step."""
    sharding: Sharding = "replicated"
    """DDP, DDP with a sharded optimizer, FSDP, or FSDP within a node."""
    device: Literal["cuda", "mps", "cpu"] | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of matrix products; None: bfloat16 on a GPU, float32 on a CPU."""
    compile: bool | None = None
    """The model is compiled with torch.compile."""
    tuned: bool | None = None
    """Matrix products are tuned on the GPU, with activations fused into them."""
    dropout: Fraction | None = None
    head: Head = "plain"
    """Loss from all logits at once, or from a chunk of tokens at a time."""
    recomputation: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, the cheaper half, or all."""
    attention: Literal["flash", "flash3", "plain"] = "flash"
    """Fused SDPA kernel, FlashAttention 3, or attention with T x T scores in memory."""
    optimizer: Optimizer = Optimizer()
    schedule: Schedule | None = None
    zero_init: bool | None = None
    """Residual projections are initialized with zeros."""
    init_from: str | None = None
    """Trained weights that the run starts from; None: random ones."""
    seed: NaturalNumber | None = None
    eval_every: NaturalNumber | None = None
    """Steps between evaluations; 0 for none."""
    eval_batches: NaturalNumber | None = None
    """Micro-batches of each split, training and validation, in an evaluation."""
    checkpoint_every: NaturalNumber | None = None
    """Steps between checkpoints; 0 for none."""
    dataset: str | None = None
    """Name of the data set, such as FineWeb-Edu; without a name, its folder."""
    tokenizer: str | None = None
    unique_tokens: PositiveInt | None = None
    """Training tokens of the data set."""
    validation_tokens: PositiveInt | None = None
    cost: Cost = Cost()
    program: Program = PLAIN
    unknown: tuple[str, ...] = ()
    """Keys of the configuration that neither a log nor the user gave; their fields mean nothing."""

    def absent_rows(self) -> dict[str, str]:
        """Return the report rows that need an unknown key, with the reason."""
        of_model = {k for k in self.unknown if k.startswith("model.") and k != "model.block_size"}
        tokens, all_but_batch = {"train.grad_accum"}, {*self.unknown} - {"train.micro_batch"}
        needs = dict.fromkeys(("parameters", "parameters_total", "weights_bytes"), of_model)
        needs |= dict.fromkeys(("tokens_per_step", "tokens_total", "data_epochs"), tokens)
        needs |= dict.fromkeys(("flops_total_6n", "mfu_6n"), of_model | tokens)
        needs |= dict.fromkeys(("flops_total_palm", "mfu_palm"), all_but_batch)
        absent = {row: [k for k in self.unknown if k in keys] for row, keys in needs.items()}
        return {row: f"the log does not say {', '.join(k)}" for row, k in absent.items() if k}

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step on all devices together."""
        return self.micro_batch * self.shape.context * self.grad_accum

    def resolved(self, dtype: str, world_size: int) -> RunSpec:
        """Return the spec with this precision and world size."""
        return replace(self, dtype=dtype, world_size=world_size)  # type: ignore[arg-type]

    @classmethod
    def gpt(
        cls,
        *,
        n_layer: int,
        n_embd: int,
        n_head: int,
        context: int,
        vocabulary: int,
        micro_batch: int,
        steps: int,
        grad_accum: int = 1,
        **settings: Any,
    ) -> RunSpec:
        """Return the spec of a GPT-2-shaped run from fields of Shape and RunSpec.

        By default it is compiled, without dropout, evaluations and checkpoints.

        Raises:
            ValueError: for a value out of range, or an n_embd that n_head does not divide.
        """
        if n_head < 1 or n_embd % n_head:
            raise ValueError(f"n_embd {n_embd} is not a multiple of n_head {n_head}")
        shape = Shape(
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            context=context,
            vocabulary=vocabulary,
            n_kv_head=n_head,
            head_size=n_embd // n_head,
            mlp_width=4 * n_embd,
        )
        defaults = {"compile": True, "dropout": 0.0}
        defaults |= dict.fromkeys(("eval_every", "eval_batches", "checkpoint_every"), 0)
        return cls(shape=shape, micro_batch=micro_batch, grad_accum=grad_accum, steps=steps, **(defaults | settings))

    @classmethod
    def from_json(cls, data: bytes) -> RunSpec:
        """Parse the output of to_json.

        Raises:
            ValueError: if it is damaged, or of a newer schema version.
        """
        return _ADAPTER.validate_json(data)

    def to_json(self) -> bytes:
        """Serialize the spec as in spec.json."""
        return _ADAPTER.dump_json(self, indent=1)

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as nested dictionaries of plain values."""
        fields: dict[str, Any] = _ADAPTER.dump_python(self, mode="json")
        return fields

    def setting(self, key: str) -> Any:
        """Return the value of a configuration key in SETTINGS; None if unknown."""
        section, _, name = SETTINGS[key].rpartition(".")
        owner = attrgetter(section)(self) if section else self
        return None if owner is None else getattr(owner, name)


_ADAPTER = TypeAdapter(RunSpec)


def with_shape(spec: RunSpec, **changes: Any) -> RunSpec:
    """Return the spec with changes to its shape."""
    return replace(spec, shape=replace(spec.shape, **changes))
