"""The typed configuration of a run, from a TOML file and `--section.key value` flags."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import textwrap
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from nanogauge.errors import BadInput
from nanogauge.files import decoded, expand_home, hide, read_whole, scrubbed, without_secrets
from nanogauge.names import meaning_of, nanogpt_names, toml_remedies, value_meant
from nanogauge.programs import TRAINING_PROGRAMS
from nanogauge.shell import python_command
from nanogauge.spec_parts import (
    EMBEDDED_TEXT,
    SETTINGS,
    Cost,
    Fraction,
    Head,
    NaturalNumber,
    NotNegative,
    Optimizer,
    Positive,
    PositiveInt,
    Program,
    Schedule,
    Shape,
)


def run_name(path: Path) -> str:
    """Return a valid run.name after a file."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", path.stem).lstrip("._-") or "run"


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return a validation's errors as sentences with the key and a suggested correction.

    If keys are misspelt, only they are named, as they often cause the other errors.
    """
    errors = error.errors()
    unknown = [e for e in errors if e["type"] == "extra_forbidden"]
    return " ".join(_sentence(e, model) for e in unknown or errors)


def _sentence(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    where, got = ".".join(str(part) for part in error["loc"]), error["input"]
    if error["type"] == "extra_forbidden":
        return f"unknown key {where}; {_right_key(error['loc'], model)}"
    if error["type"] == "missing":
        return f"the key {where} is missing."
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    shown = "" if isinstance(got, dict) else f", not {got!r}"
    if isinstance(got, str) and error["type"] == "literal_error":
        choices = re.findall(r"'([^']+)'", error["ctx"]["expected"])
        meant = value_meant(got, choices)
        shown += f"; did you mean {meant}?" if meant is not None else ""
    elif isinstance(got, str) and (match := _MULTIPLE.fullmatch(got)):
        power = "kmgt".index(match[2].lower().replace("b", "g")) + 1
        amounts = (f"{float(match[1]) * base**power:.0f}" for base in (1000, 1024))
        shown += f"; write {' or '.join(amounts)}"
    sentence = ": ".join(filter(None, (where, message + shown)))
    return sentence if sentence.endswith("?") else sentence + "."


def _right_key(where: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """Return what to write instead of an unknown key, as a question or an advice."""
    if model is Config:
        meaning = meaning_of(".".join(map(str, where)), CONFIG_KEYS)
        return "--help-config lists the keys." if meaning is None else f"did you mean {meaning}?"
    owner: type[BaseModel] | None = model
    for part in where[:-1]:
        if owner is not None and isinstance(part, str):
            owner = _model_in(owner.model_fields[part].annotation)
    assert owner is not None, "an unknown key lies in a table"
    near = difflib.get_close_matches(str(where[-1]), owner.model_fields, n=1)
    return f"did you mean {near[0]}?" if near else "remove it."


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the pydantic model class in an annotation such as list[Model] or Model | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)


FolderPath = Annotated[str, Field(pattern=r"^[^\x00]+$"), AfterValidator(without_secrets)]
"""Path of a folder. The user's home is stored as ~, so that run folders do not reveal it."""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class RunSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """name of the run and of its folder"""
    out: FolderPath = "runs"
    """folder that holds the run folders"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """device to train on; auto: the first available of cuda, mps, cpu"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of matrix products; auto: bfloat16 on a GPU that supports it, else float32"""
    compile: bool = True
    """use torch.compile"""
    tune: bool = False
    """on a GPU, measure kernels for each matrix product while compiling, and keep the fastest"""
    init_from: Annotated[str, Field(pattern=r"^[^\x00]+$")] | None = None
    """GPT-2 weights to start from: a Hugging Face folder or hub name; random if not given"""
    seed: NaturalNumber = 1337
    """seed of initial weights, dropout and data order"""
    deterministic: bool = False
    """use only deterministic kernels, which are slower on a GPU"""


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
    """form of GELU; GPT-2's published weights need its tanh approximation"""
    positions: Literal["learned", "rotary"] = "learned"
    """learned position embeddings, or rotary ones (RoPE)"""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """LayerNorm, or RMSNorm without weights"""
    qk_norm: bool = False
    """apply RMSNorm to queries and keys"""
    activation: Literal["gelu", "relu2"] = "gelu"
    """activation of the MLP; relu2 is squared ReLU"""
    tied_head: bool = True
    """share the weights of the vocabulary head with the embedding"""
    zero_init: bool = False
    """initialize residual projections and an untied head with zeros"""
    logit_softcap: NotNegative = 0.0
    """largest magnitude of logits, limited by tanh; 0 for no limit"""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelSection:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        size = self.n_embd // self.n_head
        if self.positions == "rotary" and size % 2:
            raise ValueError(f"rotary positions need an even head size, not {size}")
        return self


