"""Hugging Face GPT-2 folders in and out: config.json, safetensors weights and GPT-2's vocabulary.

Our module names are theirs. Two things differ: their Conv1D stores the weight of a linear layer
transposed, (in, out), and our embedding table is padded. So one rule converts both ways. What a
folder holds is compared with what its config.json promises before any memory is taken, and what
would not be computed exactly (another activation, a head or a tokenizer of its own) is refused.
"""

import json
from contextlib import suppress
from importlib import resources
from pathlib import Path

import torch

from gpt2 import storage
from gpt2.config import GPTConfig
from gpt2.model import GPT, parameter_shapes
from gpt2.tokenizer import END_OF_TEXT, GPT2Tokenizer, Tokenizer

HUB_NAMES = {
    name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}
FIXED = {  # what the architecture here computes; a folder that says otherwise is refused
    "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}  # fmt: skip
HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"
# The first four are compared with GPT-2's own; the others are of other kinds of tokenizers.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json",
                   "vocab.txt", "tokenizer.model", "spiece.model")  # fmt: skip
GPT2_ROWS = range(GPT2Tokenizer.vocab_size, GPTConfig(1, 1, 1).padded_vocab_size + 1)
CONFIG, SETTINGS, WEIGHTS = "config.json", "tokenizer_config.json", "model.safetensors"
ASSETS = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}


def is_transposed(name: str) -> bool:
    """Whether Hugging Face stores this parameter the other way round."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def download(name: str) -> Path:
    """The local folder of a model of the hub: gpt2[-medium|-large|-xl], or owner/name.

    Raises ImportError without huggingface_hub, OSError where the model cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        words = f"downloading {name!r} needs huggingface_hub: pip install -e '.[train]'"
        raise ImportError(words) from error
    repo = HUB_NAMES.get(name, name)
    try:
        files = ["*.json", "model*.safetensors", "chat_template.jinja", *TOKENIZER_FILES]
        return Path(snapshot_download(repo, allow_patterns=files))
    except Exception as error:  # the hub client raises errors of many libraries
        reason = str(error).strip().split("\n")[0]
        words = f"cannot download {repo!r} from the Hugging Face hub ({reason}): check the name and"
        raise OSError(f"{words} the network, or give a local folder with {WEIGHTS}") from error


@torch.no_grad()
def load_hf(folder: str | Path, device="cpu", kernels="auto") -> GPT:
    """The model in a local Hugging Face GPT-2 folder, in float32.

    Raises OSError (missing files), ValueError (damaged, or not a GPT-2 as it is computed here).
    """
    folder = Path(folder)
    config = read_hf_config(folder)
    files, found = _weights(folder)
    wanted = {n: s[::-1] if is_transposed(n) else s for n, s in parameter_shapes(config).items()}
    if HEAD in found:
        wanted[HEAD] = wanted[TABLE]
    storage.check_shapes(found, wanted, folder)
    model, head = GPT(config, kernels, device), None
    with suppress(ValueError):  # without a tokenizer that is GPT-2's each row is a token
        model.n_tokens = min(read_tokenizer(folder).vocab_size, config.vocab_size)
    parameters = dict(model.named_parameters())
    for path in files:
        for name, value in storage.read_tensors(path).items():
            if (name := _our_name(name)) == HEAD:
                head = value
            elif name is not None:
                value = value.t() if is_transposed(name) else value
                parameters[name][: len(value)] = value
    table = parameters[TABLE][: config.vocab_size].cpu()
    if head is not None and not torch.equal(head.float(), table):
        words = "is a head of its own; GPT-2 here has the embedding as its head"
        raise ValueError(f"{folder}: {HEAD} {words}")
    return model


