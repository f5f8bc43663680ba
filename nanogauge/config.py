"""One typed, frozen, validated configuration, from a TOML file and `--section.key value` flags."""

from __future__ import annotations

import argparse
import difflib
import math
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from nanogauge.errors import BadInput
from nanogauge.files import from_home, read_whole, scrubbed, without_secrets
from nanogauge.runspec import (
    EMBEDDED_TEXT,
    Cost,
    Fraction,
    NaturalNumber,
    NotNegative,
    Optimizer,
    Positive,
    PositiveInt,
    Program,
    RunSpec,
    Schedule,
    Shape,
)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One finding of a validation, as a sentence naming the key and what would be right.

    A misspelt key comes first: it is often the cause of a missing one.
    """
    findings = error.errors()
    misspelt = (finding for finding in findings if finding["type"] == "extra_forbidden")
    first = next(misspelt, findings[0])
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = _nearest(first["loc"], model)
        return f"unknown key {where}; {f'did you mean {near}?' if near else 'remove it.'}"
    if first["type"] == "missing":
        return f"the key {where} is missing."
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    got = first["input"]
    shown = "" if isinstance(got, dict) else f", not {got!r}"
    sentence = ": ".join(filter(None, (where, message + shown)))
    return sentence if sentence.endswith("?") else sentence + "."


def _nearest(where: tuple[int | str, ...], model: type[BaseModel]) -> str | None:
    """The right name most like an unknown key: one beside it, else the same key elsewhere."""
    owner: type[BaseModel] | None = model
    for part in where[:-1]:
        if owner is not None and isinstance(part, str):
            owner = _model_in(owner.model_fields[part].annotation)
    assert owner is not None, "an unknown key lies in a table"
    key, beside = str(where[-1]), list(owner.model_fields)
    if near := difflib.get_close_matches(key, beside, n=1):
        in_list = any(isinstance(part, int) for part in where)
        return near[0] if in_list else ".".join([*map(str, where[:-1]), near[0]])
    for name, field in model.model_fields.items():
        section = _model_in(field.annotation)
        if section is not None and key in section.model_fields:
            return f"{name}.{key}"
    return None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model of a section, of a list's items, or of an optional one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)


FolderPath = Annotated[str, Field(pattern=r"^[^\x00]+$"), AfterValidator(without_secrets)]
"""of a folder, with ~ for the user's home, which no run folder names"""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class RunSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """name of the run, and of its folder"""
    out: FolderPath = "runs"
    """folder that holds the run folders"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to train; auto takes the first of cuda, mps, cpu that is there"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """arithmetic of the matrix products; auto is bfloat16 on a GPU that has it, else float32"""
    compile: bool = True
    """use torch.compile"""
    init_from: Annotated[str, Field(pattern=r"^[^\x00]+$")] | None = None
    """begin with the weights of a GPT-2: a Hugging Face folder, or a name on the hub as gpt2"""
    seed: NaturalNumber = 1337
    """seed of the weights, of dropout and of the order of the data"""
    deterministic: bool = False
    """on a GPU, use only kernels that give the same bits each time, slower; on a CPU all do"""


class ModelSection(Section):
    n_layer: PositiveInt
    """transformer blocks"""
    n_head: PositiveInt
    """attention heads"""
    n_embd: PositiveInt
    """width of the residual stream"""
    block_size: PositiveInt
    """context length in tokens"""
    vocab_size: PositiveInt
    """rows of the embedding; 50,304 is GPT-2's 50,257 padded to a multiple of 64"""
    bias: bool = False
    """biases in linear layers and norms"""
    dropout: Fraction = 0.0
    """dropout probability"""
    gelu: Literal["exact", "tanh"] = "exact"
    """form of GELU; GPT-2's published weights are made for its approximation by tanh"""
    positions: Literal["learned", "rotary"] = "learned"
    """learned adds a table to the embeddings; rotary turns queries and keys by their position"""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """rmsnorm divides by the root mean square alone, and has no weights"""
    qk_norm: bool = False
    """divide each query and key by its root mean square"""
    activation: Literal["gelu", "relu2"] = "gelu"
    """of the MLP; relu2 is the square of ReLU"""
    tied_head: bool = True
    """the vocabulary head is the embedding; false gives it weights of its own"""
    zero_init: bool = False
    """projections into the residual stream, and a head of its own, begin at zero"""
    logit_softcap: NotNegative = 0.0
    """logits are kept within plus and minus this by a tanh; 0 leaves them alone"""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelSection:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.positions == "rotary" and self.n_embd // self.n_head % 2:
            size = self.n_embd // self.n_head
            raise ValueError(f"rotary positions turn pairs, and a head of {size} has an odd one")
        return self


