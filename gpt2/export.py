"""A model for other programs: what `gpt2-triton export` writes, checks and uploads.

Hugging Face's folder is made by gpt2.hf. Here are the model card, GGUF (llama.cpp, Ollama, LM
Studio), the comparison of what was written with the model, and the upload to the hub.

GGUF's names and keys are those that llama.cpp's convert_hf_to_gguf.py gives GPT-2. Bytes are a
vocabulary of GPT-2's kind, which must have a merge: one that never applies. Characters are one of
RWKV's kind, where the longest match is the token, since a vocabulary of GPT-2's kind without an
end of text makes llama.cpp stop at token 11. Vectors and positions stay float32, as there.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from gpt2 import hf, lora, storage
from gpt2.checkpoint import (
    Checkpoint,
    load_chat_template,
    load_model,
    load_tokenizer,
    read_checkpoint,
)
from gpt2.data.chat import TEMPLATES, encode_chat, jinja
from gpt2.data.conversations import CHAT_DATASETS
from gpt2.data.datasets import DATASETS
from gpt2.model import GPT
from gpt2.options import ExportConfig
from gpt2.tokenizer import END_OF_TEXT, Tokenizer
from gpt2.train.metrics import points, read_log
from gpt2.train.receipt import read_receipt

ROUNDED = 256  # llama.cpp's contexts are a multiple of it
# OpenAI's names to llama.cpp's; before the first dot of a block's stands h.N and blk.N.
GGUF_NAMES = {
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
HOSTILE = "\tHello,  world!\n\n\n It's \u00e9\u4e2d\U0001f600 x2 \x00\u3000 \r\n     end "
TALK = ({"role": "user", "content": " Why?\n"}, {"role": "assistant", "content": "So."})


def export(config: ExportConfig) -> None:
    """Writes config.model to config.out, whole or not at all, and says what was done.

    Raises OSError, ValueError and ImportError for what cannot be read, written or represented,
    and ValueError where --verify finds a difference; nothing stays then.
    """
    out, is_gguf = Path(config.out), config.format == "gguf"
    for package in ["gguf"] * is_gguf + ["huggingface_hub"] * bool(config.push):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"this needs {package}: pip install -e '.[export]'")
    dtype = config.dtype or ("f32" if is_gguf else "float32")
    name = out.name if out.suffix == ".gguf" else f"model-{dtype}.gguf"
    with hf.new_folder(out) as folder:
        tokenizer, template = load_tokenizer(config.model), load_chat_template(config.model)
        model = load_model(config.model, kernels="torch").eval()
        checkpoint = _checkpoint(config.model)
        if (checkpoint and checkpoint.lora) or (Path(config.model) / lora.CONFIG).exists():
            print("note: the adapters are merged into the weights")
        for note in limits(model, tokenizer, template, config.format, dtype):
            print(f"note: {note}")
        if is_gguf:
            write_gguf(model, folder / name, tokenizer, template, dtype)
        else:
            hf.write_hf(model, folder, tokenizer, template=template, dtype=dtype)
        card = model_card(config, model, tokenizer, template, checkpoint)
        storage.write_text(folder / "README.md", card)
        if config.verify:
            check, where = (verify_gguf, folder / name) if is_gguf else (verify_hf, folder)
            for line in check(where, model, tokenizer, template, dtype):
                print(f"verified: {line}")
    if is_gguf:
        path = out if out.suffix == ".gguf" else out / name
        print(f"{path}: run it with llama-cli -m {path}; for Ollama, in a Modelfile: FROM {path}")
    else:
        print(
            f"{out}: load it with transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})"
        )
    if config.push:
        push(out, config.push)


def limits(
    model: GPT, tokenizer: Tokenizer, template: str | None, form: str, dtype: str
) -> Iterator[str]:
    """What the other programs will do otherwise than we do. Raises ValueError for what dtype or
    format cannot hold."""
    c, rows = model.config, tokenizer.vocab_size
    if c.vocab_size < rows:
        words = f"the model has {c.vocab_size} rows for the {rows} tokens of its tokenizer"
        raise ValueError(f"{words}: it cannot be used with it")
    if template is not None and TEMPLATES[template].piecewise:
        yield (
            f"this model learnt template {template} in pieces; other programs tokenise the whole "
            "text, and have two tokens for \\n\\n before a heading where it learnt one"
        )
    if tokenizer.eot is None:
        yield (
            f"the {tokenizer.name} tokenizer has no end of text, so what is generated ends at its "
            "limit, and no token for other characters: they are an error"
        )
    if form == "hf":
        return
    if tokenizer.name == "json":
        raise ValueError(
            "llama.cpp would have to know how this model's own tokenizer splits text, which only "
            "its converter does: export with --format hf, and run convert_hf_to_gguf.py on that"
        )
    if dtype == "q8_0" and c.n_embd % 32:
        raise ValueError(f"q8_0 packs 32 numbers at a time, n_embd is {c.n_embd}: take f16 or f32")
    if c.exact_gelu:
        yield (
            "this model computes the exact GELU, as nanoGPT does, and llama.cpp GPT-2's, which "
            "approximates it by tanh: logits differ by about 1e-3"
        )
    if c.block_size % ROUNDED:
        rounded = -(-c.block_size // ROUNDED) * ROUNDED
        yield (
            f"llama.cpp rounds the context of {c.block_size} up to {rounded}, and aborts at token "
            f"{c.block_size + 1}: keep prompt and answer together below that (-n)"
        )
    if c.vocab_size > rows:
        yield f"the {c.vocab_size - rows} rows beyond the {rows} tokens are left out"
    if template is not None:
        yield "Ollama has templates of its own kind and ignores the one inside; llama.cpp uses it"


def write_gguf(
    model: GPT, path: Path, tokenizer: Tokenizer, template: str | None, dtype: str
) -> None:
    """Writes llama.cpp's file; dtype: "f32", "f16" or "q8_0"."""
    import gguf

    c, writer = model.config, gguf.GGUFWriter(path, "gpt2")
    writer.add_name(path.stem)
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(hf.FIXED["layer_norm_epsilon"][0])
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[dtype]])
    described = hf.tokenizer_json(tokenizer)["model"]
    tokens, merges = list(described["vocab"]), described.get("merges") or ["\u00ff \u00fe"]
    if tokenizer.name == "char":  # escaped as Python's bytes are
        tokens = [repr(token.encode())[2:-1] for token in tokens]
    types = [gguf.TokenType.NORMAL] * tokenizer.vocab_size
    if tokenizer.eot is not None:
        tokens[tokenizer.eot :] = [END_OF_TEXT]
        types[tokenizer.eot] = gguf.TokenType.CONTROL
        writer.add_bos_token_id(tokenizer.eot)
        writer.add_eos_token_id(tokenizer.eot)
        writer.add_pad_token_id(tokenizer.eot)
    writer.add_tokenizer_model("rwkv" if tokenizer.name == "char" else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if tokenizer.name != "char":
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(jinja(template, generation=False))
    for name, value in gguf_tensors(model, tokenizer.vocab_size).items():
        kind, data = gguf_kind(name, value, dtype), value.numpy()
        if kind == "f16":
            storage.check_finite({name: value.half()}, "in float16")
            data = data.astype("float16")
        if kind == "q8_0":
            kept = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(data, kept), raw_dtype=kept)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(model: GPT, n_tokens: int) -> dict[str, torch.Tensor]:
    """A model's parameters under llama.cpp's names, (out, in), with a row for each token."""
    tensors = {}
    for name, value in hf.bare_tensors(model).items():
        *block, rest = name.split(".", 2) if name.startswith("h.") else (name,)
        layer, _, kind = rest.rpartition(".")
        theirs = f"{GGUF_NAMES[layer]}.{kind}"
        value = value[:n_tokens] if name == "wte.weight" else value
        value = value.t().contiguous() if hf.is_transposed(name) else value
        tensors[f"blk.{block[1]}.{theirs}" if block else theirs] = value
    return tensors


