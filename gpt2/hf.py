"""Hugging Face GPT-2 folders in and out: config.json, safetensors weights, tokenizer, template.

Our module names are theirs. Two things differ: their Conv1D stores the weight of a linear layer
transposed, (in, out), and our embedding table is padded. So one rule converts both ways. Written
are OpenAI's own names, without a prefix, which every program takes. What a
folder holds is compared with what its config.json promises before any memory is taken, and what
would not be computed exactly (another activation, a head or a tokenizer of its own) is refused.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path

import torch

from gpt2 import foreign, storage
from gpt2.config import GPTConfig
from gpt2.data.chat import TEMPLATES, jinja
from gpt2.foreign import GPT2_ROWS, HEAD, TABLE
from gpt2.model import GPT, parameter_shapes
from gpt2.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    JsonTokenizer,
    Tokenizer,
    byte_symbols,
)

HUB_NAMES = {
    name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}
FIXED = {  # what the architecture here computes; a folder that says otherwise is refused
    "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
    "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}  # fmt: skip
# The first four are compared with GPT-2's own; the others are of other kinds of tokenizers.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json",
                   "vocab.txt", "tokenizer.model", "spiece.model")  # fmt: skip
CONFIG, SETTINGS, WEIGHTS = "config.json", "tokenizer_config.json", "model.safetensors"
PICKLE = "pytorch_model.bin"  # read where there is no safetensors file
TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
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
        folder = Path(snapshot_download(repo, allow_patterns=files))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(repo, allow_patterns=[*files, "pytorch_model*.bin"]))
        return folder
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
    with suppress(ValueError, ImportError):  # without a tokenizer each row is a token
        model.n_tokens = min(read_tokenizer(folder).vocab_size, config.vocab_size)
    parameters = dict(model.named_parameters())
    for path in files:
        is_pickle = path.suffix == ".bin"
        tensors = _read_pickle(path) if is_pickle else storage.read_tensors(path)
        storage.check_finite(tensors if is_pickle else {}, path)
        for name, value in tensors.items():
            if (name := _our_name(name)) == HEAD:
                head = value
            elif name is not None:
                value = value.t() if is_transposed(name) else value
                parameters[name][: len(value)] = value
    table = parameters[TABLE][: config.vocab_size].cpu()
    foreign.check_tied({TABLE: table} | ({} if head is None else {HEAD: head}), folder)
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
    shape["exact_gelu"] = found.get("activation_function") == "gelu"
    config = storage.make(GPTConfig, shape, path)
    if found.get("n_inner") not in (None, 4 * config.n_embd):
        raise ValueError(f"{path}: n_inner is {found['n_inner']!r:.40}, not 4 * n_embd as here")
    return config


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder: GPT-2's, bytes or characters as export_hf writes them, or another
    BPE of bytes in tokenizer.json. Raises ValueError where it has another, ImportError."""
    config, tokenizer = storage.read_json(folder / CONFIG), GPT2Tokenizer()
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    if not files and (rows := config.get("vocab_size")) not in GPT2_ROWS:
        words = f"its vocabulary of {rows!r:.40} is not GPT-2's of {GPT2Tokenizer.vocab_size}"
        raise ValueError(f"{folder}: has no tokenizer files, and {words}")
    settings = storage.read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    pad = settings.get("pad_token")
    special = {END_OF_TEXT, str(pad.get("content") if isinstance(pad, dict) else pad)}
    if files == [folder / TOKENIZER] and (ours := _bytes_or_chars(files[0])):
        files, tokenizer = [], ours
    if folder / TOKENIZER in files and not _is_gpt2s(folder / TOKENIZER, special):
        try:
            return JsonTokenizer(storage.read_json(folder / TOKENIZER), config.get("eos_token_id"))
        except ValueError as error:
            raise ValueError(f"{folder / TOKENIZER}: {error}") from error
    for path in files:
        if not _is_gpt2s(path, special):
            words = "GPT-2's is supported, and any BPE of bytes that has a tokenizer.json"
            raise ValueError(f"{path}: a tokenizer of its own; {words}")
    if (found := config.get("eos_token_id", tokenizer.eot)) not in (None, tokenizer.eot):
        words = f"the {tokenizer.name} tokenizer's is {tokenizer.eot}"
        raise ValueError(f"{folder / CONFIG}: eos_token_id is {found!r:.40}, {words}")
    return tokenizer


