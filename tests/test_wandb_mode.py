"""W&B's own switches are obeyed and named; a flag overrules them."""

from pathlib import Path

import pytest
from commands import DEMO, TINY, run
from wandb_stub import WandbStub

from nanogauge.sinks.mode import switched_off
from trainer.run.flags import read_command

STORED = {  # by `wandb disabled`, `wandb offline`, and their older versions
    "mode = disabled": "disabled",
    "mode = offline": "offline",
    "disabled = true": "disabled",
    "mode = online": None,
    "entity = me": None,
}
VARIABLES: list[tuple[dict[str, str], str | None]] = [
    ({"WANDB_MODE": "disabled"}, "disabled"),
    ({"WANDB_MODE": "Offline"}, "offline"),
    ({"WANDB_MODE": "dryrun"}, "offline"),
    ({"WANDB_MODE": "online"}, None),
    ({"WANDB_DISABLED": "true"}, "disabled"),
    ({"WANDB_DISABLED": "1", "WANDB_MODE": "online"}, "disabled"),
    ({"WANDB_DISABLED": "false"}, None),
    ({}, None),
]


@pytest.mark.parametrize(("variables", "off"), VARIABLES)
@pytest.mark.parametrize(
    ("given", "flags"), [(None, []), (None, ["--wandb.mode=auto"]), ("online", ["--wandb.mode=online"])]
)
def test_a_variable_switches_the_mirror_off_unless_a_flag_overrules_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    off: str | None,
    given: str | None,
    flags: list[str],
) -> None:
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    text = DEMO.read_text().replace('mode = "disabled"', 'mode = "auto"')
    (tmp_path / "config.toml").write_text(text)
    _, config = read_command([str(tmp_path / "config.toml"), *flags], "")
    assert config.wandb.mode == (given or off or "auto")


@pytest.mark.parametrize("folder", ["wandb", ".config/wandb"])
@pytest.mark.parametrize("line", STORED)
def test_what_the_wandb_command_stored_is_obeyed_below_the_variables(tmp_path: Path, line: str, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "settings").write_text(f"[default]\n{line}\n")
    places = {"WANDB_DIR": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path / ".config/wandb")}
    found = switched_off(places)
    assert (found and found[0]) == STORED[line]
    assert found is None or str(tmp_path / folder) in found[1]
    assert switched_off({**places, "WANDB_MODE": "online"}) is None


def test_nothing_is_sent_of_a_run_that_wandb_mode_switches_off(tmp_path: Path) -> None:
    with WandbStub() as server:
        variables = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
        variables |= {"WANDB_MODE": "disabled"}
        flags = ["--train.max-steps=2", f"--run.out={tmp_path}"]
        text = DEMO.read_text().replace('mode = "disabled"', 'mode = "auto"')
        (tmp_path / "config.toml").write_text(text)
        checked = run("plan.py", "--doctor", tmp_path / "config.toml", *flags, **variables)
        assert "off: WANDB_MODE=disabled" in checked.stdout
        done = run("train.py", tmp_path / "config.toml", *TINY, *flags, **variables)
        assert done.returncode == 0, done.stderr
        refused = run("report.py", "--wandb", tmp_path / "demo", **variables)
        assert refused.returncode == 2 and "is switched off (WANDB_MODE=disabled)" in refused.stderr
        assert server.asked == []