def read_hf_config(folder: Path) -> GPTConfig:
    """The shape in config.json. Raises ValueError for what we would not compute exactly."""
    path = folder / CONFIG
    found = storage.read_json(path)
    for key, allowed in FIXED.items():
        value = found.get(key, allowed[0])
        if value not in allowed:
            raise ValueError(f"{path}: {key} is {value!r:.40}; GPT-2 here needs {allowed[0]!r}")
    shape = {key: found.get(key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    shape["block_size"] = found.get("n_positions", found.get("n_ctx", 1024))
    config = storage.make(GPTConfig, shape, path)
    if found.get("n_inner") not in (None, 4 * config.n_embd):
        raise ValueError(f"{path}: n_inner is {found['n_inner']!r:.40}, not 4 * n_embd as here")
    return config


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, GPT-2's. Raises ValueError where it has another."""
    config, eot = storage.read_json(folder / CONFIG), GPT2Tokenizer.eot
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    if not files and (rows := config.get("vocab_size")) not in GPT2_ROWS:
        words = f"its vocabulary of {rows!r:.40} is not GPT-2's of {GPT2Tokenizer.vocab_size}"
        raise ValueError(f"{folder}: has no tokenizer files, and {words}")
    settings = storage.read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    pad = settings.get("pad_token")
    special = {END_OF_TEXT, str(pad.get("content") if isinstance(pad, dict) else pad)}
    for path in files:
        if not _is_gpt2s(path, special):
            raise ValueError(f"{path}: a tokenizer of its own; only GPT-2's is supported")
    if (found := config.get("eos_token_id", eot)) not in (None, eot):
        raise ValueError(f"{folder / CONFIG}: eos_token_id is {found!r:.40}, GPT-2's is {eot}")
    return GPT2Tokenizer()


def check_chat_template(folder: Path) -> None:
    """Raises ValueError where a folder has a chat template, which is a program in Jinja."""
    path, settings = folder / "chat_template.jinja", folder / SETTINGS
    if settings.exists() and storage.read_json(settings).get("chat_template"):
        path = settings
    if path.exists():
        words = "take it out to use the model without, or with one of the templates here"
        raise ValueError(f"{path}: a chat template of its own is not supported: {words}")


@torch.no_grad()
def export_hf(model: GPT, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes a folder that transformers.GPT2LMHeadModel loads, and, with GPT-2's tokenizer,
    AutoTokenizer. A model without biases gets zeros. Raises OSError where the folder exists
    or cannot be written, ValueError for a model with adapters that are not merged."""
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("a model with adapters has no such form: gpt2.lora.merge them first")
    folder, c = Path(folder), model.config
    folder.mkdir(parents=True)
    tensors = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().cpu()
        value = value[: c.vocab_size] if name == TABLE else value
        tensors[name] = (value.t() if is_transposed(name) else value).contiguous()
        if not c.bias and (is_transposed(name) or ".ln_" in name):
            tensors[name.replace(".weight", ".bias")] = torch.zeros(value.shape[0])
    storage.write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    eot = tokenizer.eot if tokenizer is not None else None
    config = {
        "architectures": ["GPT2LMHeadModel"], **{key: value[0] for key, value in FIXED.items()},
        "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,
        "n_positions": c.block_size, "n_ctx": c.block_size, "vocab_size": c.vocab_size,
        "attn_pdrop": 0.0, "embd_pdrop": c.dropout, "resid_pdrop": c.dropout,
        "bos_token_id": eot, "eos_token_id": eot, "dtype": "float32",
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer is not None and tokenizer.name == "gpt2":
        for name, asset in ASSETS.items():
            (folder / name).write_bytes((resources.files("gpt2") / "assets" / asset).read_bytes())
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": c.block_size} | special
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def _our_name(name: str) -> str | None:
    """OpenAI's own upload has bare names, later ones the prefix. None: the causal mask, which old
    files carry as attn.bias and attn.masked_bias."""
    if name.endswith((".attn.bias", ".attn.masked_bias")):
        return None
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _weights(folder: Path) -> tuple[list[Path], storage.Found]:
    """The files with a folder's weights, which transformers would read, and what they hold."""
    files, index, found = [folder / WEIGHTS], folder / f"{WEIGHTS}.index.json", {}
    if not files[0].exists() and index.exists():
        weight_map = storage.read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
        if not all(isinstance(n, str) and Path(n).name == n for n in names):
            raise ValueError(f"{index}: weight_map must name files of this folder")
        files = [folder / name for name in sorted(set(names))]
    elif not files[0].exists() and (pickles := [*folder.glob("*.bin"), *folder.glob("*.pt")]):
        words = "a pickle, which is not read since it may run code"
        raise ValueError(f"{pickles[0]}: {words}; transformers' save_pretrained writes {WEIGHTS}")
    for path in files:
        for name, kind in storage.read_shapes(path).items():
            if (ours := _our_name(name)) in found:
                raise ValueError(f"{path}: {name} is there twice")
            if ours is not None:
                found[ours] = kind
    return files, found


def _is_gpt2s(path: Path, special: set[str]) -> bool:
    """Whether a file of a tokenizer says the same as GPT-2's; special: tokens it may add."""
    assets = resources.files("gpt2") / "assets"
    merges = _merges((assets / "vocab.bpe").read_text(encoding="utf-8"))
    vocab = json.loads((assets / "encoder.json").read_text(encoding="utf-8"))
    if path.name == "merges.txt":
        return _merges(path.read_text(encoding="utf-8", errors="replace")) == merges
    if path.suffix != ".json":
        return False
    match path.name, storage.read_json(path):
        case "vocab.json", content:
            return content == vocab
        case "added_tokens.json", content:
            return content.keys() <= special
        case _, {
            "normalizer": None, "added_tokens": list(added),
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
            "model": {"vocab": found, "merges": pairs},
        }:  # fmt: skip
            pairs_too = [merge.split() for merge in merges]  # newer files have lists
            names = {str(token.get("content")) for token in added if isinstance(token, dict)}
            return found == vocab and pairs in (merges, pairs_too) and names <= special
    return False


def _merges(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#version")]
