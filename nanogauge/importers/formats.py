"""The programs whose printed logs can be imported."""

from __future__ import annotations

from nanogauge.analysis.measured import NOT_IN_LOG
from nanogauge.importers.parsed import LoggedProcess, not_in_log, warning
from nanogauge.importers.reader import TextFormat
from nanogauge.schema import Event

_ALONE = r"(?<![\w./-])"  # not the end of a longer word, number or path
_MORE = r"(?:[,|] .*)?$"  # figures that variants of a program append
# A fixed number of decimals: a line that is cut within them is recognised as cut.
_4_DECIMALS = r"-?\d+\.\d{4}|-?inf|nan"
_6_DECIMALS = r"-?\d+\.\d{6}|-?inf|nan"
_PARAMETER_TENSORS = (
    r"num decayed parameter tensors: \d+, with (?P<decayed_parameters>[\d,]+) parameters$"
    r"|num non-decayed parameter tensors: \d+, with (?P<other_parameters>[\d,]+) parameters$"
)
_DEVICE_NOT_LOGGED = (
    "The log does not name its device, software or power: the device is as given on the command "
    "line."
)


def _printed_mfu(run: list[LoggedProcess], reason: str, zero_reason: str = "") -> list[Event]:
    printed = [100 * s.mfu for process in run for s in process.steps if s.mfu is not None]
    if not printed:
        return []
    if zero_reason and max(printed) == 0:
        text = f"the log itself printed 0.00 %{zero_reason}"
    else:
        text = f"the log itself printed {min(printed):.1f}-{max(printed):.1f} %{reason}"
    return [Event(what="logged_mfu", about="mfu_palm", text=text)]


def _nanogpt_events(run: list[LoggedProcess]) -> list[Event]:
    return _printed_mfu(run, ", because nanoGPT divides by an A100's 312 TFLOP/s on every card")


def _nanochat_events(run: list[LoggedProcess]) -> list[Event]:
    last = run[-1].steps[-1] if run[-1].steps else run[0].steps[-1]
    seconds = max(process.training_seconds or 0.0 for process in run)
    stopped = "nanochat's clock stands still for evaluation and checkpoints"
    if seconds:
        stopped += f" (its sum of the steps after the first 11 is {seconds / 60:,.2f} min)"
    return [
        warning(
            "other_model",
            "nanochat's model and optimizer are not those of a GPT-2: parameters, FLOPs, MFU and "
            "every prediction are of the configuration that was given, and right as far as it is.",
        ),
        Event(
            what="smoothed_loss",
            text=f"The losses up to step {last.step:,} are nanochat's running means.",
        ),
        not_in_log("total_seconds", stopped),
        *_printed_mfu(
            run,
            " by nanochat's own count and peak",
            ", because nanochat does not know this card's peak",
        ),
    ]


def _build_nanogpt_events(run: list[LoggedProcess]) -> list[Event]:
    evaluated = [process.accuracy for process in run if process.accuracy is not None]
    if not evaluated:
        return []
    step, accuracy = evaluated[-1]
    text = (
        f"HellaSwag is {accuracy:.4f} after {step:,} steps by build-nanogpt's own evaluation, "
        "which is not comparable with ours"
    )
    return [Event(what=NOT_IN_LOG, about="quality_vs_gpt2", text=text)]


NANOGPT = TextFormat(
    source="nanogpt_log",
    program="nanoGPT",
    what="nanoGPT's output",
    example="iter 200: loss 6.2977, time 3917.80ms, mfu 12.87%",
    steps=(
        rf"{_ALONE}iter (?P<step>\d+): loss (?P<loss>{_4_DECIMALS}), "
        rf"time (?P<milliseconds>\d+\.\d\d)ms(?:, mfu (?P<mfu_percent>-?\d+\.\d\d)%{_MORE}|$)",
    ),
    evaluations=(
        rf"{_ALONE}step (?P<step>\d+): train loss (?P<train_loss>{_4_DECIMALS}), "
        rf"val loss (?P<val_loss>{_4_DECIMALS}){_MORE}",
    ),
    record_start=r"(?:iter|step) \d+ *(?::|$)",
    header=(
        r"Overriding(?: config with|: )",
        r"tokens per iteration will be: (?P<tokens_per_step>[\d,]+)$",
        r"number of parameters: (?P<parameters>[\d.]+M)$"
        rf"|{_PARAMETER_TENSORS}"
        r"|(?:found|defaulting to) vocab_size (?:=|of GPT-2 to) (?P<vocab_size>\d+) \("
        r"|Initializing a new model from scratch$"
        r"|(?P<resumed>Resuming training from )",
    ),
    assignment=r"(?:Overriding: )?([a-z_]\w*) *= *([^#]+)(?:#|$)",
    checkpoint=r"(?<!\w)saving checkpoint to ",
    # The clock of a step stops after the evaluation and checkpoint before it.
    evaluation_inside=True,
    compilation_inside=True,
    note=_DEVICE_NOT_LOGGED,
    events=_nanogpt_events,
)

