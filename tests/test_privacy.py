"""What a run writes contains no key, token, password or path of the home folder."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from commands import DEMO, run, train_tiny
from hypothesis import given
from hypothesis import strategies as st

from nanogauge.files import expand_home, scrubbed, without_keys, without_secrets

KEY = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
PASSWORD = "hunter2hunter2"
HUB = f"https://user:{PASSWORD}@127.0.0.1:9"
STAGED = b"/.local/share/wandb/artifacts/staging/"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "user"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", HUB)
    monkeypatch.delenv("XDG_DATA_HOME")
    return home


def test_no_file_of_a_run_holds_a_key_or_the_home_folder(home: Path) -> None:
    shards = home / "shards"
    shards.mkdir()
    for split in ("train", "val"):
        (np.arange(20_000) % 250).astype("<u2").tofile(shards / f"{split}.bin")
    flags = [f"--data.path={shards}", "--data.embedded=false", "--wandb.mode=offline"]
    flags += [f'--train.prompts=["{home}/prompt {KEY} {HUB}"]', "--train.max-steps=4"]
    done = train_tiny(home / "runs", *flags)
    assert done.returncode == 0, done.stderr
    folder = home / "runs" / "demo"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len([path for path in files if "wandb" in path.parts]) > 5
    for path in files:
        data = path.read_bytes()
        if path.suffix == ".wandb":  # for `wandb sync`, which does not upload it
            data = data.replace(str(home).encode() + STAGED, b"")
        for secret in (KEY, TOKEN, PASSWORD, str(home)):
            assert secret.encode() not in data, (path, secret)
    config = (folder / "config.toml").read_text()
    assert 'path = "~/shards"' in config and 'out = "~/runs"' in config
    assert "~/runs" in json.loads((folder / "machine.json").read_text())["command"]

    again = run("train.py", folder / "config.toml", "--resume=auto", "--wandb.mode=disabled")
    assert again.returncode == 0, again.stderr
    assert not (home / "~").exists() and len(list(home.glob("runs/*"))) == 1
    report = run("report.py", folder, "--json")
    assert report.returncode == 0 and str(home) not in report.stdout


def test_an_error_shows_no_password_or_token(home: Path) -> None:
    done = run("train.py", DEMO, f"--run.out={HUB}\n\x1b[2J/x", f"--run.name={TOKEN}/")
    assert done.returncode == 2
    assert PASSWORD not in done.stderr and TOKEN not in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_linked_home_folder_is_hidden_under_both_names(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = home.parent / "link"
    link.symlink_to(home)
    monkeypatch.setenv("HOME", str(link))
    assert without_secrets(f"{link}/a and {home}/b") == "~/a and ~/b"


def test_only_the_home_folder_itself_becomes_a_tilde(home: Path) -> None:
    for other in (f"{home}na/x", f"/mnt{home}/x", f"{home}-old", f"{home}.old/x"):
        assert without_secrets(other) == other
    assert without_secrets(f"in {home}.") == "in ~."
    assert without_secrets(f'"{home}"') == '"~"'
    assert expand_home(without_secrets(f"{home}/a b")) == home / "a b"


@given(text=st.text(), around=st.text())
def test_a_key_is_hidden_wherever_it_stands(text: str, around: str) -> None:
    """And other text stays unchanged."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_API_KEY", KEY)
        environment.setenv("HF_TOKEN", "")
        environment.setenv("HOME", "/home/user")
        for inside in (KEY, "x".join([KEY, KEY])):
            hidden = scrubbed({"a": [f"{text}{inside}{around}"]})["a"][0]
            assert KEY not in hidden
        if not re.search("://|/home|hf_|wandb_v", text):
            assert without_keys(text) == without_secrets(text) == text
