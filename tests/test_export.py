"""export.py writes a folder for transformers; GPT-2 weights are read from such a folder."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import tiktoken
import torch
from commands import run, succeed, train_tiny
from gpt2_shaped import gpt2_folder, hub_of_model
from gpt2_vocabulary import gpt2_vocabulary  # noqa: F401  (a fixture)
from test_model import fill_by_formula
from tiktoken_ext.openai_public import r50k_pat_str

from model import GPT
from nanogauge.config import ModelSection
from nanogauge.errors import BadInput
from trainer.checkpoints.pretrained import load_pretrained, open_pretrained, to_hugging_face
from trainer.data.tokenizer import byte_encoding, load_encoding
from trainer.evaluation.export import tokenizer_files
from trainer.evaluation.load import open_trained

TEXT = "An import statement, isn't it?  \n\t“Größe” 1,024 日本 🌍 <|x|>"


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "folder"
    done = succeed(run("export.py", tiny_run, f"--out={out}"))
    assert done.stdout.strip() == f"{out}  (step 12)"
    assert not done.stderr
    return out


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_transformers_gives_the_same_logits(bias: bool, gelu: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 37}
    model = GPT(ModelSection.model_validate({**shape, "bias": bias, "gelu": gelu})).eval()
    fill_by_formula(model)
    config, tensors = to_hugging_face(model)
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        ours = model.lm_head(model.hidden(tokens))
        torch.testing.assert_close(theirs(tokens).logits, ours, rtol=0, atol=1e-5)


def test_an_exported_run_works_in_transformers(exported: Path, tiny_run: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    tokens = tokenizer(TEXT)["input_ids"]
    assert tokens == byte_encoding().encode_ordinary(TEXT)
    assert tokenizer.decode(tokens) == TEXT
    assert tokenizer.eos_token_id == 256
    ours = open_trained(tiny_run, "newest", "cpu", half=False).model
    prompt = torch.tensor([tokens[:20]])
    with torch.no_grad():
        logits = ours.lm_head(ours.hidden(prompt))
        torch.testing.assert_close(theirs(prompt).logits, logits, rtol=0, atol=1e-5)
    made = theirs.generate(prompt, max_new_tokens=10)
    assert made.max() <= 256  # the rows that pad the vocabulary are never chosen


def test_the_model_card_has_the_figures_of_the_report(exported: Path, tiny_run: Path) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    report = json.loads((tiny_run / "report.json").read_text(encoding="utf-8"))
    table = [line for line in card.splitlines() if line.startswith("| ")][1:]
    measured = [row for row in report["rows"] if row["measured"] is not None]
    assert len(table) == len(measured)
    absent = next(line for line in card.splitlines() if line.startswith("Not measured:"))
    assert "Energy of the board" in absent
    loss = next(row for row in measured if row["id"] == "val_loss")["measured"]["value"]
    assert f"Its validation loss at that step: {loss:.4f} nats per token." in card


def test_a_folder_that_is_not_empty_is_left_alone(exported: Path, tiny_run: Path) -> None:
    before = (exported / "config.json").read_bytes()
    done = run("export.py", tiny_run, f"--out={exported}")
    assert done.returncode == 2
    assert "is not empty; remove it, or give another with --out." in done.stderr
    assert (exported / "config.json").read_bytes() == before


def small_encoding(pattern: str = r50k_pat_str, *more: bytes) -> tiktoken.Encoding:
    """Return an encoding of bytes and a few merges."""
    merged = [b"rt", b"th", b" t", b"ei", b"po", b"\xe6\x97", b" th", b"\xe6\x97\xa5", b" the", b"port", *more]
    ranks = {token: rank for rank, token in enumerate([*(bytes([i]) for i in range(256)), *merged])}
    return tiktoken.Encoding(
        "small", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )


def test_tokenizer_files_split_text_as_tiktoken_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    encoding = small_encoding()
    files = tokenizer_files(encoding, 64)
    assert files is not None
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, "the other port, then. " * 3):
        tokens = tokenizer(text)["input_ids"]
        assert tokens == encoding.encode_ordinary(text)
        assert tokenizer.decode(tokens) == text


def test_gpt2s_merges_are_found_from_its_ranks(
    gpt2_vocabulary: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_vocabulary))
    files = tokenizer_files(load_encoding("gpt2"), 1024)
    assert files is not None
    published = (path.read_bytes() for path in gpt2_vocabulary.iterdir())
    assert files["merges.txt"] == next(data for data in published if data.startswith(b"#version"))
    assert json.loads(files["vocab.json"])["<|endoftext|>"] == 50256


def test_a_vocabulary_that_gpt2s_files_cannot_hold_is_not_written() -> None:
    """Another split of words, or a token that no merge gives."""
    assert tokenizer_files(small_encoding(r"\w+|\W"), 64) is None
    assert tokenizer_files(small_encoding(r50k_pat_str, b"xyz"), 64) is None


def test_the_weights_of_a_gpt2_are_those_that_transformers_reads(tmp_path: Path) -> None:
    """With biases and the tanh GELU; with and without the prefix of the names."""
    transformers = pytest.importorskip("transformers")
    folder = gpt2_folder(tmp_path / "gpt2")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    ours = open_pretrained(str(folder), torch.device("cpu"))
    tokens = torch.arange(30).view(2, 15)
    with torch.no_grad():
        found = ours.lm_head(ours.hidden(tokens))
        torch.testing.assert_close(found, theirs(tokens).logits, rtol=0, atol=1e-5)


SHAPE = [
    *("--model.n-layer=2", "--model.n-head=2", "--model.n-embd=16", "--model.bias=true"),
    *("--model.gelu=tanh", "--model.vocab-size=264", "--train.max-steps=1"),
    *("--train.eval-every=1", "--optimizer.learning-rate=1e-30"),
    "--optimizer.min-learning-rate=0",
]


def test_a_run_begins_with_the_weights_of_a_gpt2_from_the_hub(tmp_path: Path) -> None:
    folder = gpt2_folder(tmp_path / "gpt2", vocab_size=257)
    with hub_of_model("gpt2", folder) as hub:
        home = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
        home["HF_HUB_DISABLE_XET"] = "1"
        done = train_tiny(tmp_path, *SHAPE, "--init-from=gpt2", **home)
    assert done.returncode == 0, done.stderr
    trained = open_trained(tmp_path / "demo", "newest", "cpu", half=False)
    assert trained.config.run.init_from == "gpt2"
    gpt2 = open_pretrained(str(folder), torch.device("cpu"))
    embedding = trained.model.embedding.weight
    torch.testing.assert_close(embedding[:257], gpt2.embedding.weight)
    mean = gpt2.embedding.weight.mean(dim=0)
    torch.testing.assert_close(embedding[257:], mean.expand(7, -1))  # the rows that pad it
    tokens = torch.arange(30).view(1, 30)
    torch.testing.assert_close(trained.model.hidden(tokens), gpt2.hidden(tokens))


def test_a_run_of_another_shape_is_refused_with_the_keys_to_set(tmp_path: Path) -> None:
    folder = gpt2_folder(tmp_path / "gpt2")
    model = GPT(ModelSection(n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_size=50))
    with pytest.raises(BadInput) as refused:
        load_pretrained(model, str(folder))
    flags = str(refused.value).rpartition("; set ")[2]
    shape = "--model.n-layer 2 --model.bias true --model.gelu tanh --model.block-size 32 "
    assert flags == shape + "--model.vocab-size 300."


def test_a_folder_that_holds_no_gpt2_is_refused(tmp_path: Path) -> None:
    folder = gpt2_folder(tmp_path / "gpt2")
    config = json.loads((folder / "config.json").read_text())
    for key, value, reason in (
        ("model_type", "llama", "model_type is 'llama'; give a GPT-2"),
        ("activation_function", "relu", "activation_function is 'relu'; give a GPT-2"),
        ("n_inner", 40, "n_inner is 40; give a GPT-2"),
        ("n_head", 3, "n_head is 3; give a GPT-2"),
        ("n_layer", 3, "does not hold the weights that its config.json describes"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(BadInput, match=reason):
            open_pretrained(str(folder), torch.device("cpu"))