def gguf_kind(name: str, value: torch.Tensor, dtype: str) -> str:
    """What a tensor is stored as."""
    return "f32" if value.dim() == 1 or name == "position_embd.weight" else dtype


@torch.no_grad()
def verify_hf(
    folder: Path, model: GPT, tokenizer: Tokenizer, template: str | None, dtype: str
) -> Iterator[str]:
    """Compares a folder with what it was made from; yields what is equal, and by how much. Raises
    ValueError for a difference."""
    again = hf.load_hf(folder, kernels="torch").eval()
    wanted = hf.bare_tensors(model, getattr(torch, dtype))
    read = hf.bare_tensors(again, getattr(torch, dtype))
    wrong = [name for name, value in wanted.items() if not torch.equal(read[name], value)]
    _check(not wrong, f"{folder.name}: other weights than the model's: {wrong[:3]}")
    yield f"{len(wanted)} tensors, equal in {dtype}"
    same = hf.read_tokenizer(folder).to_dict() == tokenizer.to_dict()
    _check(same, f"{folder.name}: another tokenizer than the model's")
    for path in sorted(folder.iterdir()):
        yield _hash(path)
    if importlib.util.find_spec("transformers") is None:
        yield "not the logits: transformers is not installed"
        return
    from transformers import AutoTokenizer, GPT2LMHeadModel

    text = _text(tokenizer)
    ids, theirs = tokenizer.encode(text), AutoTokenizer.from_pretrained(folder)
    _check(
        theirs(text)["input_ids"] == ids, f"{folder.name}: transformers has other tokens for text"
    )
    _check(
        theirs.decode(ids) == tokenizer.decode(ids),
        f"{folder.name}: transformers has other text for tokens",
    )
    if template is not None and not TEMPLATES[template].piecewise:
        found = theirs.apply_chat_template(list(TALK), tokenize=False)
        _check(
            theirs(found)["input_ids"] == encode_chat(list(TALK), tokenizer, template)[0],
            f"{folder.name}: the template gives other tokens than in training",
        )
        yield f"tokens of the template {template}"
    idx = _idx(model, tokenizer)
    logits = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)(idx).logits
    yield f"tokens, and logits in transformers within {_near(logits, again(idx), 1e-4):.1e}"


