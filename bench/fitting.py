"""Fit the constants of the step-time roofline to published runs: a hierarchical model.

python bench/fitting.py RUNS.csv [MORE.csv ...] [--write]

The log of a step's time is the roofline's, plus effects of the device class, the GPU and the source, each with a prior
around 0. The prior of a constant is in
nanogauge/constants.toml. A run therefore moves its own GPU most, its class less and the
others little. Prints each constant with its prior; --write writes the numbers to constants.toml.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from published_runs import PublishedRun, read_runs

import nanogauge
from nanogauge.cli import Parser, run_command
from nanogauge.files import package_table
from nanogauge.prediction.constants import PRIORS, Constants, Effect, effect_class, put
from nanogauge.prediction.step_time import predict_step_time

SPREADS: dict[str, float] = package_table("constants.toml")["spreads"]


def get(constants: Constants, name: str) -> float:
    owner, _, field = name.rpartition(".")
    return float(getattr(constants.classes[owner] if owner else constants, field))


# Standard deviations of the logs. The source's is heavy-tailed: some sources are odd altogether.
CLASS, CARD, SOURCE, RUN = 0.06, 0.09, 0.04, 0.04
ROUNDS, INNER_ROUNDS = 5, 4


@dataclass(frozen=True)
class Fit:
    constants: Constants
    source_effects: dict[str, float]
    """logs"""


def usable_runs(runs: Sequence[PublishedRun]) -> list[PublishedRun]:
    """Return the runs that a fit uses: 16-bit arithmetic, a time, a known class of device."""
    return [
        run
        for run in runs
        if run.work.element_bytes == 2
        and run.step_seconds is not None
        and predict_step_time(run.work, run.hardware) is not None
    ]


def fit(runs: Sequence[PublishedRun]) -> Fit:
    """Fit the constants of SPREADS and the effects of classes, cards and sources together.

    Robust least squares: a run far off counts less, and so does the prior of an odd source.
    """
    names, prior_constants = list(SPREADS), PRIORS
    prior = np.log([get(prior_constants, name) for name in names])
    stiff = np.log([SPREADS[name] for name in names]) ** -2.0
    actual = np.log([run.step_seconds or math.nan for run in runs])
    trust = np.array([_trust(run) for run in runs])
    groups = (
        (CLASS, [_class(run) for run in runs]),
        (CARD, [run.hardware.name for run in runs]),
        (SOURCE, [run.owner for run in runs]),
    )
    labels = [(kind, name) for kind, (_, of) in enumerate(groups) for name in sorted(set(of))]
    member = np.array([[name == o for o in groups[kind][1]] for kind, name in labels], float).T
    spreads = np.array([groups[kind][0] for kind, _ in labels])
    of_source = np.array([kind == 2 for kind, _ in labels])

    def predicted(logs: np.ndarray) -> np.ndarray:
        trial = put(prior_constants, dict(zip(names, np.exp(logs).tolist(), strict=True)))
        steps = [predict_step_time(run.work, run.hardware, trial) for run in runs]
        return np.log([step.seconds for step in steps if step is not None])

    x, effects = prior.copy(), np.zeros(len(labels))
    precision = np.eye(len(names) + len(labels))
    for _ in range(ROUNDS):
        here = predicted(x)
        moved = [(predicted(x + h) - here) / 0.01 for h in 0.01 * np.eye(len(names))]
        design = np.hstack([np.stack(moved, axis=1), member])
        for _ in range(INNER_ROUNDS):
            residual = here + member @ effects - actual
            weight = trust / (1 + (residual / (1.5 * RUN)) ** 2) / RUN**2
            odd = 1 + np.where(of_source, effects / spreads, 0.0) ** 2
            pull = np.concatenate([stiff, spreads**-2.0 / odd])
            away = np.concatenate([x - prior, effects])
            precision = design.T @ (weight[:, None] * design) + np.diag(pull)
            change = -np.linalg.solve(precision, design.T @ (weight * residual) + pull * away)
            step = np.clip(change[: len(names)], -0.2, 0.2)
            x, here = x + step, here + design[:, : len(names)] @ step
            effects = effects + change[len(names) :]
    values = dict(zip(names, np.exp(x).tolist(), strict=True))
    covariance = np.linalg.inv(precision)[len(names) :, len(names) :]
    found = _effects(runs, labels, effects, covariance)
    sources = {name: float(e) for (kind, name), e in zip(labels, effects, strict=True) if kind == 2}
    return Fit(replace(put(prior_constants, values), effects=_NOT_FITTED | found), sources)


# Classes whose runs no fit uses: fp32 alone (one run on Pascal), or on a CPU.
_NOT_FITTED = {"cpu": Effect(1.0, 0.3, 0), "pascal": Effect(2.0, 0.33, 1)}


def _class(run: PublishedRun) -> str:
    return effect_class(run.hardware.architecture, run.hardware.kind)


def _trust(run: PublishedRun) -> float:
    """Return the weight of a run: less where its row is unsure or leaves something out."""
    return (0.2 if run.confidence == "low" else 1.0) * (1.0 if run.complete else 0.5)


def _effects(
    runs: Sequence[PublishedRun], labels: list[tuple[int, str]], effects: np.ndarray, covariance: np.ndarray
) -> dict[str, Effect]:
    """Return the effects of classes, for a card without runs, and of each card with its class's."""
    place = {label: i for i, label in enumerate(labels)}
    found = {}
    for kind, name in labels:
        if kind == 0:
            members = [place[0, name]]
            owners = {run.owner for run in runs if _class(run) == name}
        elif kind == 1:
            of_class = next(_class(run) for run in runs if run.hardware.name == name)
            members = [place[0, of_class], place[1, name]]
            owners = {run.owner for run in runs if run.hardware.name == name}
        else:
            continue
        variance = covariance[np.ix_(members, members)].sum() + (CARD**2 if kind == 0 else 0.0)
        factor = math.exp(effects[members].sum())
        found[name] = Effect(round(factor, 3), round(math.sqrt(variance), 3), len(owners))
    return found


def write(constants: Constants, path: Path) -> None:
    """Replace the fitted numbers at the end of constants.toml."""
    values = "".join(f'"{name}" = {get(constants, name):.4g}\n' for name in SPREADS)
    effects = "".join(
        f'"{name}" = {{ factor = {e.factor}, spread = {e.spread}, sources = {e.sources} }}\n'
        for name, e in constants.effects.items()
    )
    head, _, _ = path.read_text(encoding="utf-8").partition("[fitted]")
    path.write_text(f"{head}[fitted]\n{values}\n[effects]\n{effects}", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="CSV of published runs")
    parser.add_argument("--write", action="store_true", help="write the numbers to constants.toml")
    given = parser.parse(arguments)
    runs = usable_runs([run for path in given.runs for run in read_runs(path)[0]])
    fitted = fit(runs)
    print(f"{len(runs)} runs from {len({run.owner for run in runs})} sources")
    for name in SPREADS:
        print(f"{name}: {get(PRIORS, name):.4g} -> {get(fitted.constants, name):.4g}")
    for name, effect in fitted.constants.effects.items():
        print(f"{name}: x {effect.factor} +- {effect.spread} ({effect.sources} sources)")
    for name, log in fitted.source_effects.items():
        print(f"source {name}: x {math.exp(log):.3f}")
    if given.write:
        write(fitted.constants, Path(nanogauge.__file__).with_name("constants.toml"))
    return 0


if __name__ == "__main__":
    run_command(main)
