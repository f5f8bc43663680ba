"""Predict power, energy, cost and CO2 of a run from the boards' share of their power limit, and time.

Energy is that of the boards alone, predicted here and measured in analysis/telemetry.py. Cost and CO2 add the rest of
the machine only if the configuration says what it draws.
"""

from typing import TypeVar

from nanogauge.quantities import Interval
from nanogauge.schema import Estimate, Hardware
from nanogauge.spec_parts import Cost

Amount = TypeVar("Amount", float, Interval)

# Mean board power over the limit in force while matrix products keep the board busy. Source: the traces of
# ml-energy/zeus (NSDI '23, summary_power_*.csv), BERT fine-tuning on V100, A40 and Quadro RTX 6000. At the board's own
# limit: 37 rows, median 0.90, of which 33 lie in 0.85-1.0; the rest are batches of 8 and 16, too small to keep the
# board busy. No GeForce figure is published.
SHARE_OF_OWN_LIMIT = Interval(0.85, 0.91, 1.0)
# Held below its own limit a board comes nearer to it, or above: 237 rows of the same traces, median 0.966, 97 % of them
# in this interval; an A40 at a third of its limit drew 0.98-1.11 of it.
SHARE_OF_LOWERED_LIMIT = Interval(0.89, 0.97, 1.04)
# GB10 waits for its memory: 55.1-62.8 of 140 W in eight trainings of 354 M parameters (DGX Spark, Megatron and plain
# PyTorch, nvidia-smi); another source saw 68 W.
SHARE_OF_STARVED_LIMIT = Interval(0.38, 0.42, 0.49)

BOARD_ALONE = "the board alone, not the machine at the wall"
BILLED = {"cost": "price_per_kwh", "co2_grams": "grams_co2_per_kwh"}
"""Row of a report -> field of Cost with its rate per kWh."""


def power_share(hardware: Hardware) -> Interval:
    """Return the mean power of a board that trains, as a share of the limit in force."""
    if hardware.architecture == "gb10":
        return SHARE_OF_STARVED_LIMIT
    own_limit, limit = hardware.board_power_watts, hardware.power_limit_watts
    lowered = limit is not None and own_limit is not None and limit < own_limit
    return SHARE_OF_LOWERED_LIMIT if lowered else SHARE_OF_OWN_LIMIT


def kwh_of(watts: Amount, seconds: Amount) -> Amount:
    """Return the energy at a mean power."""
    return watts * seconds / 3.6e6


def billed(cost: Cost, row: str, board_kwh: Amount, seconds: Amount) -> Amount:
    """Return the cost or CO2 of the boards, plus that of the rest of the machine if given."""
    rate: float = getattr(cost, BILLED[row])
    return (board_kwh + (cost.machine_watts or 0.0) * seconds / 3.6e6) * rate


def billing_formula(cost: Cost, row: str) -> str:
    """Describe in words how `billed` computes a row."""
    tariff = f"{getattr(cost, BILLED[row]):g} {cost.currency if row == 'cost' else 'g'}/kWh"
    if cost.machine_watts is None:
        return f"energy x {tariff}; {BOARD_ALONE}"
    return f"(energy of the board + {cost.machine_watts:g} W of the machine x time) x {tariff}"


def predict_energy(
    cost: Cost, hardware: Hardware, total: Estimate | None, gpus: int
) -> tuple[dict[str, Estimate], dict[str, str]]:
    """Return estimates of the boards' power, energy, cost and CO2, and reasons for missing ones."""
    limit = hardware.power_limit_watts
    if limit is None or total is None:
        reason = "no GPU" if hardware.kind == "cpu" else "the power limit or the time is not known"
        return {}, dict.fromkeys(("power_watts", "energy_kwh", *BILLED), reason)
    share = power_share(hardware)
    watts = gpus * share * limit
    kwh = kwh_of(watts, total)
    boards = f"{gpus} boards x " if gpus > 1 else ""
    power_formula = f"{boards}{share.low:g}-{share.high:g} of the {limit:g} W limit"
    predicted = {
        "power_watts": Estimate.of("power_watts", watts, power_formula, "traces of ml-energy/zeus"),
        "energy_kwh": Estimate.of("energy_kwh", kwh, "power x time", BOARD_ALONE),
    }
    source, missing = "rates and machine from the configuration", {}
    for row, rate in BILLED.items():
        if getattr(cost, rate) is None:
            missing[row] = f"cost.{rate} is not given"
        else:
            predicted[row] = Estimate.of(row, billed(cost, row, kwh, total), billing_formula(cost, row), source)
    return predicted, missing