class DataSection(Section):
    path: FolderPath | None = None
    """folder of token shards, as prepare_fineweb.py writes it"""
    tokens: PositiveInt | None = None
    """unique training tokens the data has, or is planned to have"""
    embedded: bool = False
    """train on the English text that ships with Python, byte by byte (the demo)"""
    order: Literal["permutation", "random"] = "permutation"
    """permutation sees each window of tokens once in an epoch; random draws them with replacement,
    as nanoGPT does"""

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if self.embedded == (self.path is not None):
            raise ValueError("give either path, a folder of token shards, or embedded = true")
        return self

    @property
    def folder(self) -> Path | None:
        """The folder of token shards, where that is the source."""
        return from_home(self.path) if self.path is not None else None


class TrainSection(Section):
    micro_batch: PositiveInt
    """sequences in one forward and backward pass"""
    grad_accum: PositiveInt = 1
    """micro-batches whose gradients make one optimizer step"""
    max_steps: PositiveInt
    """optimizer steps of the whole run"""
    head: Literal["chunked", "plain"] = "chunked"
    """chunked computes the vocabulary head and its loss for a few tokens at a time and keeps no
    logits; plain makes them all, as nanoGPT does"""
    checkpointing: Literal["none", "full"] = "none"
    """full computes the blocks' activations a second time instead of keeping them: less memory"""
    sharding: Literal["none", "full"] = "none"
    """full divides weights, gradients and moments among the processes of torchrun (FSDP), for a
    model that one card cannot hold"""
    eval_every: PositiveInt = 500
    """steps between evaluations; the first is before the first step, the last after the last"""
    eval_batches: PositiveInt = 200
    """micro-batches of each split that one evaluation reads"""
    checkpoint_every: PositiveInt = 500
    """steps between checkpoints; the last step always makes one"""
    checkpoint_minutes: NotNegative = 30.0
    """minutes after a checkpoint in which another is made, whatever the step; 0 for steps alone"""
    keep_checkpoints: PositiveInt = 2
    """newest checkpoints that are kept, beside the one with the least validation loss"""
    max_skipped: PositiveInt = 10
    """updates in a row that a loss or gradient which is not finite may cost; then the run goes back
    to its last checkpoint and on with the data in another order"""
    max_rollbacks: NaturalNumber = 2
    """times that the run goes back like that; then it stops"""
    log_every: PositiveInt = 10
    """steps between lines in the terminal; the run log holds every step"""
    prompts: list[str] = []
    """texts that the model goes on from, four times a run; without any it begins a document"""