@torch.no_grad()
def verify_gguf(
    path: Path, model: GPT, tokenizer: Tokenizer, template: str | None, dtype: str
) -> Iterator[str]:
    """As verify_hf, of a GGUF file; with llama.cpp where llama-cpp-python is installed."""
    import gguf

    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    wanted = gguf_tensors(model, tokenizer.vocab_size)
    _check(read.keys() == wanted.keys(), f"{path.name}: other tensors than the model's")
    far = 0.0
    for name, value in wanted.items():
        found = torch.tensor(gguf.quants.dequantize(read[name].data, read[name].tensor_type))
        error = (found.view_as(value) - value).abs().max() / value.abs().max().clamp(min=1e-30)
        far = max(far, float(error))
    # Half of the last of 10 bits; half of 1/127 of the largest of 32, which is rounded so as well.
    most = {"f32": 0.0, "f16": 2.0**-11, "q8_0": 0.5 / 127 + 2.0**-11}[dtype]
    _check(far <= most, f"{path.name}: weights are {far:.1e} of the largest away, not {most:.1e}")
    yield f"{len(wanted)} tensors, within {far:.1e} of the largest value of each"
    yield _hash(path)
    if importlib.util.find_spec("llama_cpp") is None:
        yield "not the logits: llama-cpp-python is not installed"
        return
    from llama_cpp import Llama

    size = model.config.block_size
    llama = Llama(str(path), n_ctx=size, n_batch=size, logits_all=True, verbose=False)
    text, idx = _text(tokenizer), _idx(model, tokenizer)
    ids = llama.tokenize(text.encode(), add_bos=False, special=False)
    _check(ids == tokenizer.encode(text), f"{path.name}: llama.cpp has other tokens for {text!r}")
    llama.eval(idx[0].tolist())
    logits = torch.tensor(llama.scores[: idx.shape[1]])
    llama.close()
    near = _near(logits, model(idx)[0, :, : tokenizer.vocab_size], 1e-2 if dtype != "q8_0" else 0.2)
    yield f"tokens, and logits in llama.cpp within {near:.1e}"


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return f"{path.name} sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"


def _check(holds: bool, words: str) -> None:
    if not holds:
        raise ValueError(words)


def _near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> float:
    """The largest difference; tolerance: of the largest value."""
    far, most = float((found - wanted).abs().max()), tolerance * float(wanted.abs().max())
    _check(far <= most, f"logits are {far:.1e} away from the model's, at most {most:.1e} is right")
    return far


def _text(tokenizer: Tokenizer) -> str:
    """A text that tokenizers differ on, as far as a tokenizer has its characters."""
    known = getattr(tokenizer, "chars", HOSTILE)
    return "".join(c for c in HOSTILE if c in known) or known


def _idx(model: GPT, tokenizer: Tokenizer) -> torch.Tensor:
    """Tokens (1, T) that fill the context, up to 256."""
    size = (1, min(model.config.block_size, 256))
    return torch.randint(tokenizer.vocab_size, size, generator=torch.Generator().manual_seed(0))