class DataSection(Section):
    path: FolderPath | None = None
    """folder of token shards, as prepare_fineweb.py writes it"""
    tokens: PositiveInt | None = None
    """unique training tokens of the data, present or planned"""
    val_tokens: PositiveInt | None = None
    """validation tokens of the data, present or planned"""
    dataset: Annotated[str, Field(pattern=r"^[^\x00]+$")] | None = None
    """name of the data set; a loss is predicted for FineWeb, FineWeb-Edu and OpenWebText"""
    embedded: bool = False
    """train on bytes of the English text that ships with Python (the demo)"""
    order: Literal["permutation", "random"] = "permutation"
    """permutation: each window of tokens once an epoch; random: with replacement, as in nanoGPT"""

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if self.embedded == (self.path is not None):
            raise ValueError("give either path, a folder of token shards, or embedded = true")
        return self

    @property
    def folder(self) -> Path | None:
        """Folder of token shards; None for the embedded text."""
        return expand_home(self.path) if self.path is not None else None


class TrainSection(Section):
    micro_batch: PositiveInt
    """batch size: sequences in one forward and backward pass"""
    grad_accum: PositiveInt = 1
    """gradient accumulation: micro-batches per optimizer step"""
    max_steps: PositiveInt
    """optimizer steps of the whole run"""
    head: Literal["auto", "chunked", "plain"] = "auto"
    """auto: what is faster and sure to fit; chunked: a few tokens at a time, no logits kept; plain: all at once"""
    checkpointing: Literal["none", "full"] = "none"
    """activation checkpointing; full recomputes all activations of the blocks to save memory"""
    sharding: Literal["none", "full"] = "none"
    """full: FSDP over the processes of torchrun, for a model that exceeds the memory of a GPU"""
    eval_every: PositiveInt = 500
    """steps between evaluations; also before the first step and after the last"""
    eval_batches: PositiveInt = 200
    """micro-batches of each split in an evaluation"""
    checkpoint_every: PositiveInt = 500
    """steps between checkpoints; also after the last step"""
    checkpoint_minutes: NotNegative = 30.0
    """longest time between checkpoints in minutes; 0 for no limit"""
    keep_checkpoints: PositiveInt = 2
    """newest checkpoints to keep, besides the one with the lowest validation loss"""
    max_skipped: PositiveInt = 10
    """non-finite updates in a row after which the run rolls back to its last checkpoint and changes the data order"""
    max_rollbacks: NaturalNumber = 2
    """rollbacks after which the run stops"""
    log_every: PositiveInt = 10
    """steps between lines in the terminal; the run log has every step"""
    prompts: list[str] = []
    """prompts of the text that is sampled four times a run; none: the start of a document"""


