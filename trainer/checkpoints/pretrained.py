"""Read and write GPT-2's weights in a folder with Hugging Face's layout.

In that layout each linear layer of a block is a Conv1D, whose weight is nn.Linear's transposed, and every layer and
norm has a bias. Source: transformers, models/gpt2/modeling_gpt2.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from model import GPT
from nanogauge.config import ModelSection
from nanogauge.errors import BadInput, RunFailed
from trainer.data.hub import client_errors, first_line, silence_client

WEIGHTS_NAME, CONFIG_NAME, VOCABULARY_NAME = "model.safetensors", "config.json", "vocab.json"
_PREFIX = "transformer."
BEYOND_GPT2 = ("positions", "norm", "qk_norm", "activation", "tied_head", "logit_softcap")
"""Model options that must have their default value for a model to be a GPT-2."""
_DEFAULTS = ModelSection.model_fields
_TIED = "lm_head.weight"
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
_NO_WEIGHTS = (".attn.bias", ".attn.masked_bias")  # masks that older files hold as well
_GELU: dict[str, Literal["exact", "tanh"]] = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
_HUB_FILES = [
    WEIGHTS_NAME,
    CONFIG_NAME,
    VOCABULARY_NAME,
    "generation_config.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
]


class HuggingFaceConfig(BaseModel):
    """The fields of a config.json that define the model, with the defaults of GPT2Config."""

    model_type: str
    n_layer: int = Field(12, gt=0)
    n_head: int = Field(12, gt=0)
    n_embd: int = Field(768, gt=0)
    n_positions: int = Field(1024, gt=0)
    vocab_size: int = Field(50257, gt=0)
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True


def hugging_face_folder(name: str) -> Path:
    """Return the folder of a model: a local one, or the cache after a download from the hub.

    Raises:
        BadInput: if the model does not exist.
        RunFailed: if the download fails.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    silence_client()
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except HFValidationError:
        raise BadInput(
            f"there is no folder {name}, and it is no name of a model on the hub either; give a "
            "folder in Hugging Face's layout, or a name as gpt2."
        ) from None
    except (RepositoryNotFoundError, GatedRepoError):
        raise BadInput(
            f"there is no folder {name}, and the hub gives no model of that name; "
            "give a folder in Hugging Face's layout, or a name as gpt2."
        ) from None
    except client_errors() as error:
        raise RunFailed(
            f"the model {name} could not be fetched from the hub ({first_line(error)}); check the "
            "network and HF_ENDPOINT, or give a folder that holds it."
        ) from error


def read_config(folder: Path) -> ModelSection:
    """Return the model configuration of the GPT-2 in a folder.

    Raises:
        BadInput: if the folder has no GPT-2, or model.py cannot represent it.
    """
    path = folder / CONFIG_NAME
    try:
        stored = HuggingFaceConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}; give the folder of a GPT-2.") from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
        raise BadInput(f"{path} describes no GPT-2: {where} is missing or wrong.") from None
    unlike = {
        "model_type": stored.model_type != "gpt2",
        "n_inner": stored.n_inner not in (None, 4 * stored.n_embd),
        "activation_function": stored.activation_function not in _GELU,
        "layer_norm_epsilon": stored.layer_norm_epsilon != 1e-5,
        "scale_attn_weights": not stored.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": stored.scale_attn_by_inverse_layer_idx,
        "tie_word_embeddings": not stored.tie_word_embeddings,
        "n_head": stored.n_embd % stored.n_head != 0,
    }
    if wrong := [key for key, is_unlike in unlike.items() if is_unlike]:
        value = getattr(stored, wrong[0])
        raise BadInput(f"{path} describes a model that GPT-2 is not: {wrong[0]} is {value!r}; give a GPT-2.")
    return ModelSection(
        n_layer=stored.n_layer,
        n_head=stored.n_head,
        n_embd=stored.n_embd,
        block_size=stored.n_positions,
        vocab_size=stored.vocab_size,
        bias=True,
        gelu=_GELU[stored.activation_function],
    )


