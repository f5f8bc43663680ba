"""Fit the constants of the final loss to published runs, each near its prior.

python bench/fit_loss.py LOSS_RUNS.csv [--curves LOSS_CURVES.csv] [--write]

Uses the rows with use = fit. --write rewrites the constants in nanogauge/loss.toml.
"""

import csv
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from results import Bench, Result, result

from nanogauge.errors import BadInput
from nanogauge.prediction import loss as loss_module
from nanogauge.prediction.forecast import forecast_loss
from nanogauge.prediction.loss import (
    CONSTANTS,
    DATASETS,
    VALUES,
    LossEstimate,
    Recipe,
    Values,
    data_level,
    effective_tokens,
    multipliers,
    scaling_law,
)

# Mean and standard deviation of each prior; those of factors are of their logarithm.
PRIORS: dict[str, tuple[float, float]] = {
    "irreducible": (2.2, 0.3),
    "fineweb_edu": (-0.195, 0.05),
    "openwebtext": (-0.30, 0.15),
    "parameter_scale": (math.log(0.77), 0.15),
    "parameter_exponent": (0.35, 0.02),
    "token_scale": (math.log(0.45), 0.15),
    "token_exponent": (0.35, 0.02),
    "tuned_rotary": (math.log(1.6), 0.3),
    "muon": (math.log(1.45), 0.25),
    "modern_blocks": (math.log(1.2), 0.15),
    "untied_head": (math.log(1.3), 0.2),
    "shortcuts": (math.log(1.2), 0.15),
}
ADDITIVE = ("irreducible", "fineweb_edu", "openwebtext", "parameter_exponent", "token_exponent")
LABORATORY_SIGMA = 0.015
"""Spread of one recipe between laboratories in nats; larger residuals weigh less (Huber)."""
SHARES = (0.15, 0.25, 0.35, 0.5, 0.75)
COLUMNS = (
    "id use source dataset val_tokens tokenizer metric n_layer n_embd context tied params_n_m "
    "params_total_m tokens_b unique_tokens_b batch_tokens recipe schedule final_val_loss "
    "final_train_loss note"
)


@dataclass(frozen=True)
class PublishedLoss:
    """A published run with its final loss; None for unpublished figures."""

    id: str
    use: str
    source: str
    dataset: str
    tokenizer: str
    metric: str
    layers: int | None
    width: int | None
    context: int | None
    recipe: Recipe | None
    parameters: float | None
    """N, or all parameters where a grid does not give N."""
    tokens: float | None
    unique_tokens: float | None
    batch_tokens: float | None
    end_rate: float
    validation_tokens: float | None
    loss: float | None


def read_losses(path: Path) -> list[PublishedLoss]:
    return [_published(row) for row in _rows(path, COLUMNS)]


def _rows(path: Path, columns: str) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"cannot read {path}: {error}") from error
    missing = [name for name in columns.split() if name not in (reader.fieldnames or ())]
    if missing:
        raise BadInput(f"{path} lacks the columns {', '.join(missing)}")
    return rows


def _number(text: str, unit: float = 1.0) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value * unit if math.isfinite(value) else None


