"""Names and values as other programs and other files write them: each is answered with ours."""

import subprocess
from pathlib import Path

import pytest
from commands import DEMO, ROOT, run_here

from nanogauge.config import CONFIG_KEYS, load_config
from nanogauge.errors import BadInput
from nanogauge.names import foreign_names

TEXT = DEMO.read_text()


def refusal(script: str, *arguments: object) -> str:
    done = run_here(script, *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--batch_size 12", "--train.micro-batch 12 (train.micro_batch)"),
        ("--batch-size=12", "--train.micro-batch 12"),
        ("batch_size=12", "--train.micro-batch 12"),
        ("--lr 1e-3", "--optimizer.learning-rate 1e-3"),
        ("--learning_rate 1e-3", "--optimizer.learning-rate 1e-3"),
        ("--gradient_accumulation_steps 4", "--train.grad-accum 4"),
        ("--train.batch-size 4", "--train.micro-batch 4"),
        ("--optimizer.lr 1e-3", "--optimizer.learning-rate 1e-3"),
        ("--eval_interval 5", "--train.eval-every 5"),
        ("--max_iters=5", "--train.max-steps 5"),
        ("--compile=False", "--run.compile False"),
        ("--n_layer 3", "--model.n-layer 3"),
        ("--warmup_iters 9", "--optimizer.warmup-steps 9"),
        ("--per_device_train_batch_size 8", "--train.micro-batch 8"),
        ("--n_positions 128", "--model.block-size 128"),
        ("--num_train_epochs 3", "--train.max-steps 3 (train.max_steps)? epochs x tokens"),
        ("--bf16 True", "--run.dtype bfloat16 (run.dtype)?"),
        ("--resume_from_checkpoint x", "--resume auto continues from the newest checkpoint"),
    ],
)
def test_the_flags_of_other_programs_are_answered_with_ours(given: str, meant: str) -> None:
    assert meant in refusal("train.py", DEMO, *given.split())


def test_flags_of_commands_and_files_of_other_names_are_answered_too() -> None:
    assert "did you mean --tokens?" in refusal("sample.py", "runs/x", "--max_new_tokens=9")
    assert "did you mean --workers?" in refusal("prepare_fineweb.py", "--num_proc", "8")
    assert f"did you mean {DEMO}?" in refusal("train.py", DEMO.with_suffix(""))


def test_all_unknown_flags_are_answered_at_once() -> None:
    said = refusal("train.py", DEMO, "--batch_size", "12", "--lr=1e-3", "--block_size", "64")
    for meant in ("--train.micro-batch 12", "--optimizer.learning-rate 1e-3", "block-size 64"):
        assert meant in said


@pytest.mark.parametrize(
    ("right", "wrong", "meant"),
    [
        ("micro_batch =", "batch_size =", ["train.batch_size; did you mean train.micro_batch?"]),
        ("learning_rate =", "lr =", ["optimizer.lr; did you mean optimizer.learning_rate?"]),
        ("max_steps =", "max_iters =", ["train.max_iters; did you mean train.max_steps?"]),
        ("[run]", "hidden_size = 8\nepochs = 2\n[run]", ["mean model.n_embd?", "train.max_steps:"]),
        ("[run]", "what = 8\n[run]", ["unknown key what; --help-config lists the keys"]),
        ('device = "cpu"', 'device = "cuda:0"', ["not 'cuda:0'; did you mean cuda?"]),
        ('dtype = "float32"', 'dtype = "bf16"', ["not 'bf16'; did you mean bfloat16?"]),
        ('device = "cpu"', "compile = False", ["compile = False; write true or false"]),
        ("beta2 = 0.99", "beta2 = .99", ["beta2 = .99; write digits on both sides"]),
        ('device = "cpu"', "device = cpu", ["device = cpu; write text in quotes"]),
        ("log_every = 50", "log_every = 50,", ["log_every = 50,; no comma ends a line"]),
        ("max_steps = ", "log_every = 64k\nmax_steps = ", ["log_every = 64k; write the number"]),
    ],
)
def test_the_keys_and_values_of_other_files_are_answered_with_ours(
    tmp_path: Path, right: str, wrong: str, meant: list[str]
) -> None:
    assert right in TEXT
    path = tmp_path / "c.toml"
    path.write_text(TEXT.replace(right, wrong, 1))
    with pytest.raises(BadInput) as refused:
        load_config(path)
    for words in meant:
        assert words in str(refused.value)


@pytest.mark.parametrize(
    ("flag", "wrong"),
    [
        ("--run.compile False", None),
        ("--run.compile TRUE", None),
        ("--optimizer.learning-rate .001", None),
        ("--optimizer.learning-rate 1e-3", None),
        ("--train.max-steps 1e3", None),
        ("--train.eval-every 64k", "not '64k'; write 64000 or 65536"),
        ("--data.tokens 3.5B", "not '3.5B'; write 3500000000 or 3758096384"),
        ("--data.tokens None", None),
        ("--model.block-size 4k", "not '4k'; write 4000 or 4096"),
        ("--run.compile maybe", "run.compile: input should be a valid boolean, not 'maybe'"),
    ],
)
def test_values_may_be_spelled_as_in_python(flag: str, wrong: str | None) -> None:
    done = run_here("plan.py", DEMO, "--gpu", "RTX 4070", *flag.split())
    assert done.returncode == (0 if wrong is None else 2), done.stderr
    assert (wrong or "") in done.stderr


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_a_file_of_any_editor_is_read_or_named(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(f"# größer\n{TEXT}".encode(encoding))
    if encoding.startswith("utf-8"):
        assert load_config(path) == load_config(DEMO)
    else:
        with pytest.raises(BadInput, match="UTF-16; save it as|no UTF-8; save it as"):
            load_config(path)


def test_every_name_of_the_tables_leads_to_a_key_that_exists() -> None:
    wrong = [name for name, key in foreign_names().items() if key.split(":")[0] not in CONFIG_KEYS]
    assert [name for name in wrong if not foreign_names()[name].startswith(":")] == []


@pytest.mark.parametrize("script", [path.name for path in ROOT.glob("*.py")])
def test_help_fits_a_screen_and_names_no_flag_twice(script: str) -> None:
    if script == "model.py":
        return
    done: subprocess.CompletedProcess[str] = run_here(script, "--help")
    lines = done.stdout.splitlines()
    assert len(lines) <= 60
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    assert len(flags) == len(set(flags))
    if "--help-config" in done.stdout:
        words = run_here(script, "--help-config").stdout
        for key in CONFIG_KEYS:
            assert words.count(f"  --{key.replace('_', '-')} ") == 1
        for text in ("batch size", "learning rate", "gradient accumulation", "default 0.0006"):
            assert text in words