def read_weights(folder: Path, config: ModelSection) -> dict[str, Tensor]:
    """Read the weights of the GPT-2 in a folder, in fp32, under model.py's names.

    Raises:
        BadInput: if they are missing, damaged, or of another shape.
    """
    path = folder / WEIGHTS_NAME
    try:
        stored = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(
            f"cannot read the weights {path} ({first_line(error)}); give a folder whose weights "
            "are in one file of that name."
        ) from None
    weights = {}
    for name, tensor in stored.items():
        own = name if name.startswith((_PREFIX, _TIED)) else _PREFIX + name
        if not own.endswith(_NO_WEIGHTS):
            weights[own] = (tensor.T if own.endswith(_TRANSPOSED) else tensor).float().contiguous()
    weights.setdefault(_TIED, weights.get(f"{_PREFIX}wte.weight", torch.empty(0)))
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in GPT(config).state_dict().items()}
    if {name: tuple(tensor.shape) for name, tensor in weights.items()} != expected:
        raise BadInput(f"{path} does not hold the weights that its {CONFIG_NAME} describes.")
    return weights


def open_pretrained(name: str, device: torch.device) -> GPT:
    """Load a GPT-2 from a folder or the hub, in eval mode.

    Raises:
        BadInput, RunFailed: as hugging_face_folder, read_config and read_weights.
    """
    folder = hugging_face_folder(name)
    config = read_config(folder)
    model = GPT(config)
    model.load_state_dict(read_weights(folder, config))
    return model.to(device).eval()


def load_pretrained(model: GPT, name: str) -> None:
    """Initialise a model with the weights of a GPT-2.

    The model may have a shorter context and a padded vocabulary. Padding rows of the embedding are set to the mean of
    the other rows.
    (GPT-2's logits are far below zero, so that zero rows would have the highest logits.)

    Raises:
        BadInput: if the model has another shape; the message names the keys to set.
    """
    folder = hugging_face_folder(name)
    pretrained, own = read_config(folder), model.config
    own_choice = ("block_size", "vocab_size", "dropout")
    required = {k: v for k, v in pretrained.model_dump().items() if k not in own_choice}
    required["zero_init"] = own.zero_init  # without effect, as weights are loaded
    differ = {k: v for k, v in required.items() if getattr(own, k) != v}
    if own.block_size > pretrained.block_size:
        differ["block_size"] = pretrained.block_size
    if own.vocab_size < pretrained.vocab_size:
        differ["vocab_size"] = pretrained.vocab_size
    if differ:
        flags = " ".join(
            f"--model.{key.replace('_', '-')} {json.dumps(value).strip(chr(34))}" for key, value in differ.items()
        )
        raise BadInput(f"the model of {name} has another shape than this run's; set {flags}.")
    weights = read_weights(folder, pretrained)
    tokens, positions = f"{_PREFIX}wte.weight", f"{_PREFIX}wpe.weight"
    padding = weights[tokens].mean(dim=0).expand(own.vocab_size - pretrained.vocab_size, -1)
    weights[tokens] = weights[_TIED] = torch.cat([weights[tokens], padding])
    weights[positions] = weights[positions][: own.block_size]
    model.load_state_dict(weights)


def to_hugging_face(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config.json, without its token ids, and the tensors of model.safetensors.

    Raises:
        BadInput: if the model is not of GPT-2's architecture.
    """
    own = model.config
    if beyond := [key for key in BEYOND_GPT2 if getattr(own, key) != _DEFAULTS[key].default]:
        raise BadInput(
            f"GPT-2's architecture, which is what is written, has no model.{beyond[0]} = "
            f"{json.dumps(getattr(own, beyond[0]))}; sample.py and evaluate.py take the run itself."
        )
    described: dict[str, Any] = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": own.n_layer,
        "n_head": own.n_head,
        "n_embd": own.n_embd,
        "n_positions": own.block_size,
        "n_ctx": own.block_size,
        "vocab_size": own.vocab_size,
        "activation_function": "gelu" if own.gelu == "exact" else "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": own.dropout,
        "embd_pdrop": own.dropout,
        "resid_pdrop": own.dropout,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name != _TIED:
            stored = tensor.T if name.endswith(_TRANSPOSED) else tensor
            tensors[name] = stored.float().cpu().contiguous()
    if not own.bias:
        tensors |= _zero_biases(tensors)
    return described, tensors


def _zero_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return zero biases for a model without biases, as Hugging Face's GPT-2 requires them."""
    return {
        name.removesuffix("weight") + "bias": tensor.new_zeros(tensor.shape[-1])
        for name, tensor in tensors.items()
        if not name.endswith(("wte.weight", "wpe.weight"))
    }