def _published(row: dict[str, str]) -> PublishedLoss:
    size = re.fullmatch(r"~?([\d.]+)([kMG]?)", row["val_tokens"])
    validation = float(size[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[size[2]] if size else None
    loss, train_loss = _number(row["final_val_loss"]), _number(row["final_train_loss"])
    if validation is not None and validation < 1e6 and train_loss is not None:
        loss, validation = train_loss, None  # it covers more tokens, without dropout
    dump = re.fullmatch(r"([\w-]+)( (CC-MAIN|sample)\S*)?", row["dataset"])
    end = re.search(r"\bto (\d[\d.]*)", row["schedule"])
    layers, width, context = (_number(row[name]) for name in ("n_layer", "n_embd", "context"))
    return PublishedLoss(
        id=row["id"],
        use=row["use"],
        source=row["source"],
        dataset=dump[1] if dump else row["dataset"],
        tokenizer=row["tokenizer"],
        metric=row["metric"],
        layers=int(layers) if layers else None,
        width=int(width) if width else None,
        context=int(context) if context else None,
        recipe=_recipe(row),
        parameters=_number(row["params_n_m"], 1e6) or _number(row["params_total_m"], 1e6),
        tokens=_number(row["tokens_b"], 1e9),
        unique_tokens=_number(row["unique_tokens_b"], 1e9),
        batch_tokens=_number(row["batch_tokens"]),
        end_rate=float(end[1].rstrip(".")) if end else 0.0,
        validation_tokens=validation,
        loss=loss,
    )


def _recipe(row: dict[str, str]) -> Recipe | None:
    """Return the parts of a recipe; None for an unknown family."""
    name = re.fullmatch(r"(gpt2|modern)-(adamw|muon|soap)(-untied|-skips)?", row["recipe"])
    if name is None:
        return None
    modern, muon, untied = name[1] == "modern", name[2] != "adamw", row["tied"] == "no"
    return Recipe(
        tuned_rotary=modern or muon,
        muon=muon,
        modern_blocks=modern and (muon or untied or "ReLU2" in row["note"]),
        untied_head=untied,
        shortcuts=name[3] == "-skips",
    )


def usable(runs: Sequence[PublishedLoss]) -> list[PublishedLoss]:
    """Return the runs with use = fit and every figure that the law needs."""
    return [
        run
        for run in runs
        if run.use == "fit"
        and run.dataset in DATASETS
        and run.recipe is not None
        and None not in (run.parameters, run.tokens, run.loss)
    ]


def law(run: PublishedLoss, values: Values) -> float:
    """Return the loss of a run by the scaling law."""
    assert run.parameters is not None and run.tokens is not None
    seen = effective_tokens(run.tokens, run.unique_tokens or run.tokens, values)
    multiplier = multipliers(run.recipe, values)[1]
    return data_level(run.dataset, values) + scaling_law(run.parameters, seen, multiplier, values)


def fit(runs: Sequence[PublishedLoss]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the values and standard deviations of the constants in PRIORS, by least squares."""
    names = list(PRIORS)
    prior, spread = (np.array(column) for column in zip(*PRIORS.values(), strict=True))
    actual = np.array([run.loss for run in runs])

    def values(x: np.ndarray) -> dict[str, float]:
        pairs = zip(names, x.tolist(), strict=True)
        return VALUES | {n: v if n in ADDITIVE else math.exp(v) for n, v in pairs}

    def predicted(x: np.ndarray) -> np.ndarray:
        constants = values(x)
        return np.array([law(run, constants) for run in runs])

    x, curvature = prior.copy(), np.diag(spread**-2)
    for _ in range(8):
        at_x = predicted(x)
        residual = at_x - actual
        columns = [(predicted(x + h) - at_x) / 1e-4 for h in 1e-4 * np.eye(len(names))]
        jacobian = np.stack(columns, axis=1)
        huber = np.maximum(1.0, np.abs(residual) / (1.5 * LABORATORY_SIGMA))
        weight = 1 / huber / LABORATORY_SIGMA**2
        curvature = jacobian.T @ (weight[:, None] * jacobian) + np.diag(spread**-2)
        step = jacobian.T @ (weight * residual) + (x - prior) / spread**2
        x = x - np.linalg.solve(curvature, step)
    fitted = values(x)
    deviations = np.sqrt(np.diag(np.linalg.inv(curvature))).tolist()
    sigmas = zip(names, deviations, strict=True)
    return fitted, {n: s if n in ADDITIVE else s * fitted[n] for n, s in sigmas}


@dataclass(frozen=True)
class Curve:
    """Evaluations of a run and its learning-rate schedule."""

    id: str
    source: str
    schedule: str
    total_steps: int
    warmup_steps: int
    decay_steps: int
    end_rate: float
    steps: tuple[float, ...]
    losses: tuple[float, ...]

    def rate_share(self, step: float) -> float:
        """Return the learning rate of a step relative to its peak."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.schedule == "wsd":
            share = min(1.0, (self.total_steps - step) / max(1, self.decay_steps))
        else:
            done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
            share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
            share = 1 - done if self.schedule == "linear" else share
        return self.end_rate + (1 - self.end_rate) * max(0.0, share)

    def forecast(self, share: float, values: Values) -> LossEstimate | None:
        """Forecast the final loss from the evaluations of a share of the steps."""
        count = sum(step <= share * self.total_steps for step in self.steps)
        estimate = forecast_loss(
            self.steps[:count], self.losses[:count], self.rate_share, self.total_steps, self.warmup_steps, values
        )
        return estimate if isinstance(estimate, LossEstimate) else None


CURVE_COLUMNS = "id source steps_total schedule warmup_steps decay_steps min_lr_share step loss"


def read_curves(path: Path) -> list[Curve]:
    by_id: dict[str, list[dict[str, str]]] = {}
    for row in _rows(path, CURVE_COLUMNS):
        by_id.setdefault(row["id"], []).append(row)
    try:
        return [_curve(rows) for rows in by_id.values()]
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from error


def _curve(rows: list[dict[str, str]]) -> Curve:
    first = rows[0]
    points = sorted((float(row["step"]), float(row["loss"])) for row in rows)
    return Curve(
        id=first["id"].replace(" ", "-"),
        source=first["source"],
        schedule="wsd" if first["schedule"] == "trapezoid" else first["schedule"],
        total_steps=int(float(first["steps_total"])),
        warmup_steps=int(float(first["warmup_steps"] or 0)),
        decay_steps=int(float(first["decay_steps"] or 0)),
        end_rate=float(first["min_lr_share"] or 0),
        steps=tuple(step for step, _ in points),
        losses=tuple(loss for _, loss in points),
    )


class CurveFit:
    """Grid search for the constants of the forecast of one kind of schedule."""

    exponents = np.arange(0.1, 1.65, 0.1)
    rate_losses = np.arange(0, 0.305, 0.02)

    def __init__(self, kind: str, curves: Sequence[Curve]) -> None:
        self.kind = kind
        self.curves = [c for c in curves if (c.schedule == "wsd") == (kind == "wsd")]
        # A forecast is linear in the rate loss, so two of them give all.
        self._errors = [self._errors_of(curve) for curve in self.curves]

    def _errors_of(self, curve: Curve) -> np.ndarray:
        """Return forecast errors by share, exponent and rate loss."""
        rows = []
        for share in SHARES:
            row = []
            for exponent in self.exponents:
                constants = {f"{self.kind}_exponent": exponent, f"{self.kind}_rate_loss": 0.0}
                zero = curve.forecast(share, VALUES | constants)
                one = curve.forecast(share, VALUES | constants | {f"{self.kind}_rate_loss": 1.0})
                if zero is not None and one is not None:
                    slope = one.expected - zero.expected
                    row.append(zero.expected + slope * self.rate_losses - curve.losses[-1])
            if row:
                rows.append(row)
        return np.array(rows).reshape(-1, len(self.exponents), len(self.rate_losses))

    def fit(self, used: Callable[[Curve], bool] = lambda curve: True) -> dict[str, float]:
        """Return the constants with the least mean error, each error clipped at 0.08."""
        pairs = zip(self.curves, self._errors, strict=True)
        errors = np.concatenate([errors for curve, errors in pairs if used(curve)])
        cost = np.minimum(np.abs(errors), 0.08).mean(axis=0)
        row, column = np.unravel_index(int(cost.argmin()), cost.shape)
        return {
            f"{self.kind}_exponent": float(self.exponents[row]),
            f"{self.kind}_rate_loss": float(self.rate_losses[column]),
        }


def _rewrite(text: str, values: Values, sigmas: Values, names: dict[str, Sequence[str]]) -> str:
    """Return the text of loss.toml with these constants and names of runs."""
    for name in sigmas:
        numbers = f"value = {values[name]:.4g}, sigma = {sigmas[name]:.1g}"
        row = rf"(?m)^({name} = \{{ )value = [^,]+, sigma = [^,]+(?=,)"
        text, changed = re.subn(row, rf"\g<1>{numbers}", text)
        assert changed == 1, name
    for name, ids in names.items():
        lines = textwrap.fill(" ".join(ids), 98, break_on_hyphens=False)
        listed = f'{name} = """\n{lines}\n"""'
        text, changed = re.subn(rf'(?m)^{name} = """[^"]*"""', listed, text)
        assert changed == 1, name
    return text


def measure(args: Any) -> list[Result]:
    runs = usable(read_losses(args.runs))
    if not runs:
        raise BadInput(f"{args.runs} has no row with use = fit that the law can use")
    values, sigmas = fit(runs)
    names: dict[str, Sequence[str]] = {"runs": [run.id for run in runs]}
    if args.curves is not None:
        curves = read_curves(args.curves)
        for kind in ("cosine", "wsd"):
            constants = CurveFit(kind, curves).fit()
            values |= constants
            steps = (np.diff(CurveFit.exponents)[0], np.diff(CurveFit.rate_losses)[0])
            sigmas |= dict(zip(constants, (float(step) for step in steps), strict=True))
        names["curves"] = [curve.id for curve in curves]
    if args.write:
        path = Path(loss_module.__file__).parents[1] / "loss.toml"
        path.write_text(_rewrite(path.read_text(), values, sigmas, names))
    results = []
    for name, sigma in sigmas.items():
        interval = [values[name] - sigma, values[name] + sigma]
        row = result(name, CONSTANTS[name].source, interval, None, values[name])
        results.append(row | {"n": len(runs)})
    return results


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_argument("runs", type=Path, help="CSV of published final losses")
    bench.add_argument("--curves", type=Path, help="CSV of published curves")
    bench.add_argument("--write", action="store_true", help="rewrite the constants in loss.toml")
    bench.run(measure)
