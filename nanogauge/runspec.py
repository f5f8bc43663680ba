"""RunSpec describes a training run: shape, batch, schedule, precision, devices, data and cost.

Predictions and reports take a RunSpec, whichever program trains. A field that a log does not contain is None, and only
the quantities that need it are absent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from nanogauge.spec_parts import (
    NO_EXTRA,
    PLAIN,
    SETTINGS,
    Cost,
    Fraction,
    Head,
    NaturalNumber,
    Optimizer,
    PositiveInt,
    Program,
    Schedule,
    Shape,
    Sharding,
    Traced,
)

if TYPE_CHECKING:
    from nanogauge.config import Config

NO_SPEC = "the run is not described; give nanogauge.run a spec, or nanogauge watch a --config"
"""Reason why a row of a run without a spec is absent."""
NO_SHAPE = "the model is described by a trace, not by a GPT's shape"
"""Reason why a row is absent that needs a shape."""


@dataclass(frozen=True, kw_only=True, config=NO_EXTRA)
class RunSpec:
    """Description of a training run.

    >>> import nanogauge as ng
    """

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
    deterministic: bool | None = None
    """Only deterministic kernels, for which cuBLAS has larger workspaces."""
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
    traced: Traced | None = None
    """Trace of a model that is no GPT, in place of its shape, which is then unknown; None for a GPT."""
    unknown: tuple[str, ...] = ()
    """Keys of the configuration that neither a log nor the user gave; their fields mean nothing."""

    def absent_rows(self) -> dict[str, str]:
        """Return the report rows that need an unknown key, with the reason."""
        if self.traced is not None:
            rows = "tokens_per_step tokens_total data_epochs parameters flops_total_6n flops_total_palm mfu_palm mfu_6n"
            return dict.fromkeys(rows.split(), NO_SHAPE)
        of_model = {k for k in self.unknown if k.startswith("model.") and k != "model.block_size"}
        # With a known train.grad_accum the factors are placeholders, whose product is the tokens per step of the log.
        factors = {"train.grad_accum", "train.micro_batch", "model.block_size"}
        tokens = factors if "train.grad_accum" in self.unknown else set()
        all_but_batch = {*self.unknown} - {"train.micro_batch"} | tokens
        needs = dict.fromkeys(("parameters", "parameters_total", "weights_bytes"), of_model)
        needs |= dict.fromkeys(("tokens_per_step", "tokens_total", "data_epochs"), tokens)
        needs |= dict.fromkeys(("flops_total_6n", "mfu_6n"), of_model | tokens)
        needs |= dict.fromkeys(("flops_total_palm", "mfu_palm"), all_but_batch)
        absent = {row: [k for k in self.unknown if k in keys] for row, keys in needs.items()}
        return {row: self.unsaid(*keys) for row, keys in absent.items() if keys}

    def unsaid(self, *keys: str) -> str:
        """Return why a row is absent that needs these unknown keys."""
        return NO_SPEC if self.is_undescribed else f"the log does not say {', '.join(keys)}"

    @property
    def is_undescribed(self) -> bool:
        """True if nothing is known of the run; its steps are then those that were made."""
        return "train.max_steps" in self.unknown

    def progress(self, done: int) -> str:
        """Format the number of steps made, with that of the whole run if it is known."""
        return f"{done:,}" if self.is_undescribed else f"{done:,} of {self.steps:,}"

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

        >>> spec = ng.RunSpec.gpt(n_layer=12, n_embd=384, n_head=12, context=1024, vocabulary=50304,
        ...                       micro_batch=16, grad_accum=32, steps=20_000)
        >>> spec.tokens_per_step
        524288

        Raises:
            ValueError: for a value out of range, or an n_embd that n_head does not divide.
        """
        shape = Shape.gpt(n_layer, n_embd, n_head, context, vocabulary)
        defaults = {"compile": True, "dropout": 0.0}
        defaults |= dict.fromkeys(("eval_every", "eval_batches", "checkpoint_every"), 0)
        return cls(shape=shape, micro_batch=micro_batch, grad_accum=grad_accum, steps=steps, **(defaults | settings))

    @classmethod
    def undescribed(cls) -> RunSpec:
        """Return the spec of a run of which nothing is known: only what is measured has rows."""
        sizes = dict.fromkeys(("n_layer", "n_embd", "n_head", "context", "vocabulary", "micro_batch", "steps"), 1)
        unknown = tuple(key for key in SETTINGS if key.startswith(("model.", "train.")))
        return cls.gpt(**sizes, compile=None, dropout=None, unknown=unknown)

    @classmethod
    def from_toml(cls, path: str | Path) -> RunSpec:
        """Return the spec of a configuration file of train.py, as in configs/.

        >>> ng.RunSpec.from_toml("configs/rtx4070_fineweb.toml").steps
        20000

        Raises:
            ValueError: if there is no such file, or a key or value is wrong.
        """
        from nanogauge.config import load_config

        return cls.from_config(load_config(Path(path)))

    @classmethod
    def from_config(cls, config: Config, dtype: str | None = None, world_size: int = 1) -> RunSpec:
        """Return the spec of a configuration; `dtype` replaces run.dtype = auto, None leaves it open."""
        return cls(world_size=world_size, **config.spec_fields(dtype))

    @classmethod
    def from_transformers(
        cls, config: Any, arguments: Any, context: int | None = None, steps: int | None = None
    ) -> RunSpec:
        """Return the spec of a transformers.Trainer run of a decoder-only model.

        >>> model = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        ...          "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152}
        >>> ng.RunSpec.from_transformers(model, {"max_steps": 1000}, context=2048).shape.n_kv_head
        3

        Args:
            config: a PretrainedConfig, its dictionary, or the path of a config.json: GPT-2, GPT-NeoX, Llama, Qwen,
                Mistral, SmolLM and others with their names.
            arguments: TrainingArguments or a dictionary of them.
            context: tokens of a sequence; None for the model's longest.
            steps: optimizer steps; None for max_steps of the arguments.

        Raises:
            ValueError: for a model whose shape is not understood, or without a number of steps.
        """
        from nanogauge.transformers_spec import fields_from_transformers

        return cls(**fields_from_transformers(config, arguments, context, steps))

    @classmethod
    def from_module(
        cls,
        module: Any,
        *inputs: Any,
        steps: int,
        loss: Callable[..., Any] | None = None,
        grad_accum: int = 1,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        **settings: Any,
    ) -> RunSpec:
        """Return the spec of a run of any torch.nn.Module, from a trace of its training step.

        The step runs once on tensors without values: forward, backward, and AdamW (fused), as they run uncompiled on
        one device. The module stays as it is, may be on the meta device, and no memory of its size is needed.

        Args:
            module: the model, in training mode.
            inputs: those of a micro-batch; one mapping gives keyword arguments.
            steps: optimizer steps.
            loss: function of the module and its inputs; None if the module's output is the loss or has it as `loss`.
            grad_accum: micro-batches per step.
            dtype: precision that torch.autocast casts to; float32 for the module's own.
            settings: other fields of RunSpec.

        Raises:
            ValueError: for a module that returns no loss, or whose operations depend on values.
        """
        from nanogauge.traced_module import fields_from_module

        defaults = dict.fromkeys(("eval_every", "eval_batches", "checkpoint_every"), 0)
        fields = defaults | {"steps": steps, "grad_accum": grad_accum, "dtype": dtype, "compile": False} | settings
        spec = replace(cls.undescribed(), **fields)  # refuses wrong values before the trace
        return replace(spec, **fields_from_module(module, inputs, loss, grad_accum, dtype))

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