def read_chat_template(folder: Path) -> str | None:
    """The name of a folder's chat template, None without one. Raises ValueError where it is none
    of gpt2.data.chat: a template is a program in Jinja."""
    path, text = folder / TEMPLATE, None
    if (settings := folder / SETTINGS).exists():
        text = storage.read_json(settings).get("chat_template")
        path = settings if text else path
    if not path.exists():
        return None
    text = text or path.read_text(encoding="utf-8", errors="replace")
    for name, template in TEMPLATES.items():
        if not template.piecewise and text in (jinja(name), jinja(name, generation=False)):
            return name
    words = "take it out, or name one of the templates here, or none, with --template"
    raise ValueError(f"{path}: a chat template of its own is not supported: {words}")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to be filled, which takes its name only when that has been done; NAME.gguf becomes
    the file NAME.gguf in it. Raises OSError where the name exists."""
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(errno.EEXIST, "exists already: name another", str(folder))
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of one that was killed
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():
            path.chmod(0o644)
            storage.sync(path)
        os.rename(temporary / folder.name if folder.suffix == ".gguf" else temporary, folder)
    except OSError as error:  # numpy's and gguf's do not say where
        if error.filename and error.strerror:
            raise
        raise OSError(error.errno or errno.EIO, f"not written ({error})", str(folder)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export_hf(
    model: GPT, folder: str | Path, tokenizer: Tokenizer | None = None, **options
) -> None:
    """write_hf into a new folder, whole or not at all. Raises OSError where it exists."""
    with new_folder(Path(folder)) as path:
        write_hf(model, path, tokenizer, **options)


def write_hf(
    model: GPT, folder: Path, tokenizer: Tokenizer | None = None, *,
    template: str | None = None, dtype: str = "float32",
) -> None:  # fmt: skip
    """Writes what transformers' GPT2LMHeadModel, AutoTokenizer and pipeline load.

    A model without biases gets zeros. template: of gpt2.data.chat. dtype: of the weights. Raises
    OSError where it cannot be written, ValueError for a model with adapters that are not merged,
    characters that JSON cannot hold and weights that dtype cannot.
    """
    tensors, c = bare_tensors(model, getattr(torch, dtype)), model.config
    eot = None if tokenizer is None else tokenizer.eot
    special = {"bos_token_id": eot, "eos_token_id": eot}
    config = {
        "architectures": ["GPT2LMHeadModel"], **{key: value[0] for key, value in FIXED.items()},
        "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,
        "n_positions": c.block_size, "n_ctx": c.block_size, "vocab_size": c.vocab_size,
        "attn_pdrop": 0.0, "embd_pdrop": c.dropout, "resid_pdrop": c.dropout,
        **special, "dtype": dtype,
    }  # fmt: skip
    if c.exact_gelu:
        config["activation_function"] = "gelu"
    special |= {"pad_token_id": eot}
    if c.block_size < 1024:  # pipeline goes on for 256 tokens, unless told
        special["max_length"] = c.block_size
    files = {CONFIG: config, "generation_config.json": special}
    if tokenizer is not None:
        files[TOKENIZER] = tokenizer_json(tokenizer)
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        is_gpt2s = tokenizer.name == "gpt2"
        files[SETTINGS] = {
            "tokenizer_class": "GPT2Tokenizer" if is_gpt2s else "PreTrainedTokenizerFast",
            "model_max_length": c.block_size, "clean_up_tokenization_spaces": False,
            **({} if eot is None else dict.fromkeys(names, tokenizer.decode([eot]))),
        }  # fmt: skip
        for name, asset in ASSETS.items() if is_gpt2s else ():
            (folder / name).write_bytes((resources.files("gpt2") / "assets" / asset).read_bytes())
    for name, content in files.items():
        text = json.dumps(content, indent=None if name == TOKENIZER else 2, ensure_ascii=False)
        storage.write_text(folder / name, text + "\n")
    if template is not None:
        storage.write_text(folder / TEMPLATE, jinja(template))
    storage.write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})


@torch.no_grad()
def bare_tensors(model: GPT, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A model's parameters as OpenAI's file has them: h.0.attn.c_attn.weight (in, out) and so on,
    with biases, on the CPU. Raises ValueError for adapters and for what dtype cannot hold."""
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("a model with adapters has no such form: gpt2.lora.merge them first")
    tensors, c = {}, model.config
    for name, parameter in model.named_parameters():
        value = parameter.detach().cpu()
        value = value[: c.vocab_size] if name == TABLE else value
        bare = name.removeprefix("transformer.")
        tensors[bare] = (value.t() if is_transposed(name) else value).to(dtype).contiguous()
        if not c.bias and (is_transposed(name) or ".ln_" in name):
            tensors[bare.replace(".weight", ".bias")] = torch.zeros(value.shape[0], dtype=dtype)
    storage.check_finite(tensors, f"in {dtype}".replace("torch.", ""))
    return tensors


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """A tokenizer as the tokenizers library reads it, with the same tokens for any text. Of a
    character that a tokenizer of characters does not have, both make an error."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    byte_level["use_regex"] = tokenizer.name == "gpt2"
    pre, decoder = byte_level, byte_level
    options = {
        "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
        "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
    }  # fmt: skip
    if isinstance(tokenizer, CharTokenizer):
        if any("\ud800" <= c <= "\udfff" for c in tokenizer.chars):
            raise ValueError("its characters hold halves of a surrogate pair, which no text has")
        pattern = {"Regex": r"[\s\S]"}
        pre = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        vocab = {c: i for i, c in enumerate(tokenizer.chars)}
        decoder = {"type": "Fuse"}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    elif isinstance(tokenizer, JsonTokenizer):
        return tokenizer.content
    elif isinstance(tokenizer, ByteTokenizer):
        vocab = {symbol: i for i, symbol in enumerate(byte_symbols())}
        model = {"type": "BPE", **options, "vocab": vocab, "merges": []}
    else:
        assets = resources.files("gpt2") / "assets"
        vocab = json.loads((assets / "encoder.json").read_text(encoding="utf-8"))
        merges = _merges((assets / "vocab.bpe").read_text(encoding="utf-8"))
        model = {"type": "BPE", **options, "vocab": vocab, "merges": merges}
    end = {"id": tokenizer.eot, "content": END_OF_TEXT, "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [] if tokenizer.eot is None else [end], "normalizer": None,
        "pre_tokenizer": pre, "post_processor": None, "decoder": decoder, "model": model,
    }  # fmt: skip


def _bytes_or_chars(path: Path) -> Tokenizer | None:
    """The tokenizer of bytes or characters that a tokenizer.json of tokenizer_json describes."""
    content = storage.read_json(path)
    with suppress(KeyError, TypeError, ValueError):
        vocab = content["model"]["vocab"]
        for tokenizer in (ByteTokenizer(), CharTokenizer("".join(vocab))):
            wanted = tokenizer_json(tokenizer)
            parts = ("normalizer", "pre_tokenizer")
            if vocab == wanted["model"]["vocab"] and all(content[p] == wanted[p] for p in parts):
                return tokenizer
    return None


def _our_name(name: str) -> str | None:
    """OpenAI's own upload has bare names, later ones the prefix. None: the causal mask, which old
    files carry as attn.bias and attn.masked_bias."""
    if name.endswith((".attn.bias", ".attn.masked_bias")):
        return None
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _weights(folder: Path) -> tuple[list[Path], storage.Found]:
    """The files with a folder's weights, which transformers would read, and what they hold."""
    kinds = [name for name in (WEIGHTS, PICKLE) if any(folder.glob(f"{name}*"))] or [WEIGHTS]
    files, index, found = [folder / kinds[0]], folder / f"{kinds[0]}.index.json", {}
    if not files[0].exists() and index.exists():
        weight_map = storage.read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
        if not all(isinstance(n, str) and Path(n).name == n for n in names):
            raise ValueError(f"{index}: weight_map must name files of this folder")
        files = [folder / name for name in sorted(set(names))]
    for path in files:
        is_pickle = path.suffix == ".bin"
        shapes = foreign.shapes(_read_pickle(path)) if is_pickle else storage.read_shapes(path)
        for name, kind in shapes.items():
            if (ours := _our_name(name)) in found:
                raise ValueError(f"{path}: {name} is there twice")
            if ours is not None:
                found[ours] = kind
    return files, found


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    return foreign.weights(foreign.read_pickle(path), path)


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