class OptimizerSection(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """muon trains the matrices of the blocks with Muon, and the rest with AdamW"""
    learning_rate: Positive = 6e-4
    """peak learning rate"""
    matrix_learning_rate: Positive | None = None
    """that of Muon's matrices, scaled to updates as large as AdamW's; learning_rate if not given"""
    min_learning_rate: NotNegative = 6e-5
    """learning rate at the end of the decay"""
    warmup_steps: NaturalNumber = 500
    """steps of linear warm-up"""
    decay_steps: PositiveInt | None = None
    """step at which min_learning_rate is reached; max_steps where not given"""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """shape of the decay after the warm-up; wsd is stable, then goes down in a straight line"""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.4
    """share of the steps up to decay_steps in which wsd goes down"""
    beta1: Fraction = 0.9
    """AdamW beta1"""
    beta2: Fraction = 0.95
    """AdamW beta2"""
    momentum: Fraction = 0.95
    """Muon's"""
    weight_decay: NotNegative = 0.1
    """weight decay of matrices; vectors have none"""
    grad_clip: NotNegative = 1.0
    """largest gradient norm; 0 switches clipping off"""


class MeasureSection(Section):
    power_hz: Annotated[float, Field(gt=0, le=100)] = 10.0
    """samples of the GPU's sensors per second"""
    gpu: Annotated[str, Field(min_length=1)] = "auto"
    """whose sensors are read: auto is each GPU of this machine that trains; none; or an index, UUID
    or PCI bus id, several of them with commas between"""
    idle_seconds: Annotated[float, Field(ge=0, le=600)] = 2.0
    """how long the idle GPU's power is measured before the run; 0 does not"""
    split_every: PositiveInt = 50
    """steps between those that time forward, backward and optimizer, and read the memory peaks"""
    hang_minutes: NotNegative = 10.0
    """minutes without progress after which the run counts as hung and ends; 0 waits for ever"""


class CostSection(Section):
    price_per_kwh: Positive | None = None
    """electricity tariff, in currency per kWh"""
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"
    """ISO 4217 code of the currency"""
    machine_watts: NotNegative | None = None
    """draw at the wall of all but the GPU boards; without it the cost is theirs alone"""


class WandbSection(Section):
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is online where W&B knows a key, else offline"""
    project: Annotated[str, Field(min_length=1)] = "nanogauge"
    """W&B project"""


class Config(Section):
    run: RunSection
    model: ModelSection
    data: DataSection
    train: TrainSection
    optimizer: OptimizerSection = OptimizerSection()
    measure: MeasureSection = MeasureSection()
    cost: CostSection = CostSection()
    wandb: WandbSection = WandbSection()

    @model_validator(mode="after")
    def _muon_has_whole_matrices(self) -> Config:
        if self.optimizer.name == "muon" and self.train.sharding == "full":
            raise ValueError(
                "muon works on whole matrices, and with train.sharding = full no process has one; "
                "set optimizer.name to adamw or train.sharding to none"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        """micro_batch x block_size x grad_accum, on one device."""
        return self.train.micro_batch * self.model.block_size * self.train.grad_accum

    @property
    def folder(self) -> Path:
        return from_home(self.run.out) / self.run.name

    def to_spec(self, dtype: str | None = None, world_size: int = 1) -> RunSpec:
        """Return what the run is.

        Args:
            dtype: Precision that run.dtype = auto was resolved to; None leaves it open.
            world_size: Devices that share the micro-batches of a step.
        """
        model, train, optimizer = self.model, self.train, self.optimizer
        dtype = dtype or (self.run.dtype if self.run.dtype != "auto" else None)
        return RunSpec(
            name=self.run.name,
            shape=shape_of(model),
            micro_batch=train.micro_batch,
            grad_accum=train.grad_accum,
            steps=train.max_steps,
            world_size=world_size,
            sharding="full" if train.sharding == "full" else "replicated",
            device=self.run.device if self.run.device != "auto" else None,
            dtype=dtype,  # type: ignore[arg-type]  # checked on construction
            compile=self.run.compile,
            dropout=model.dropout,
            head=train.head,
            recomputation=train.checkpointing,
            optimizer=Optimizer(
                name=optimizer.name,
                beta1=optimizer.beta1,
                beta2=optimizer.beta2,
                momentum=optimizer.momentum,
                matrix_learning_rate=optimizer.matrix_learning_rate,
                weight_decay=optimizer.weight_decay,
                grad_clip=optimizer.grad_clip,
            ),
            schedule=Schedule(
                learning_rate=optimizer.learning_rate,
                min_learning_rate=optimizer.min_learning_rate,
                warmup_steps=optimizer.warmup_steps,
                decay_steps=optimizer.decay_steps,
                decay=optimizer.schedule,
                decay_share=optimizer.decay_share,
            ),
            zero_init=model.zero_init,
            seed=self.run.seed,
            eval_every=train.eval_every,
            eval_batches=train.eval_batches,
            checkpoint_every=train.checkpoint_every,
            dataset=EMBEDDED_TEXT if self.data.embedded else self.data.path,
            unique_tokens=self.data.tokens,
            cost=Cost(**self.cost.model_dump()),
            program=program_of(model),
        )

    def to_toml(self) -> str:
        """The resolved configuration as TOML; None has no TOML form, so those keys are left out."""
        lines: list[str] = []
        for section, values in self.model_dump().items():
            lines.append(f"[{section}]")
            given = scrubbed({key: v for key, v in values.items() if v is not None})
            lines += [f"{key} = {toml_value(value)}" for key, value in given.items()]
            lines.append("")
        return "\n".join(lines)


def shape_of(model: ModelSection) -> Shape:
    """Return the architecture of model.py."""
    return Shape(
        n_layer=model.n_layer,
        n_embd=model.n_embd,
        n_head=model.n_head,
        context=model.block_size,
        vocabulary=model.vocab_size,
        n_kv_head=model.n_head,
        head_size=model.n_embd // model.n_head,
        mlp_width=4 * model.n_embd,
        tied_head=model.tied_head,
        position_table=model.positions == "learned",
        bias=model.bias,
        norm_weights=model.norm == "layernorm",
    )


def program_of(model: ModelSection) -> Program:
    """Return what train.py and model.py do beyond the products of the shape."""
    return Program(
        qk_norm=model.qk_norm,
        squared_relu=model.activation == "relu2",
        logit_softcap=model.logit_softcap,
        muon_batched=False,
        muon_restored=True,
    )


def toml_value(value: object) -> str:
    """A value of a configuration as TOML writes it."""
    match value:
        case bool():
            return "true" if value else "false"
        case list():
            return f"[{', '.join(map(toml_value, value))}]"
        case str():
            escaped = "".join(
                f"\\u{ord(c):04x}" if c in '"\\' or ord(c) < 0x20 or ord(c) == 0x7F else c
                for c in value
            )
            return f'"{escaped}"'
        case _:
            return repr(value)


def read_toml(path: Path, what: str, hint: str) -> dict[str, Any]:
    """Read a file that the user named; `what` it should be, and a hint where it is missing.

    Raises:
        BadInput: if it is missing, cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(read_whole(path).decode())
    except FileNotFoundError:
        raise BadInput(f"there is no {what} file {path}; {hint}.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"cannot read the {what} file {path}: {reason}.") from None
    except RecursionError:
        raise BadInput(f"{path} is nested too deeply to be a {what} file.") from None
    except ValueError as error:  # also of a number with thousands of digits
        raise BadInput(f"{path} is not valid TOML: {error}.") from None


def load_config(path: Path, overrides: Mapping[str, Mapping[str, object]] | None = None) -> Config:
    """Read a configuration file and lay the overrides of the command line over it.

    Raises:
        BadInput: if the file is missing or no TOML, a key is unknown or a value has a wrong type.
    """
    values = read_toml(path, "configuration", "configs/ holds examples")
    for section, keys in (overrides or {}).items():
        target = values.setdefault(section, {})
        if isinstance(target, dict):
            target.update(keys)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise BadInput(f"{path}: {explain(error, Config)}") from None


def wandb_section(
    path: Path, overrides: Mapping[str, Mapping[str, object]] | None = None
) -> WandbSection:
    """Return the W&B settings of a configuration, or the defaults if there is no such file.

    Raises:
        BadInput: as load_config.
    """
    if path.exists():
        return load_config(path, overrides).wandb
    try:
        return WandbSection.model_validate((overrides or {}).get("wandb", {}))
    except ValidationError as error:
        raise BadInput(f"wandb: {explain(error, WandbSection)}") from None


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser one `--section.key` flag for each configuration key."""
    for section, field in Config.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        group = parser.add_argument_group(f"[{section}]")
        for key, inner in field.annotation.model_fields.items():
            group.add_argument(
                f"--{section}.{key.replace('_', '-')}",
                f"--{section}.{key}",
                dest=f"{section}.{key}",
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=(inner.description or "").replace("%", "%%"),
            )


def config_overrides(namespace: argparse.Namespace) -> dict[str, dict[str, object]]:
    """The configuration flags that were given, as {section: {key: value}}."""
    result: dict[str, dict[str, object]] = {}
    for dotted, text in vars(namespace).items():
        section, _, key = dotted.partition(".")
        if key:
            section_type = Config.model_fields[section].annotation
            assert isinstance(section_type, type) and issubclass(section_type, Section)
            annotation = section_type.model_fields[key].annotation
            result.setdefault(section, {})[key] = _from_text(text, annotation)
    return result


def _from_text(text: str, annotation: Any) -> object:
    """Read a flag's text the way TOML would, but leave it alone where a string is wanted."""
    kinds = [annotation, *typing.get_args(annotation)]
    kinds += [inner for kind in kinds for inner in typing.get_args(kind)]
    as_it_is = str in kinds and typing.get_origin(annotation) is not list
    if as_it_is or typing.get_origin(annotation) is Literal:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


CHUNK_BYTES = {"cpu": 36 * 2**20, "cuda": 512 * 2**20}
"""Largest logits of a chunk: fp32 on a CPU, 16-bit elsewhere. With smaller chunks, reading and
writing the weight gradient once per chunk takes longer than the matrix products; with larger ones
the softmax leaves the CPU's caches and the peak memory grows."""
MMAP_THRESHOLD_BYTES = 32 * 2**20
"""glibc's largest mmap threshold: freed blocks above it return to the kernel, which clears them
before their next use. Logits above it are kept between losses on a CPU."""


def chunk_tokens(tokens: int, vocabulary: int, device_type: str) -> int:
    """Return the tokens per chunk of the vocabulary head, a multiple of 16 (CPU) or 64 (GPU).

    On a CPU all chunks of a loss are about equally large.
    """
    if device_type != "cpu":
        return max(64, CHUNK_BYTES["cuda"] // (2 * vocabulary) // 64 * 64)
    most = max(16, CHUNK_BYTES["cpu"] // (4 * vocabulary) // 16 * 16)
    return math.ceil(tokens / math.ceil(tokens / most) / 16) * 16