def model_card(
    config: ExportConfig, model: GPT, tokenizer: Tokenizer, template: str | None,
    checkpoint: Checkpoint | None,
) -> str:  # fmt: skip
    """README.md, with the hub's metadata and what is known of the run that made the model."""
    c, name, meta = model.config, Path(config.out).name, {"pipeline_tag": "text-generation"}
    meta |= {"library_name": "transformers"} if config.format == "hf" else {"tags": ["gguf"]}
    meta |= {"license": config.license} if config.license else {}
    facts = {
        "parameters": f"{model.n_params():,}",
        "shape": f"{c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, context {c.block_size}",
        "tokenizer": f"{tokenizer.name}, {tokenizer.vocab_size:,} tokens",
    }
    if template is not None:
        facts["chat template"] = template
    if checkpoint is not None:
        more, base, datasets = run_figures(checkpoint)
        facts |= more
        meta |= {"base_model": base} if base else {}
        meta |= {"datasets": datasets} if datasets else {}
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in meta.items())
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in facts.items())
    text = '[{"role": "user", "content": "Why?"}]' if template is not None else '"Once"'
    use = (
        f"from transformers import pipeline\n\nprint(pipeline(model={name!r})({text}, "
        f"max_new_tokens={min(64, c.block_size // 2)}))"
    )
    if config.format == "gguf":
        use = f"llama-cli -m {name if name.endswith('.gguf') else 'model-*.gguf'}"
    return (
        f"---\n{head}\n---\n\n# {_cell(name)}\n\nA GPT-2 trained with gpt2-triton.\n\n"
        f"| | |\n| --- | --- |\n{rows}\n\n```\n{use}\n```\n"
    )


def _cell(text) -> str:
    return str(text).replace("\n", " ").replace("|", "\\|")


def _checkpoint(name: str) -> Checkpoint | None:
    """The checkpoint of a model, where it is one of ours."""
    try:
        return read_checkpoint(name)
    except OSError:
        return None


def run_figures(checkpoint: Checkpoint) -> tuple[dict, str, list[str]]:
    """What a run's files say of a checkpoint: figures, the hub's names of the model that it was
    begun with ("": none) and of its data. What they do not say is left out."""
    step, train, run = checkpoint.step, checkpoint.train, checkpoint.path.parent.parent
    facts = {"steps": f"{step:,}"}
    if tokens := train.get("tokens_per_step"):
        facts["tokens trained on"] = f"{step * tokens:,}, {tokens:,} a step"
    lines, _ = read_log(run / "metrics.jsonl")
    for key in ("train/loss", "val/loss", "eval/hellaswag"):
        if found := [value for at, value in points(lines, key) if at <= step]:
            facts[key] = f"{found[-1]:.4f}"
    begun, data = train.get("init_from") or "", []
    with suppress(OSError, ValueError, AttributeError):  # none, damaged, or edited by somebody
        data = (read_receipt(run) or {}).get("data", [])
        results = storage.read_json(run / f"evaluation_{checkpoint.path.name}.json")["results"]
        for task, result in results.items():
            numbers = (f"{k} {v:.4f}" for k, v in result.items() if type(v) is float)
            facts[task] = ", ".join(n for n in numbers if not n.startswith("seconds"))
    if begun:
        facts["begun with"] = Path(begun).name
    if checkpoint.lora is not None:
        facts["adapters"] = f"LoRA of rank {checkpoint.lora.rank}, merged"
    known = {d.source: d.source for d in DATASETS.values() if d.kind in ("hub", "shards")}
    known |= {name: d.repo for name, d in CHAT_DATASETS.items()}
    names = [str(entry.get("source") or entry.get("path", "")) for entry in data]
    if names:
        facts["data"] = ", ".join(Path(name).name for name in names)
    return facts, hf.HUB_NAMES.get(begun, ""), sorted({known[n] for n in names if n in known})


def push(folder: Path, name: str) -> None:
    """Uploads a folder to the hub as NAME, with the token of `hf auth login`. Raises OSError where
    that fails; the folder stays."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
        found = HfApi().upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # the hub client raises errors of many libraries
        reason = str(error).strip().split("\n")[0]
        words = f"{folder} is written, but cannot be uploaded as {name} ({reason}): check the name,"
        raise OSError(f"{words} the network and `hf auth login`") from error
    print(f"uploaded: {found}")