class OptimizerSection(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for the rest"""
    learning_rate: Positive = 6e-4
    """peak learning rate"""
    matrix_learning_rate: Positive | None = None
    """peak learning rate of Muon, scaled to AdamW's update size; learning_rate if not given"""
    min_learning_rate: NotNegative = 6e-5
    """learning rate at the end of the decay"""
    warmup_steps: NaturalNumber = 500
    """steps of linear warm-up"""
    decay_steps: PositiveInt | None = None
    """step at which min_learning_rate is reached; max_steps if not given"""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """decay after the warm-up; wsd (warmup-stable-decay) is constant, then linear"""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.4
    """share of the steps up to decay_steps in which wsd decays"""
    beta1: Fraction = 0.9
    """beta1 of AdamW"""
    beta2: Fraction = 0.95
    """beta2 of AdamW"""
    momentum: Fraction = 0.95
    """momentum of Muon"""
    weight_decay: NotNegative = 0.1
    """weight decay of matrices; vectors have none"""
    grad_clip: NotNegative = 1.0
    """largest gradient norm; 0 for no clipping"""


class MeasureSection(Section):
    power_hz: Annotated[float, Field(gt=0, le=100)] = 10.0
    """samples of the GPU's sensors per second"""
    gpu: Annotated[str, Field(min_length=1)] = "auto"
    """GPUs whose sensors are read: auto (those that train), none, or indices, UUIDs or PCI bus ids separated by
    commas"""
    idle_seconds: Annotated[float, Field(ge=0, le=600)] = 2.0
    """seconds of idle power measurement before the run; 0 for none"""
    split_every: PositiveInt = 50
    """steps between those that time forward, backward and optimizer, and read memory peaks"""
    hang_minutes: NotNegative = 10.0
    """minutes without progress after which a hung run is stopped; 0 for no limit"""


class CostSection(Section):
    price_per_kwh: Positive | None = None
    """electricity tariff in currency per kWh"""
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"
    """ISO 4217 code of the currency"""
    grams_co2_per_kwh: NotNegative | None = None
    """carbon intensity of the electricity in grams of CO2 per kWh, as its supplier states it"""
    machine_watts: NotNegative | None = None
    """power of all but the GPU boards in watts; if not given, cost and CO2 are those of the boards"""


class WandbSection(Section):
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if W&B has a key, else offline"""
    project: Annotated[str, Field(min_length=1)] = "nanogauge"
    """W&B project"""


class TrackioSection(Section):
    project: Annotated[str, Field(min_length=1)] | None = None
    """trackio project to mirror the run to; no mirror if not given"""


def _webhook(url: str) -> str:
    hide(url)
    if re.fullmatch(r"https?://[!-~]+", url) is None:
        raise ValueError("give an address that begins with http:// or https://")
    return url


class AlertsSection(Section):
    url: Annotated[Annotated[str, AfterValidator(_webhook)] | None, Field(exclude=True)] = None
    """webhook for alarms and the end of the run, written to no file; NANOGAUGE_ALERTS_URL if not given"""


class Config(Section):
    run: RunSection
    model: ModelSection
    data: DataSection
    train: TrainSection
    optimizer: OptimizerSection = OptimizerSection()
    measure: MeasureSection = MeasureSection()
    cost: CostSection = CostSection()
    wandb: WandbSection = WandbSection()
    trackio: TrackioSection = TrackioSection()
    alerts: AlertsSection = AlertsSection()

    @model_validator(mode="after")
    def _muon_has_whole_matrices(self) -> Config:
        if self.optimizer.name == "muon" and self.train.sharding == "full":
            raise ValueError(
                "muon needs whole matrices, which train.sharding = full divides; "
                "set optimizer.name to adamw or train.sharding to none"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step."""
        return self.train.micro_batch * self.model.block_size * self.train.grad_accum

    @property
    def folder(self) -> Path:
        return expand_home(self.run.out) / self.run.name

    @property
    def head(self) -> Head:
        """The vocabulary head: train.head, or chunked for an auto that with_head() has not replaced."""
        return "chunked" if self.train.head == "auto" else self.train.head

    def with_head(self, head: Head) -> Config:
        """Return the configuration with this head in the place of auto."""
        return self.with_settings({"train.head": head}) if self.train.head == "auto" else self

    def spec_fields(self, dtype: str | None = None) -> dict[str, Any]:
        """Return the fields of RunSpec; `dtype` replaces run.dtype = auto, None leaves it open."""
        model, train, optimizer = self.model, self.train, self.optimizer
        fields: dict[str, dict[str, Any]] = {}  # part of the spec -> field -> value
        for key, path in SETTINGS.items():
            section, _, name = key.partition(".")
            part, _, field = path.rpartition(".")
            fields.setdefault(part, {})[field] = getattr(getattr(self, section), name)
        run_dtype = self.run.dtype if self.run.dtype != "auto" else None
        return fields[""] | {
            "name": self.run.name,
            "shape": shape_of(model),
            "sharding": "full" if train.sharding == "full" else "replicated",
            "device": self.run.device if self.run.device != "auto" else None,
            "dtype": dtype or run_dtype,
            "head": self.head,
            "recomputation": train.checkpointing,
            "optimizer": Optimizer(name=optimizer.name, **fields["optimizer"]),
            "schedule": Schedule(decay=optimizer.schedule, **fields["schedule"]),
            "zero_init": model.zero_init,
            "init_from": self.run.init_from,
            "seed": self.run.seed,
            "dataset": EMBEDDED_TEXT if self.data.embedded else self.data.dataset or self.data.path,
            "unique_tokens": self.data.tokens,
            "validation_tokens": self.data.val_tokens,
            "cost": Cost(**self.cost.model_dump()),
            "program": program_of(model),
        }

    def with_settings(self, values: Mapping[str, object]) -> Config:
        """Return the configuration with these values by key, such as train.micro_batch."""
        sections = self.model_dump()
        for key, value in values.items():
            section, _, name = key.partition(".")
            sections[section][name] = value
        return Config.model_validate(sections)

    def to_toml(self, commented: bool = False) -> str:
        """Return the resolved configuration as TOML, without the keys whose value is None.

        With `commented`, a comment describes each key.
        """
        lines: list[str] = []
        for section, values in self.model_dump(exclude_none=True).items():
            if not values:
                continue
            lines.append(f"[{section}]")
            fields = getattr(self, section).__class__.model_fields
            for key, value in scrubbed(values).items():
                words = " ".join((fields[key].description or "").split())
                lines.append(f"{key} = {toml_value(value)}" + f" # {words}" * commented)
            lines.append("")
        return "\n".join(lines)


def shape_of(model: ModelSection) -> Shape:
    """Return the architecture that model.py builds from these settings."""
    return Shape.gpt(
        *(model.n_layer, model.n_embd, model.n_head, model.block_size, model.vocab_size),
        tied_head=model.tied_head,
        position_table=model.positions == "learned",
        bias=model.bias,
        norm_weights=model.norm == "layernorm",
    )


def program_of(model: ModelSection) -> Program:
    """Return the properties of train.py and model.py that affect memory and time."""
    return replace(
        TRAINING_PROGRAMS["nanogauge"],
        qk_norm=model.qk_norm,
        squared_relu=model.activation == "relu2",
        logit_softcap=model.logit_softcap,
    )


def toml_value(value: object) -> str:
    """Format a value of a configuration as TOML."""
    match value:
        case bool():
            return "true" if value else "false"
        case list():
            return f"[{', '.join(map(toml_value, value))}]"
        case str():
            escaped = "".join(f"\\u{ord(c):04x}" if c in '"\\' or ord(c) < 0x20 or ord(c) == 0x7F else c for c in value)
            return f'"{escaped}"'
        case _:
            return repr(value)


def read_toml(path: Path, what: str, hint: str) -> dict[str, Any]:
    """Read a user's TOML file; errors say `what` it is, and give `hint` if it is missing."""
    try:
        text = decoded(read_whole(path))
        return tomllib.loads(text)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")])
        hint = f"did you mean {path.with_name(near[0])}?" if near else f"{hint}."
        raise BadInput(f"there is no {what} file {path}; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8; save it as UTF-8"
        raise BadInput(f"cannot read the {what} file {path}: {reason}.") from None
    except RecursionError:
        raise BadInput(f"{path} is nested too deeply to be a {what} file.") from None
    except ValueError as error:  # also of a number with thousands of digits
        raise BadInput(f"{path} is not valid TOML: {error}{_toml_hint(text, error)}.") from None


def _toml_hint(text: str, error: ValueError) -> str:
    """Return the line of a TOML error and what to write there; empty if unknown."""
    place = re.search(r"at line (\d+)", str(error))
    if place is None:
        return ""
    line = text.splitlines()[int(place[1]) - 1].strip()
    return "; ".join([f": {line}", *toml_remedies(line)[:1]])


def load_config(path: Path, overrides: Mapping[str, Mapping[str, object]] | None = None) -> Config:
    """Read a configuration file and apply the overrides of the command line."""
    if path.suffix == ".py" and path.exists():
        convert = python_command("plan.py", path, "--write", "configs/mine.toml")
        raise BadInput(f"{path} is a configuration of nanoGPT; convert it: {convert}")
    return make_config(read_toml(path, "configuration", "configs/ holds examples"), path, overrides)


def make_config(values: dict[str, Any], path: Path, overrides: Mapping[str, Mapping[str, object]] | None) -> Config:
    """Return the configuration of these values of a file, changed by the command line."""
    for section, keys in (overrides or {}).items():
        target = values.setdefault(section, {})
        if isinstance(target, dict):
            target.update(keys)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise BadInput(f"{path}: {explain(error, Config)}") from None


def wandb_section(path: Path, overrides: Mapping[str, Mapping[str, object]] | None = None) -> WandbSection:
    """Return the W&B settings of a configuration, or the defaults if there is no such file."""
    if path.exists():
        return load_config(path, overrides).wandb
    try:
        return WandbSection.model_validate((overrides or {}).get("wandb", {}))
    except ValidationError as error:
        raise BadInput(f"wandb: {explain(error, WandbSection)}") from None


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add a `--section.key` flag for each key; --help-config describes them."""
    parser.add_argument(
        "--help-config",
        action="version",
        version=_describe_keys(),
        help="describe all keys of the configuration and exit",
    )
    for key in CONFIG_KEYS:
        flags = dict.fromkeys((_flag(key), f"--{key}"))
        parser.add_argument(*flags, dest=key, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.epilog = (
        f"each of the {len(CONFIG_KEYS)} keys of the configuration is also a flag (all of them: --help-config):\n"
    ) + "\n".join(_describe_key(key, CONFIG_KEYS[key]) for key in _PROMINENT_KEYS)


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


_PROMINENT_KEYS = (
    *("train.micro_batch", "train.grad_accum", "train.max_steps", "optimizer.learning_rate"),
    *("model.n_layer", "model.n_embd", "model.block_size", "data.path", "run.name", "run.device"),
)
"""Keys that --help describes."""


def _describe_key(key: str, field: FieldInfo) -> str:
    """Return the lines of a key: flag, type or choices, meaning, default, nanoGPT's name."""
    notes = ["required"] if field.is_required() else []
    if not field.is_required() and field.default not in (None, []):
        notes = [f"default {toml_value(field.default).strip(chr(34))}"]
    if (name := nanogpt_names().get(key)) is not None and name != key.partition(".")[2]:
        notes.append(f"nanoGPT: {name}")
    words = " ".join((field.description or "").split())
    words += f" ({'; '.join(notes)})" if notes else ""
    head = f"  {_flag(key)} {_kind(field.annotation)}"
    indent = " " * 32
    lines = textwrap.fill(words, 98, initial_indent=indent, subsequent_indent=indent)
    return f"{head}\n{lines}" if len(head) >= len(indent) else head + lines[len(head) :]


def _kind(annotation: Any) -> str:
    """Return the type of a key as help shows it: its choices, N, X, TEXT or a list."""
    if typing.get_origin(annotation) is Literal:
        return "|".join(typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return "'[\"TEXT\", ...]'"
    kinds = _kinds(annotation)
    names = {bool: "true|false", int: "N", float: "X", str: "TEXT"}
    return next(name for kind, name in names.items() if kind in kinds)


def _kinds(annotation: Any) -> list[Any]:
    """Return an annotation and all that it contains."""
    return [annotation, *(kind for part in typing.get_args(annotation) for kind in _kinds(part))]


def _describe_keys() -> str:
    """Return the description of all keys, by section."""
    lines = ["Keys of a configuration, in a file as key = value below [section], or as flags."]
    for section in Config.model_fields:
        lines.append(f"\n[{section}]")
        keys = (key for key in CONFIG_KEYS if key.startswith(f"{section}."))
        lines += [_describe_key(key, CONFIG_KEYS[key]) for key in keys]
    return "\n".join(lines)


def given_config(namespace: argparse.Namespace) -> Config | None:
    """Load the configuration that a command line names, with its flags; None if it names none."""
    if namespace.config is not None:
        return load_config(namespace.config, config_overrides(namespace))
    if flag := next((name for name in vars(namespace) if "." in name), None):
        raise BadInput(f"--{flag} changes a configuration; give one.")
    return None


def config_overrides(namespace: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Return the configuration flags of a command line as {section: {key: value}}."""
    result: dict[str, dict[str, object]] = {}
    for dotted, text in vars(namespace).items():
        section, _, key = dotted.partition(".")
        if key:
            result.setdefault(section, {})[key] = _from_text(text, dotted)
    return result


_MULTIPLE = re.compile(r"([\d.]+)([kmgbt])", re.IGNORECASE)


def _from_text(text: str, dotted: str) -> object:
    """Parse a flag's text by the type of its key; invalid text is returned for the validation.

    Python's spelling of values is accepted as well as TOML's.
    """
    annotation = CONFIG_KEYS[dotted].annotation
    kinds = _kinds(annotation)
    if type(None) in kinds and text == "None":
        return None
    if typing.get_origin(annotation) is Literal:
        return text
    try:
        if typing.get_origin(annotation) is list:
            return tomllib.loads(f"value = {text}")["value"]
        if str in kinds:
            return text
        if bool in kinds:
            return {"true": True, "false": False}[text.lower()]
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    except (ValueError, KeyError, RecursionError):
        return text


CONFIG_KEYS: dict[str, FieldInfo] = {
    f"{section}.{key}": info
    for section, field in Config.model_fields.items()
    for key, info in getattr(field.annotation, "model_fields", {}).items()
}
"""Every key of the configuration, as section.key."""

CHUNK_BYTES = {"cpu": 36 * 2**20, "cuda": 512 * 2**20}
"""Largest logits of a chunk: fp32 on a CPU, 16-bit elsewhere. With smaller chunks, reading and writing the weight
gradient once per chunk takes longer than the matrix products; with larger ones the softmax leaves the CPU's caches and
the peak memory grows."""
MMAP_THRESHOLD_BYTES = 32 * 2**20
"""glibc's largest mmap threshold: freed blocks above it return to the kernel, which clears them before their next use.
Logits above it are kept between losses on a CPU."""


def chunk_tokens(tokens: int, vocabulary: int, device_type: str) -> int:
    """Return the tokens per chunk of the vocabulary head, a multiple of 16 (CPU) or 64 (GPU).

    All chunks of a loss are about equally large: a small last one would leave most of a GPU idle. On a GPU they may be
    twice as large if there would be more than four.
    """
    kind, element, unit = ("cpu", 4, 16) if device_type == "cpu" else ("cuda", 2, 64)
    most = max(unit, CHUNK_BYTES[kind] // (element * vocabulary) // unit * unit)
    chunks = math.ceil(tokens / most)
    if kind == "cuda" and chunks > 4:
        chunks = max(4, math.ceil(tokens / (2 * most)))
    return math.ceil(tokens / chunks / unit) * unit
