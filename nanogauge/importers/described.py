"""What a log says about its run: the RunSpec, what it leaves unknown, and contradictions."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from nanogauge.config import Config, explain, load_config
from nanogauge.errors import BadInput
from nanogauge.hardware import auto_dtype, find_gpu
from nanogauge.importers.formats import Format
from nanogauge.importers.nanogpt_config import GPT2_ROWS, Value, literal
from nanogauge.importers.parsed import LoggedProcess, parse_number, warning
from nanogauge.importers.text import quoted
from nanogauge.prediction.flops import count_parameters, flops_per_token_palm
from nanogauge.programs import program_named
from nanogauge.runspec import RunSpec
from nanogauge.schema import Event
from nanogauge.spec_parts import SETTINGS

_TOKENS = "train.micro_batch x model.block_size x train.grad_accum"
_DERIVED = {
    "tokens_per_step": ("tokens per step", _TOKENS),
    "parameters": ("parameters", "parameters without position embeddings"),
    "total_parameters": ("parameters with position embeddings",) * 2,
}
"""Printed result of the configuration -> its name in a message, and what it corresponds to."""
_OF_ALL_RANKS = "gradient accumulation of all ranks"
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "tf32": "float32"}
_REQUIRED = (
    *(f"model.{name}" for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")),
    *(f"train.{name}" for name in ("micro_batch", "grad_accum", "max_steps")),
)
_FACTOR = 1.5
"""Largest plausible ratio of FLOPs by the printed MFU and by the configuration."""


@dataclass(frozen=True)
class Given:
    """What the user says about the run; overrides: section -> key -> value of the flags. BadInput for gpus below 1."""

    config: Path | None = None
    overrides: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    gpu: str | None = None
    gpus: int | None = None
    local_gpu: str | None = None
    """GPU of the machine that runs it, where neither user nor log names one."""

    def __post_init__(self) -> None:
        if self.gpus is not None and self.gpus < 1:
            raise BadInput("--gpus takes a number of GPUs above 0.")


class Fact(NamedTuple):
    """A printed value, with its name and text there."""

    line: int
    name: str
    text: str
    value: Value


def describe(
    path: Path, format: Format, run: list[LoggedProcess], given: Given
) -> tuple[RunSpec, str | None, list[Event]]:
    """Return a run's spec from its log, completed by the user; its GPU, if known; and remarks.

    Raises BadInput for contradictions between log and user, all in one sentence.
    """
    describer = _Describer(path, format, run, given)
    spec, card = describer.spec(), describer.facts.get("gpu")
    named = given.gpu or (str(card.value) if card else given.local_gpu)
    gpu = named if spec.device != "cpu" else None
    describer.refuse_contradictions(spec, gpu)
    if spec.dtype is None and gpu is not None:
        dtype: Any = auto_dtype(gpu)
        if dtype != "bfloat16":
            dtype = format.half
            describer.warn("dtype", f"The precision is taken as {dtype}: {gpu} has no bfloat16.")
        spec = replace(spec, dtype=dtype)
    describer.check(spec)
    return spec, gpu, describer.events


class _Describer:
    """Merge what the log and the user say about one run."""

    def __init__(self, path: Path, format: Format, run: list[LoggedProcess], given: Given) -> None:
        self.path, self.format, self.run, self.given = path, format, run, given
        self.facts, self.events = _facts(run), list[Event]()
        self.flags = {f"{s}.{k}": v for s, keys in given.overrides.items() for k, v in keys.items()}
        forced = {k: self.facts[k].value for k in format.yields if k in self.facts}
        if "train.max_steps" in format.yields and run[-1].made_updates:
            forced["train.max_steps"] = run[-1].made_updates
        # None of these programs has a chunked head.
        forced |= format.fixed
        self.values: dict[str, Any] = {"train.head": "plain", **self.flags, **forced}
        if given.config is not None:
            config = load_config(given.config, _nested(self.values)).model_dump()
            self.values = {f"{s}.{k}": v for s, keys in config.items() for k, v in keys.items()}

    def warn(self, what: str, text: str, about: str | None = None) -> None:
        self.events.append(warning(what, text, about))

    def number(self, key: str) -> float | None:
        """Return a number by the log, else by the user."""
        value = self.facts[key].value if key in self.facts else self.values.get(key)
        return float(value) if isinstance(value, int | float) else None

    def spec(self) -> RunSpec:
        own = dict(self.values)
        spec = self._spec(defaults=True)
        if self.given.config is None and any(x[0] in _DERIVED for x in self._other_values(spec)):
            self.values, self.events = own, []
            spec = self._spec(defaults=False)  # the program was edited
        return spec

    def _spec(self, defaults: bool) -> RunSpec:
        world, unknown = self._world_size(), list[str]()
        if self.given.config is None:
            unknown = self._complete(world, defaults)
        values = {"run.name": "imported", "data.path": "unknown", **self.values}
        if values.get("data.embedded"):
            del values["data.path"]
        try:
            spec = RunSpec.from_config(Config.model_validate(_nested(values)), world_size=world)
        except ValidationError as error:
            raise BadInput(f"{self.path}: {explain(error, Config)}") from None
        program = program_named(self.format.name)
        if self.given.config is None:
            spec = _without_unknown(spec, values)
            own = ("n_kv_head", "table_parameters")
            printed: dict[str, Any] = {k: self.facts[k].value for k in own if k in self.facts}
            spec = replace(spec, shape=replace(spec.shape, **({} if unknown else printed)))
        elif self.format.own_model:  # which the configuration describes as a GPT
            program = replace(spec.program, name=self.format.name)
            text = "model and optimizer are not those of the configuration, of which parameters, "
            text += "FLOPs, MFU and predictions are: they are as right as it is."
            self.warn("other_model", f"{self.format.title}'s {text}")
        return replace(spec, program=program, unknown=tuple(unknown))

    def _world_size(self) -> int:
        """Return how many GPUs shared the run: by the user, the log, or its batch sizes."""
        micro, context = self.number("train.micro_batch"), self.number("model.block_size")
        per_rank, tokens = self.number("rank_accumulation"), self.number("tokens_per_step")
        all_ranks, world = self.number("micro_batch_tokens"), self.number("world_size")
        if all_ranks is None and tokens is not None and per_rank:
            all_ranks = tokens / per_rank
        if world is None and all_ranks is not None and micro and context:
            world = all_ranks / (micro * context)
        whole = int(world) if world is not None and world >= 1 and world.is_integer() else None
        gpus = self.given.gpus or whole or 1
        if whole not in (None, gpus):
            raise BadInput(f"{self.path} is of {whole} ranks, but --gpus is {gpus}; leave it out.")
        if per_rank is not None and "train.grad_accum" not in self.facts:
            fact = self.facts["rank_accumulation"]._replace(name=_OF_ALL_RANKS)
            self.facts["train.grad_accum"] = fact._replace(value=int(per_rank * gpus))
        return gpus

    def _complete(self, world: int, defaults: bool) -> list[str]:
        """Fill the values from the log and the program's defaults; return those still unknown."""
        values, facts = self.values, self.facts
        dumped = defaults and any(p.configuration_printed for p in self.run)
        if dumped or not self.format.dump:
            values |= {k: v for k, v in self.format.defaults.items() if k not in values}
            if values.get("data.dataset") == "openwebtext":
                values.setdefault("model.vocab_size", GPT2_ROWS)
        own = {*self.flags, *self.format.fixed}
        values |= {k: f.value for k, f in facts.items() if "." in k and k not in own}
        tokens, context = self.number("tokens_per_step"), values.get("model.block_size")
        micro, accumulation = values.get("train.micro_batch"), values.get("train.grad_accum")
        if tokens and micro and context and "train.grad_accum" not in self.flags:
            if (whole := tokens / (micro * context)).is_integer():
                values["train.grad_accum"] = int(whole)
        elif tokens and context and accumulation and tokens % (context * accumulation) == 0:
            values.setdefault("train.micro_batch", int(tokens / (context * accumulation)))
        unknown = [key for key in _REQUIRED if key not in values]
        if tokens and {"train.micro_batch", "model.block_size"} & {*unknown}:
            # Their product alone is known: any factors that give it serve.
            micro = int(tokens / (context or 1) / world)
            values |= {"train.grad_accum": world, "train.micro_batch": micro}
            unknown = [k for k in unknown if not k.startswith("train.")] + ["train.micro_batch"]
        if "train.max_steps" not in values:
            values["train.max_steps"] = max(process.updates for process in self.run) or 1
            text = "The log does not say how many steps were planned (--train.max-steps): it is"
            self.warn("length", f"{text} taken as whole.")
            unknown = [key for key in unknown if key != "train.max_steps"]
        width = 2 * values.get("model.n_head", 1)
        placeholders: dict[str, Any] = dict.fromkeys(unknown, 1)
        self.values = placeholders | {"train.grad_accum": world, "model.n_embd": width} | values
        if unknown:
            flags = " ".join("--" + key.replace("_", "-") for key in unknown)
            text = f"The log does not say {flags} (or --config): rows that need them are absent."
            self.warn("unknown", text)
        if not tokens and {"train.micro_batch", "model.block_size"} & {*unknown} and "train.grad_accum" not in unknown:
            unknown.append("train.grad_accum")  # alone it says nothing
        return unknown

    def refuse_contradictions(self, spec: RunSpec, gpu: str | None) -> None:
        """Refuse every value of the log that differs from what the user gave, with its line."""
        others = list(self._other_values(spec))
        found = [
            f"line {fact.line:,} has {_DERIVED.get(key, (fact.name,))[0]} = "
            f"{quoted(fact.text)[1:-1]}, but the configuration has "
            f"{_DERIVED.get(key, (key, key))[1]} = {_format_value(ours)}"
            for key, fact, ours in others
        ]
        found += self._other_device(spec, gpu)
        found = found or [*self._other_steps(spec)]
        if not found:
            return
        text = f"{self.path}: {'; '.join(found)}"
        text += f" (it is of {spec.world_size} ranks)" if spec.world_size > 1 else ""
        if self.given.config is None and not self.flags and self.given.gpu is None:
            self.warn("contradiction", f"The log contradicts itself: {text}.")
            return
        flags = [f" --{k.replace('_', '-')} {f.value}" for k, f, _ in others if k in SETTINGS]
        settle = ":" + "".join(flags).lower() if flags else ""
        raise BadInput(f"{text}; give the configuration of that run{settle}.")

    def _other_values(self, spec: RunSpec) -> Iterator[tuple[str, Fact, Value]]:
        """Yield each printed value that is not that of the spec, with the latter."""
        counted = count_parameters(spec.shape)
        ours: dict[str, Value | None] = {key: spec.setting(key) for key in SETTINGS}
        ours |= {"tokens_per_step": spec.tokens_per_step, "parameters": counted.without_positions}
        ours |= {"total_parameters": counted.total}
        skipped = {*spec.unknown, *spec.absent_rows(), *self.format.yields}
        if "parameters_total" in skipped:
            skipped.add("total_parameters")
        accumulation, tokens = self.facts.get("train.grad_accum"), "tokens_per_step" in self.facts
        product = accumulation is not None and accumulation.name == _OF_ALL_RANKS and tokens
        if product or "train.micro_batch" in skipped:
            skipped.add("train.grad_accum")  # the product is compared
        if spec.device == "cpu":
            skipped.add("run.dtype")  # nanoGPT's autocast is used on GPUs only
        for key, fact in sorted(self.facts.items(), key=lambda item: item[1].line):
            own = ours.get(key)
            if own is not None and key not in skipped and not _agree(key, fact.value, own):
                yield key, fact, own

    def _other_device(self, spec: RunSpec, gpu: str | None) -> Iterator[str]:
        device, card = self.facts.get("run.device"), self.facts.get("gpu")
        on_cpu = spec.device == "cpu"
        if device is not None and (device.value == "cpu") != on_cpu:
            what = "leave out run.device = cpu and name the card" if on_cpu else "--run.device cpu"
            text = f"line {device.line:,} has device = {quoted(device.text)[1:-1]}, not"
            yield f"{text} {spec.device or 'a GPU'}: {what}"
        if card is not None and gpu is not None:
            theirs, ours = find_gpu(str(card.value)), find_gpu(gpu)
            if theirs and ours and theirs.name != ours.name:
                yield f"line {card.line:,} names the card {card.value}, but --gpu is {gpu}"

    def _other_steps(self, spec: RunSpec) -> Iterator[str]:
        """Compare rate x time with the tokens of a step, and the number of steps."""
        last = max(process.last_step for process in self.run)
        if last > spec.steps:
            yield f"it has step {last:,}, but the configuration train.max_steps = {spec.steps:,}"
        timed = [(s.tokens_per_second, s.seconds) for process in self.run for s in process.steps]
        pairs = [(rate * seconds, seconds) for rate, seconds in timed if rate and seconds]
        if not pairs or "tokens_per_step" in spec.absent_rows():
            return
        tokens, seconds = (statistics.median(values) for values in zip(*pairs, strict=True))
        per_step, world = spec.tokens_per_step, spec.world_size
        counted = {1, world, *([spec.grad_accum // world] if self.format.micro_batch_rate else [])}
        rounding = max(0.01, 6e-4 / seconds)
        if not any(abs(tokens * n / per_step - 1) < rounding for n in counted):
            text = f"by its times and rates it made steps of {tokens:,.0f} tokens, but the"
            yield f"{text} configuration has {per_step:,} ({_TOKENS})"

    def check(self, spec: RunSpec) -> None:
        """Warn if printed FLOPs or MFU, or the evaluations, are not those of the configuration."""
        spacing = evaluation_spacing(self.run)
        if spacing is not None and spec.eval_every and spacing < spec.eval_every:
            text = f"The log has evaluations {spacing:,} steps apart, and the configuration "
            text += f"train.eval_every = {spec.eval_every:,}: the predicted total has too few."
            self.warn("evaluations", text, about="total_seconds")
        peak = self.number("peak_flops") or self.format.mfu_peak
        timed = [s.mfu * s.seconds for p in self.run for s in p.steps if s.mfu and s.seconds]
        timed = [share for share in timed if math.isfinite(share)]
        printed, what = self.number("flops_per_token"), "its FLOPs per token"
        if printed is None and timed and peak is not None and math.isfinite(peak):
            flops = statistics.median(timed) * peak * spec.world_size
            printed, what = flops / spec.tokens_per_step, "its MFU x peak x time"
        if not printed or printed <= 0 or spec.absent_rows():
            return
        per_token = flops_per_token_palm(spec.shape)
        if 1 / _FACTOR < (ratio := per_token / printed) < _FACTOR:
            return
        text = (
            f"The log contradicts the model: {what} means {printed / 1e6:,.4g} MFLOP per token, "
            f"and the configuration {per_token / 1e6:,.4g}, a factor of {ratio:.3g}: it is of "
            "another model or batch"
        )
        if ratio > _FACTOR and abs((ranks := 2 ** round(math.log2(ratio))) / ratio - 1) < 0.1:
            text += f", or {ranks * spec.world_size} GPUs shared it (--gpus)"
        self.warn("logged_mfu_differs", f"{text}.", about="mfu_palm")


def evaluation_spacing(run: list[LoggedProcess]) -> int | None:
    """Return the steps between evaluations, as printed or else as most of them lie apart."""
    for process in run:
        if (printed := process.settings.get("train.eval_every")) is not None:
            value = literal(printed[2])
            return int(value) if isinstance(value, int) and value > 0 else None
    steps = sorted({e.step for process in run for e in process.evaluations})
    apart = [b - a for a, b in pairwise(steps)]
    return statistics.mode(apart) if len(apart) > 1 else None


def _facts(run: list[LoggedProcess]) -> dict[str, Fact]:
    """Return what the processes of a run print; of a resumed run the last values count."""
    facts: dict[str, Fact] = {}
    names: dict[str, Value] = {}
    for process in run:
        for key, (line, name, text) in process.settings.items():
            value = _parse_value(key, text, names)
            if value is not None:
                names[name] = value
                facts[key] = Fact(line, name, text, value)
    return facts


def _parse_value(key: str, text: str, names: Mapping[str, Value]) -> Value | None:
    """Return a number, boolean or word; None for an expression that needs more."""
    text = text.strip().rstrip(",")
    if len(text) > 2 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if key == "run.dtype":
        text = _DTYPES.get(text.lower(), text)
        return text if text in _DTYPES.values() else None
    if key == "run.device":
        device = text.partition(":")[0]
        return device if device in ("cuda", "cpu", "mps") else None
    if key in ("gpu", "data.dataset"):
        return text
    try:
        number = parse_number(text[:-1] + "e6" if text.endswith("M") else text)
    except ValueError:
        return literal(text, names)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _agree(key: str, value: Value, ours: Value) -> bool:
    if isinstance(value, str) or isinstance(ours, str | bool):
        return value == ours
    if key == "parameters":
        return abs(value - ours) < 5100  # printed in millions with two decimals
    return math.isclose(value, ours, rel_tol=1e-9)


def _format_value(value: Value) -> str:
    return str(value) if isinstance(value, str | bool) else f"{value:,.12g}"


def _nested(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {section: {key: value}} of {"section.key": value}."""
    sections: dict[str, dict[str, Any]] = {}
    for dotted, value in values.items():
        section, _, key = dotted.partition(".")
        if value is not None:
            sections.setdefault(section, {})[key] = value
    return sections


def _without_unknown(spec: RunSpec, values: Mapping[str, Any]) -> RunSpec:
    """Return the spec with None for the optional settings that nothing gives."""
    fields = spec.to_dict() | dict.fromkeys(("name", "seed", "zero_init"))
    for key, path in SETTINGS.items():
        part, _, name = path.rpartition(".")
        if key not in values and key not in _REQUIRED and part in ("", "optimizer"):
            (fields[part] if part else fields)[name] = None
    if "optimizer.learning_rate" not in values:
        fields["schedule"] = None
    fields["dataset"] = values.get("data.dataset")
    return RunSpec.from_json(json.dumps(fields).encode())
