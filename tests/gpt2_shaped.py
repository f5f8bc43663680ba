"""Small models in the shape of GPT-2's published files, and a hub that has one."""

import json
from pathlib import Path

import safetensors.torch
import torch
from hub import Hub


def gpt2_folder(folder: Path, vocab_size: int = 300, block_size: int = 32, seed: int = 5, width: int = 16) -> Path:
    """Random weights of two layers, named and laid out as those of the model gpt2 on the hub."""
    folder.mkdir(parents=True)
    chance = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=chance)

    tensors = {"wte.weight": normal(vocab_size, width), "wpe.weight": normal(block_size, width)}
    for layer in range(2):
        block = f"h.{layer}"
        for name, into in (("attn.c_attn", 3), ("mlp.c_fc", 4)):
            tensors[f"{block}.{name}.weight"] = normal(width, into * width)
            tensors[f"{block}.{name}.bias"] = normal(into * width)
        for name, of in (("attn.c_proj", 1), ("mlp.c_proj", 4)):
            tensors[f"{block}.{name}.weight"] = normal(of * width, width)
            tensors[f"{block}.{name}.bias"] = normal(width)
        for name in ("ln_1", "ln_2"):
            tensors[f"{block}.{name}.weight"] = 1 + normal(width)
            tensors[f"{block}.{name}.bias"] = normal(width)
        mask = torch.ones(1, 1, block_size, block_size).tril()
        tensors[f"{block}.attn.bias"] = mask  # as in the published file
    tensors |= {"ln_f.weight": 1 + normal(width), "ln_f.bias": normal(width)}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": width,
        "n_positions": block_size,
        "vocab_size": vocab_size,
        "layer_norm_epsilon": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def hub_of_model(name: str, folder: Path) -> Hub:
    return Hub(name, {path.name: path.read_bytes() for path in folder.iterdir()}, kind="models")
