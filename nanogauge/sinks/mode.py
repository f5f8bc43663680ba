"""Whether a run is sent to Weights & Biases: its own switches are obeyed, unless a flag overrules.

The switches are WANDB_DISABLED, WANDB_MODE, and what `wandb disabled` and `wandb offline` store.
"""

import configparser
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from nanogauge.config import Config, config_overrides, given_config

Mode = Literal["auto", "online", "offline"]
Off = Literal["disabled", "offline"]
_OFF: dict[str, Off] = {"disabled": "disabled", "offline": "offline", "dryrun": "offline"}
_FALSE = ("", "0", "false", "no", "off", "n", "f")


def switched_off(environment: Mapping[str, str] = os.environ) -> tuple[Off, str] | None:
    """Return "disabled" or "offline" and the switch that says so; None if W&B may send the run."""
    if (value := environment.get("WANDB_DISABLED", "")).lower() not in _FALSE:
        return "disabled", f"WANDB_DISABLED={value}"
    if value := environment.get("WANDB_MODE", ""):
        off = _OFF.get(value.lower())
        return None if off is None else (off, f"WANDB_MODE={value}")
    root = Path(environment.get("WANDB_DIR") or ".")
    home = Path(environment.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb")
    for path in (root / "wandb" / "settings", root / ".wandb" / "settings", home / "settings"):
        stored = configparser.ConfigParser(interpolation=None)
        try:
            stored.read_string(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, configparser.Error):
            continue
        if value := stored.get("default", "mode", fallback=""):
            off = _OFF.get(value.lower())
            return None if off is None else (off, f"`wandb {off}`, stored in {path}")
        if stored.get("default", "disabled", fallback="").lower() not in _FALSE:
            return "disabled", f"`wandb disabled`, stored in {path}"
    return None


def obeying_config(namespace: Namespace) -> Config | None:
    """Return the configuration of a command line; without a flag, wandb.mode obeys the switches."""
    config, switch = given_config(namespace), switched_off()
    by_flag = config_overrides(namespace).get("wandb", {}).get("mode", "auto") != "auto"
    if config is None or switch is None or by_flag or config.wandb.mode == "disabled":
        return config
    return config.model_copy(update={"wandb": config.wandb.model_copy(update={"mode": switch[0]})})