NANOCHAT = TextFormat(
    source="nanochat_log",
    program="nanochat",
    what="nanochat's output",
    example="step 00010/21400 (0.05%) | loss: 8.123456 | lrm: 1.00 | dt: 1234.56ms | tok/sec: ...",
    # Where a terminal wrapped a line at a space, the space is missing.
    steps=(
        r"^step (?P<step>\d+)/(?P<num_iterations>\d+)\s*\(\s*[\d.]+%\)\s*"
        rf"\|\s*loss:\s*(?P<loss>{_6_DECIMALS})\s*"
        r"(?:\|\s*grad\s*norm:\s*(?P<grad_norm>-?[\d.]+|-?inf|nan)\s*)?"
        r"\|\s*lrm:\s*[\d.]+\s*"
        r"\|\s*dt:\s*(?P<milliseconds>\d+\.\d\d)ms\s*"
        r"\|\s*tok/sec:\s*(?P<tokens_per_second>[\d,]+)\s*"
        r"\|\s*(?:bf16_)?mfu:\s*(?P<mfu_percent>\d+\.\d\d)\s*"
        r"(?:\|\s*epoch:[^|]{1,60})?"
        r"\|\s*total\s*time:\s*(?P<training_minutes>\d+\.\d\d)m",
    ),
    evaluations=(
        rf"{_ALONE}Step (?P<step>\d+) \| "
        r"Validation bpb: (?P<bits_per_byte>\d+\.\d{4,})(?: |$)",
    ),
    record_start=rf"{_ALONE}step \d{{5,}}(?:/|$)",  # padded with zeros
    header=(r"(?P<resumed>Resuming optimization from step \d+)",),
    peak_mib=rf"{_ALONE}Peak memory usage: (\d+\.\d\d)MiB$",
    other_stage=rf"{_ALONE}step \d+ \(\d|{_ALONE}Step \d+/\d+ \|",
    wraps=True,
    # The clock of a step stands still for evaluation and checkpoints.
    evaluation_inside=False,
    compilation_inside=True,
    note="The log does not name its device or software: the device is as given on the command "
    "line. nanochat's model is not the GPT of the configuration: the comparison is only as "
    "right as that configuration describes it.",
    events=_nanochat_events,
)

BUILD_NANOGPT = TextFormat(
    source="build_nanogpt_log",
    program="build-nanogpt",
    what="build-nanogpt's log.txt or output",
    example="100 train 6.123456' or 'step   100 | loss: 6.123456 | lr ...",
    # The output of train_gpt2.py, and its log.txt, which has losses without any time.
    steps=(
        rf"{_ALONE}step +(?P<step>\d+) \| loss: (?P<loss>{_6_DECIMALS}) \| "
        r"lr (?P<learning_rate>\d\.\d{4}e[-+]\d\d) \| norm: (?P<grad_norm>\d+\.\d{4}|inf|nan) \| "
        r"dt: (?P<milliseconds>\d+\.\d\d)ms \| tok/sec: (?P<tokens_per_second>\d+\.\d\d)$",
        rf"^(?P<step>\d+) train (?P<loss>{_6_DECIMALS})$",
    ),
    evaluations=(
        rf"{_ALONE}validation loss: (?P<val_loss>{_4_DECIMALS})$",
        rf"{_ALONE}HellaSwag accuracy: \d+/\d+=(?P<accuracy>\d\.\d{{4}})$",
        rf"^(?P<step>\d+) val (?P<val_loss>{_4_DECIMALS})$",
        r"^(?P<step>\d+) hella (?P<accuracy>\d\.\d{4})$",
    ),
    record_start=r"step +\d+ *(?:\||$)|\d+ (?:val|hella|train)\b",
    header=(r"total desired batch size: (?P<tokens_per_step>\d+)$", _PARAMETER_TENSORS),
    # The clock of a step starts before evaluation, HellaSwag and sampling.
    evaluation_inside=True,
    compilation_inside=True,
    note=_DEVICE_NOT_LOGGED,
    events=_build_nanogpt_events,
)
