"""What happened in the night: how a run went on after a fault, and what that cost it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nanogauge.quantities import format_seconds
from nanogauge.runlog.history import LostWork, Recorded, process_began
from nanogauge.schema import End, Event, Line, Start, Stored

SKIPPED = "update_skipped"
BACK = "rollback"
_COUNTED = {
    "out_of_memory": "memory ran out {times}",
    "compile_failed": "compilation failed",
    "hung": "hung {times}",
    "disk_full": "the disk was full {times}",
    "changed": "went on with another configuration",
    "checkpoint_failed": "a checkpoint failed {times}",
    "checkpoint_damaged": "a checkpoint was damaged {times}",
    "loss_spike": "the loss rose {times}",
    "stopped": "stopped {times}",
    "readings_dropped": "sensor readings were dropped {times}",
}
"""events that are told, and what the summary says of them"""


class Happening(Stored):
    what: str
    """restart, rollback, update_skipped, or what the event in the log is called"""
    step: int | None
    unix_time: float | None
    """None where the log does not tell the time of day"""
    text: str


class Night(Stored):
    summary: str
    """one line; of a quiet night all there is"""
    happenings: list[Happening]
    """in the order of the log; updates that were skipped between two starts are one"""


def tell_night(recorded: Recorded) -> Night:
    """Everything that a run had to go on after, in the order of its log."""
    told: list[Happening] = []
    skipped: list[Happening] = []
    skipped_at = 0
    before: list[Event | End] = []
    """what the process has written since its last start line"""
    number, start = -1, recorded.starts[0]
    for process, line in recorded.milestones:
        if isinstance(line, Start):
            number, start = number + 1, line
            _tell_skipped(told, skipped, skipped_at)
            loss = recorded.lost_work[number]
            if line.continues:
                _tell_back(told, line, loss)
            elif process > 0:
                text = _restarted(recorded, process, before, loss)
                told.append(_happening("restart", start, line.first_step, line, text))
            before = []
            continue
        before.append(line)
        if not isinstance(line, Event):
            continue
        if line.what == SKIPPED:
            skipped_at = skipped_at if skipped else len(told)
            skipped.append(_happening(SKIPPED, start, line.step, line, line.text))
        elif line.what in _COUNTED or line.what == BACK:
            told.append(_happening(line.what, start, line.step, line, line.text))
    _tell_skipped(told, skipped, skipped_at)
    return Night(summary=_summary(recorded, told), happenings=told)


def skipped_updates(recorded: Recorded) -> int:
    """Updates that were not made as loss or gradient was not finite; those of lost work, too."""
    return sum(event.what == SKIPPED for event in recorded.events)


def rollbacks(recorded: Recorded) -> int:
    """How often the run went back to a checkpoint to see its data in another order."""
    return max(start.rollbacks or 0 for start in recorded.starts)


def _happening(what: str, start: Start, step: int | None, line: Line, text: str) -> Happening:
    """Something that the process of this start line wrote, with its time of day."""
    began, elapsed = process_began(start), line.elapsed_seconds
    at = None if began is None or elapsed is None else began + elapsed
    return Happening(what=what, step=step, unix_time=at, text=text)


def _tell_skipped(told: list[Happening], skipped: list[Happening], place: int) -> None:
    """Put the updates that were skipped, as one, to where the first of them was."""
    if not skipped:
        return
    one = skipped[0]
    if len(skipped) > 1:
        steps = [each.step for each in skipped if each.step is not None]
        to = f", the last at step {steps[-1]:,}" if steps else ""
        text = f"{len(skipped):,} updates were skipped{to}: their loss or gradient was not finite."
        one = one.model_copy(update={"text": text})
    told.insert(place, one)
    skipped.clear()


def _tell_back(told: list[Happening], start: Start, loss: LostWork) -> None:
    """What going back lost, beside the event that tells of it."""
    lost = _made_again(loss)
    if told and told[-1].what == BACK:
        event = told.pop()
        text = f"{event.text} {lost[0].upper()}{lost[1:]}."
        told.append(event.model_copy(update={"text": text}))
    else:
        text = f"Went back to step {start.first_step:,}; {lost}."
        told.append(_happening(BACK, start, start.first_step, start, text))


def _restarted(
    recorded: Recorded, process: int, before: Sequence[Event | End], loss: LostWork
) -> str:
    start, gap = recorded.processes[process][0], recorded.gap_seconds[process - 1]
    by = ""
    if start.source == "train":
        by = " by --supervise" if start.restart else " by hand"
    when = "at a time that is not known," if gap is None else format_seconds(gap)
    return (
        f"Started again{by}, {when} after the process before {_how_it_ended(before)}; "
        f"{_made_again(loss)}."
    )


def _how_it_ended(lines: Sequence[Event | End]) -> str:
    """How a process ended, by what it wrote."""
    for line in lines:
        if isinstance(line, End):
            how = {"finished": "had finished", "stopped": "was stopped", "failed": "failed"}
            return how[line.status] + (f" ({line.reason})" if line.reason else "")
    if lines and isinstance(lines[-1], Event) and lines[-1].what == BACK:
        return "ended to go back"
    if any(line.what == "hung" for line in lines if isinstance(line, Event)):
        return "hung"
    return "died without a word in the log: killed, crashed, or without power"


def _made_again(loss: LostWork) -> str:
    if not loss.steps:
        return "no step was made again"
    took = f" ({format_seconds(loss.seconds)})" if loss.seconds else ""
    return f"{loss.steps:,} step{'s were' if loss.steps > 1 else ' was'} made again{took}"


def _summary(recorded: Recorded, told: list[Happening]) -> str:
    if not told:
        if recorded.starts[0].source != "train":
            return "The log tells of one process; what else happened it would not tell."
        return "Nothing: one process, no update was skipped, and no checkpoint lost."
    counted = Counter(one.what for one in told)
    parts = []
    if restarts := counted["restart"]:
        alone = sum(bool(starts[0].restart) for starts in recorded.processes[1:])
        parts.append(
            f"started again {_times(restarts)}"
            + (f", {alone} of them by --supervise" * (alone > 0))
        )
    if skipped := skipped_updates(recorded):
        parts.append(f"{skipped:,} update{'s' * (skipped > 1)} skipped")
    if back := counted[BACK]:
        parts.append(f"gone back {_times(back)}")
    if recorded.lost_steps:
        parts.append(_made_again(LostWork(recorded.lost_steps, recorded.lost_seconds)))
    gaps = [seconds for seconds in recorded.gap_seconds if seconds is not None]
    if gaps:
        unknown = len(recorded.gap_seconds) - len(gaps)
        more = f", and {unknown} time{'s' * (unknown > 1)} that is not known" if unknown else ""
        parts.append(f"no process ran for {format_seconds(sum(gaps))}{more}")
    parts += [
        words.format(times=_times(counted[what]))
        for what, words in _COUNTED.items()
        if counted[what]
    ]
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"
