"""List the faults a run recovered from, and what each cost."""

from collections import Counter
from collections.abc import Sequence

from pydantic import ConfigDict, Field

from nanogauge.quantities import format_seconds
from nanogauge.runlog.history import LostWork, RunHistory, process_began
from nanogauge.schema import End, Event, Line, Start, Stored

UPDATE_SKIPPED = "update_skipped"
ROLLBACK = "rollback"
_SUMMARIES = {
    "out_of_memory": "memory ran out {times}",
    "compile_failed": "compilation failed",
    "hung": "hung {times}",
    "disk_full": "the disk was full {times}",
    "changed": "resumed with another configuration",
    "checkpoint_failed": "a checkpoint failed {times}",
    "checkpoint_damaged": "a checkpoint was damaged {times}",
    "loss_spike": "the loss rose {times}",
    "stopped": "stopped {times}",
    "suspended": "stood still {times}",
    "slept": "the machine slept {times}",
    "clock_changed": "the clock was changed {times}",
}
"""Other logged events that count as incidents -> their text in the summary."""


class Incident(Stored):
    what: str
    """restart, rollback, update_skipped, or the name of a logged event."""
    step: int | None
    unix_time: float | None
    """Time of the incident; None if the log has no time of day."""
    text: str


class Incidents(Stored):
    model_config = ConfigDict(populate_by_name=True)

    summary: str
    """One line about the incidents of the whole run."""
    entries: list[Incident] = Field(alias="happenings")
    """Incidents in log order; updates skipped between two process starts are one entry."""


def list_incidents(recorded: RunHistory) -> Incidents:
    """Return the restarts, rollbacks, skipped updates and other incidents of a run."""
    entries: list[Incident] = []
    skipped: list[Incident] = []
    skipped_at = 0
    since_start: list[Event | End] = []
    number, start = -1, recorded.starts[0]
    for process, line in recorded.milestones:
        if isinstance(line, Start):
            number, start = number + 1, line
            _insert_skipped(entries, skipped, skipped_at)
            loss = recorded.lost_work[number]
            if line.continues:
                _add_rollback(entries, line, loss)
            elif process > 0:
                text = _describe_restart(recorded, process, since_start, loss)
                entries.append(_incident("restart", start, line.first_step, line, text))
            since_start = []
            continue
        since_start.append(line)
        if not isinstance(line, Event):
            continue
        if line.what == UPDATE_SKIPPED:
            skipped_at = skipped_at if skipped else len(entries)
            skipped.append(_incident(UPDATE_SKIPPED, start, line.step, line, line.text))
        elif line.what in _SUMMARIES or line.what == ROLLBACK:
            entries.append(_incident(line.what, start, line.step, line, line.text))
    _insert_skipped(entries, skipped, skipped_at)
    return Incidents(summary=_summary(recorded, entries), entries=entries)


def skipped_updates(recorded: RunHistory) -> int:
    """Count the updates skipped for non-finite values, including those of repeated steps."""
    return sum(event.what == UPDATE_SKIPPED for event in recorded.events)


def rollbacks(recorded: RunHistory) -> int:
    """Count the rollbacks to a checkpoint."""
    return max(start.rollbacks or 0 for start in recorded.starts)


def _incident(what: str, start: Start, step: int | None, line: Line, text: str) -> Incident:
    """Create an incident from a line of the process that `start` began."""
    began, elapsed = process_began(start), line.elapsed_seconds
    at = None if began is None or elapsed is None else began + elapsed
    return Incident(what=what, step=step, unix_time=at, text=text)


def _insert_skipped(entries: list[Incident], skipped: list[Incident], place: int) -> None:
    """Insert the skipped updates as one entry at index `place`, and clear `skipped`."""
    if not skipped:
        return
    entry = skipped[0]
    if len(skipped) > 1:
        steps = [each.step for each in skipped if each.step is not None]
        last = f", the last at step {steps[-1]:,}" if steps else ""
        text = f"{len(skipped):,} updates were skipped{last}: non-finite loss or gradient."
        entry = entry.model_copy(update={"text": text})
    entries.insert(place, entry)
    skipped.clear()


def _add_rollback(entries: list[Incident], start: Start, loss: LostWork) -> None:
    """Add the steps lost in a rollback to its logged event, or add an entry if there is none."""
    lost = _repeated(loss)
    if entries and entries[-1].what == ROLLBACK:
        event = entries.pop()
        text = f"{event.text} {lost[0].upper()}{lost[1:]}."
        entries.append(event.model_copy(update={"text": text}))
    else:
        text = f"Rolled back to step {start.first_step:,}; {lost}."
        entries.append(_incident(ROLLBACK, start, start.first_step, start, text))


def _describe_restart(recorded: RunHistory, process: int, before: Sequence[Event | End], loss: LostWork) -> str:
    start, gap = recorded.processes[process][0], recorded.gap_seconds[process - 1]
    by = ""
    if start.source == "train":
        by = " by --supervise" if start.restart else " by hand"
    when = "at an unknown time," if gap is None else format_seconds(gap)
    return f"Restarted{by}, {when} after the last process {_ending(before)}; {_repeated(loss)}."


def _ending(lines: Sequence[Event | End]) -> str:
    """Return a text on how a process ended, from its events and end line."""
    for line in lines:
        if isinstance(line, End):
            how = {"finished": "had finished", "stopped": "was stopped", "failed": "failed"}
            return how[line.status] + (f" ({line.reason})" if line.reason else "")
    if lines and isinstance(lines[-1], Event) and lines[-1].what == ROLLBACK:
        return "ended to roll back"
    if any(isinstance(line, Event) and line.what == "hung" for line in lines):
        return "hung"
    return "died without an end line: killed, crashed, or without power"


def _repeated(loss: LostWork) -> str:
    if not loss.steps:
        return "no step was repeated"
    took = f" ({format_seconds(loss.seconds)})" if loss.seconds else ""
    return f"{loss.steps:,} step{'s were' if loss.steps > 1 else ' was'} repeated{took}"


def _summary(recorded: RunHistory, entries: list[Incident]) -> str:
    if not entries:
        if not recorded.starts[0].logs_all:
            return "The log has one process; it would not record other incidents."
        return "Nothing: one process, no update was skipped, and no checkpoint lost."
    counted = Counter(entry.what for entry in entries)
    parts = []
    if restarts := counted["restart"]:
        supervised = sum(bool(starts[0].restart) for starts in recorded.processes[1:])
        by = f", {supervised} of them by --supervise" if supervised else ""
        parts.append(f"restarted {_times(restarts)}{by}")
    if skipped := skipped_updates(recorded):
        parts.append(f"{skipped:,} update{'s' * (skipped > 1)} skipped")
    if back := counted[ROLLBACK]:
        parts.append(f"rolled back {_times(back)}")
    if recorded.lost_steps:
        parts.append(_repeated(LostWork(recorded.lost_steps, recorded.lost_seconds)))
    gaps = [seconds for seconds in recorded.gap_seconds if seconds is not None]
    if gaps:
        unknown = len(recorded.gap_seconds) - len(gaps)
        more = f", and {unknown} unknown time{'s' * (unknown > 1)}" if unknown else ""
        parts.append(f"no process ran for {format_seconds(sum(gaps))}{more}")
    parts += [words.format(times=_times(counted[what])) for what, words in _SUMMARIES.items() if counted[what]]
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"
