"""Hugging Face GPT-2 folders in and out: config.json and model.safetensors.

Our module names are theirs. Two things differ: their Conv1D stores the weight of a linear layer
transposed, (in, out), and our embedding table is padded. So one rule converts both ways.
"""

import json
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.model import GPT
from gpt2.tokenizer import END_OF_TEXT, Tokenizer

HUB_NAMES = {
    name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}
# What the architecture here computes; a folder that says otherwise is refused.
FIXED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def is_transposed(name: str) -> bool:
    """Whether Hugging Face stores this parameter the other way round."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def download(name: str) -> Path:
    """The local folder of a model of the hub: gpt2[-medium|-large|-xl], or owner/name.

    Raises ImportError where huggingface_hub is missing, OSError where the model cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"downloading {name!r} needs huggingface_hub: pip install -e '.[train]'"
        ) from error
    repo = HUB_NAMES.get(name, name)
    try:
        files = ["config.json", "model.safetensors", "model*.safetensors*"]
        return Path(snapshot_download(repo, allow_patterns=files))
    except Exception as error:  # the hub client raises errors of many libraries
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"cannot download {repo!r} from the Hugging Face hub ({reason}); check the name and "
            "the network, or give a local folder with config.json and model.safetensors"
        ) from error


def load_hf(folder: str | Path, device="cpu", kernels="auto") -> GPT:
    """The model in a local Hugging Face GPT-2 folder, in float32.

    Raises OSError (missing files) and ValueError (not a GPT-2, or one with options that are not
    supported).
    """
    folder = Path(folder)
    model = GPT(read_hf_config(folder), kernels, device)
    tensors = {_our_name(k): v for k, v in _read_tensors(folder).items() if not _is_buffer(k)}
    tensors.pop("lm_head.weight", None)  # tied to wte
    wanted = dict(model.named_parameters())
    missing, unknown = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    missing = {name for name in missing if not (name.endswith("bias") and not model.config.bias)}
    if missing or unknown:
        raise ValueError(
            f"{folder}: not the weights of a GPT-2 language model: "
            f"missing {sorted(missing)[:3] or 'none'}, unknown {sorted(unknown)[:3] or 'none'}"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            value = tensors[name].t() if is_transposed(name) else tensors[name]
            rows = model.config.vocab_size if name == "transformer.wte.weight" else len(parameter)
            if value.shape != parameter[:rows].shape:
                raise ValueError(
                    f"{folder}: {name} has shape {tuple(value.shape)}, its config.json says "
                    f"{tuple(parameter[:rows].shape)}"
                )
            parameter[:rows] = value
    return model


def read_hf_config(folder: Path) -> GPTConfig:
    """The shape in config.json. Raises ValueError for what we would not compute exactly."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise OSError(2, "a Hugging Face folder needs config.json", str(path)) from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    for key, allowed in FIXED.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            raise ValueError(f"{path}: {key} is {value!r}; GPT-2 here needs {allowed[0]!r}")
    try:
        shape = {k: config[k] for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
        shape["block_size"] = config.get("n_positions", config.get("n_ctx", 1024))
    except KeyError as error:
        raise ValueError(f"{path}: has no {error.args[0]!r}") from error
    n_inner = config.get("n_inner")
    if n_inner not in (None, 4 * shape["n_embd"]):
        raise ValueError(f"{path}: n_inner is {n_inner}; GPT-2 here needs 4 * n_embd")
    return GPTConfig(**shape)


@torch.no_grad()
def export_hf(model: GPT, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes a folder that transformers.GPT2LMHeadModel.from_pretrained loads.

    With GPT-2's tokenizer also what AutoTokenizer needs. A model without biases gets biases of
    zero. Raises OSError where the folder exists or cannot be written, ValueError for a model with
    adapters that are not merged.
    """
    from safetensors.torch import save_file

    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("a model with adapters has no such form: gpt2.lora.merge them first")
    folder, c = Path(folder), model.config
    folder.mkdir(parents=True)
    tensors = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().cpu()
        value = value[: c.vocab_size] if name == "transformer.wte.weight" else value
        tensors[name] = (value.t() if is_transposed(name) else value).contiguous()
        if not c.bias and name.endswith(".weight") and _has_bias_in_hf(name):
            tensors[name.replace(".weight", ".bias")] = torch.zeros(value.shape[0])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    eot = tokenizer.eot if tokenizer is not None else None
    config = {
        "architectures": ["GPT2LMHeadModel"],
        **{key: allowed[0] for key, allowed in FIXED.items()},
        "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,
        "n_positions": c.block_size, "n_ctx": c.block_size, "vocab_size": c.vocab_size,
        "attn_pdrop": 0.0, "embd_pdrop": c.dropout, "resid_pdrop": c.dropout,
        "bos_token_id": eot, "eos_token_id": eot, "dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer is not None and tokenizer.name == "gpt2":
        assets = resources.files("gpt2") / "assets"
        (folder / "vocab.json").write_bytes((assets / "encoder.json").read_bytes())
        (folder / "merges.txt").write_bytes((assets / "vocab.bpe").read_bytes())
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        settings = {
            "tokenizer_class": "GPT2Tokenizer", "model_max_length": c.block_size, **special
        }  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _has_bias_in_hf(name: str) -> bool:
    return is_transposed(name) or ".ln_" in name


def _our_name(name: str) -> str:
    """OpenAI's own upload has bare names, later ones the prefix."""
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _is_buffer(name: str) -> bool:
    """The causal mask, which old files carry as attn.bias and attn.masked_bias."""
    return name.endswith((".attn.bias", ".attn.masked_bias"))


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    tensors = {}
    for file in files:
        path = folder / file
        if not path.exists():
            raise OSError(2, "a Hugging Face folder needs its safetensors weights", str(path))
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged or cut short ({error})") from error
    return tensors
