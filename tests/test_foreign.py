"""Files of nanoGPT, build-nanogpt, llm.c and torch.save, written here in their forms. The oracle is
transformers, with random weights."""

import pickle
import re
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

import gpt2
from gpt2 import hf
from gpt2.checkpoint import load_chat_template, load_tokenizer, save_checkpoint
from gpt2.tokenizer import GPT2Tokenizer

SHAPE = dict(n_layer=2, n_head=2, n_embd=16, block_size=24)
HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"


@dataclass
class GPTConfig:  # build-nanogpt's
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int


def make(rows: int, activation: str = "gelu_new", bias: bool = True):
    """A model of transformers, and its weights as the three trainers have them."""
    theirs = GPT2LMHeadModel(
        GPT2Config(
            n_layer=2, n_head=2, n_embd=16, n_positions=24, vocab_size=rows, bos_token_id=None,
            eos_token_id=None, activation_function=activation,
        )
    ).eval()  # fmt: skip
    for name, p in theirs.named_parameters():
        p.data += 0.1 * torch.randn_like(p)
        p.data *= bias or not name.endswith("bias")
    weights = {n: v.clone() for n, v in theirs.state_dict().items()}
    weights = {n: v for n, v in weights.items() if bias or not n.endswith("bias")}
    turned = {n: v.t().contiguous() if hf.is_transposed(n) else v for n, v in weights.items()}
    return theirs, turned


def nanogpt(weights, rows, **changes) -> dict:
    args = SHAPE | {"vocab_size": rows, "dropout": 0.1, "bias": "lm_head.bias" in weights}
    args["bias"] = "transformer.ln_f.bias" in weights
    config = {"dataset": "shakespeare_char", "compile": True, "lr": 1e-3}
    return {"model": weights, "model_args": args | changes, "iter_num": 7, "config": config,
            "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1.0}]},
            "best_val_loss": torch.tensor(1.5)}  # fmt: skip


def build(weights, rows, module="__main__") -> dict:
    GPTConfig.__module__ = module
    sys.modules.setdefault(module, ModuleType(module)).GPTConfig = GPTConfig  # where pickle looks
    return {"model": weights, "config": GPTConfig(vocab_size=rows, **SHAPE), "step": 5}


def llmc(weights, version=3, magic=20240326, padded=50304, vocab=50257, **changes) -> bytes:
    shape = SHAPE | changes
    header = torch.zeros(256, dtype=torch.int32)
    keys = ("n_layer", "n_head", "n_embd")
    sizes = [magic, version, shape["block_size"], vocab, *(shape[k] for k in keys), padded]
    header[:8] = torch.tensor(sizes)
    table = torch.nn.functional.pad(weights[TABLE], (0, 0, 0, 50304 - 50257))
    kinds = "ln_1.weight ln_1.bias attn.c_attn.weight attn.c_attn.bias attn.c_proj.weight " \
        "attn.c_proj.bias ln_2.weight ln_2.bias mlp.c_fc.weight mlp.c_fc.bias mlp.c_proj.weight " \
        "mlp.c_proj.bias"  # fmt: skip
    parts = [table, weights["transformer.wpe.weight"]]
    parts += [weights[f"transformer.h.{i}.{kind}"] for kind in kinds.split() for i in (0, 1)]
    parts += [weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"]]
    dtype = torch.bfloat16 if version == 5 else torch.float32
    whole = torch.cat([part.flatten() for part in parts]).to(dtype)
    return header.numpy().tobytes() + whole.view(torch.uint8).numpy().tobytes()


def save(path, content, legacy=False):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def compiled(weights):
    return {f"_orig_mod.{name}": value for name, value in weights.items()}


def with_mask(weights):
    return weights | {"transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24)}


@pytest.mark.parametrize(
    "name, form, options",
    [
        ("ckpt.pt", lambda w, r: nanogpt(w, r), dict(rows=50304, activation="gelu")),
        ("ckpt.pt", lambda w, r: nanogpt(compiled(w), r, bias=False),
         dict(rows=99, activation="gelu", bias=False)),
        ("ckpt.pt", lambda w, r: nanogpt(with_mask(w), r), dict(rows=99, activation="gelu")),
        ("model_05000.pt", build, dict(rows=50304)),
        ("model_05000.pt", lambda w, r: build(compiled(w), r, "train_gpt2"), dict(rows=99)),
        ("model.bin", lambda w, r: llmc(w), dict(rows=50257)),
        ("model_bf16.bin", lambda w, r: llmc(w, 5), dict(rows=50257)),
    ],
    ids=["nanogpt", "no bias, compiled", "mask", "build", "imported", "llm.c", "llm.c, bf16"],
)  # fmt: skip
@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_other_trainers_give_their_logits(tmp_path, name, form, options, legacy):
    theirs, weights = make(**options)
    if "bf16" in name:
        for p in theirs.parameters():
            p.data = p.data.bfloat16().float()
    path = save(tmp_path / name, form(weights, options["rows"]), legacy)
    ours = gpt2.load_model(str(path), kernels="torch").eval()
    idx = torch.randint(0, 99, (2, 24))
    with torch.no_grad():
        assert_close(ours(idx), theirs(idx).logits, rtol=1e-5, atol=1e-5)
    assert ours.config.exact_gelu == (name == "ckpt.pt") and load_chat_template(path) is None
    assert (ours.config.bias, ours.config.block_size) == (options.get("bias", True), 24)
    assert ours.n_tokens == min(50257, options["rows"])
    if options["rows"] > 99:
        assert load_tokenizer(path).name == "gpt2"


def test_a_nanogpt_without_the_option_bias_is_of_before_the_exact_gelu(tmp_path):
    theirs, weights = make(99)
    content = nanogpt(weights, 99)
    del content["model_args"]["bias"]
    ours = gpt2.load_model(save(tmp_path / "ckpt.pt", content), kernels="torch").eval()
    idx = torch.randint(0, 99, (2, 24))
    assert_close(ours(idx), theirs(idx).logits, rtol=1e-5, atol=1e-5)


def test_the_exact_gelu_goes_through_checkpoints_and_exports(tmp_path):
    theirs, weights = make(50257, "gelu")
    first = gpt2.load_model(save(tmp_path / "ckpt.pt", nanogpt(weights, 50257)), kernels="torch")
    save_checkpoint(tmp_path / "run", 1, first, tokenizer={"name": "gpt2"}, train={})
    second = gpt2.load_model(tmp_path / "run", kernels="torch").eval()
    hf.export_hf(second, tmp_path / "out", GPT2Tokenizer())
    third = gpt2.load_model(tmp_path / "out", kernels="torch").eval()
    again, idx = GPT2LMHeadModel.from_pretrained(tmp_path / "out"), torch.randint(0, 99, (2, 24))
    with torch.no_grad():
        wanted = theirs(idx).logits
        for logits in (second(idx), third(idx), again.eval()(idx).logits):
            assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["beside", "data/shakespeare_char"])
def test_characters_come_from_the_meta_of_nanogpts_data(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "beside" / "ckpt.pt"
    for folder in ("beside", "data/shakespeare_char"):
        (tmp_path / folder).mkdir(parents=True)
    save(path, nanogpt(make(3, "gelu")[1], 3))
    with pytest.raises(ValueError, match="vocabulary of 3 is not GPT-2's .* there is no meta.pkl"):
        load_tokenizer(path)
    meta = tmp_path / where / "meta.pkl"
    meta.write_bytes(pickle.dumps({"itos": {0: "a", 1: "b", 2: "c"}}))
    assert load_tokenizer(path).encode("cab") == [2, 0, 1]
    meta.write_bytes(pickle.dumps({"itos": {0: "a"}}))
    with pytest.raises(ValueError, match="of .* has 1: put the meta.pkl"):
        load_tokenizer(path)
    assert gpt2.load_model(path).n_tokens == 3


class Evil:
    def __reduce__(self):
        return eval, ("open('evil', 'w')",)


def torch_file(change):
    """A nanoGPT checkpoint of 99 rows in which change(content, weights) altered something."""

    def content(weights):
        content = nanogpt(weights, 99)
        change(content, weights)
        return content

    return content


def lie(content, weights):
    """One number that says it is a table; one memory for two tensors would do as well."""
    content["model_args"] |= {"vocab_size": 1 << 22}
    weights[TABLE] = weights[HEAD] = torch.zeros(1, 16).expand(1 << 22, 16)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")  # torch 2.14's, of the sparse one
@pytest.mark.parametrize(
    "content, message",
    [
        (torch_file(lambda c, w: c["model_args"].update(block_size=32)), "wpe.weight has shape"),
        (torch_file(lambda c, w: c["model_args"].update(vocab_size=98)), "wte.weight has shape"),
        (torch_file(lambda c, w: c["model_args"].update(n_layer=3)), "missing .*h.2.attn"),
        (torch_file(lambda c, w: c["model_args"].update(bias=False)), "unknown .*attn.c_attn.bias"),
        (torch_file(lambda c, w: c["model_args"].pop("n_layer")), "pt: missing .*'n_layer'"),
        (torch_file(lambda c, w: c["model_args"].update(n_head=3)), "multiple of n_head 3"),
        (torch_file(lambda c, w: c["model_args"].update(n_kv_head=1)), "n_kv_head cannot be 1"),
        (torch_file(lambda c, w: c["model_args"].update(n_embd=-4)), "n_embd cannot be -4"),
        (torch_file(lambda c, w: w.update({HEAD: w[HEAD] + 1})), "is a head of its own"),
        (torch_file(lambda c, w: w.pop(TABLE)), "missing .*wte.weight"),
        (torch_file(lambda c, w: w[TABLE].fill_(float("nan"))), "not finite"),
        (torch_file(lambda c, w: w.update({TABLE: w[TABLE].double()})), "dtype torch.float64"),
        (torch_file(lambda c, w: w.update(x=[1])), "x is a list, not a dense tensor"),
        (torch_file(lambda c, w: w.update(x=torch.eye(2).to_sparse())), "not a dense tensor"),
        (torch_file(lambda c, w: w.update(x=torch.empty(2, device="meta"))), "not a dense tensor"),
        (torch_file(lambda c, w: w.update(x=torch.ones(2, dtype=torch.complex64))), "unknown .'x'"),
        (torch_file(lie), "bytes of tensors in a file of .*: damaged"),
        (torch_file(lambda c, w: c.update(x=Evil())), "a pickle that names .*eval"),
        (torch_file(lambda c, w: c.update(x=re.compile("a"))), "a pickle that names re._compile"),
        (torch_file(lambda c, w: c.pop("model_args")), "unknown kind .it holds 'model', 'iter_"),
        (lambda w: w, "unknown kind .it holds 'transformer.wte.weight'.*name the folder"),
        (lambda w: torch.zeros(3), "holds a Tensor"),
        (lambda w: pickle.dumps(Evil(), 2), "ckpt.pt: a pickle that names .*eval"),
        (lambda w: pickle.dumps({"a": 1}), "damaged or cut short, or not of torch.save"),
        (lambda w: b"\x80\x02}", "damaged or cut short, or not of torch.save"),
        (lambda w: b"PK\x03\x04" + bytes(99), "damaged or cut short, or not of torch.save"),
        (lambda w: b"", "unknown kind .it begins with b''.: nanoGPT's ckpt.pt"),
        (lambda w: b"GGUF" + bytes(99), "unknown kind .it begins with b'GGUF"),
        (lambda w: llmc(w, magic=20240520), "unknown kind"),
        (lambda w: llmc(w, version=1), "version 1 of llm.c's models; 3 .*write it again"),
        (lambda w: llmc(w)[:-4], "header promises .* cut short or damaged"),
        (lambda w: llmc(w) + b"more", "header promises .* cut short or damaged"),
        (lambda w: llmc(w)[:40], "header promises .* cut short or damaged"),
        (lambda w: llmc(w)[:20], "n_head cannot be 0"),
        (lambda w: llmc(w, vocab=50305), "50304 padded rows for a vocabulary of 50305"),
        (lambda w: llmc(w, n_layer=-1), "n_layer cannot be -1"),
        (lambda w: llmc(w, n_embd=1 << 23), "header promises"),
        (lambda w: llmc(w, n_layer=3), "header promises"),
    ],
)  # fmt: skip
def test_other_files_are_refused_by_name(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt.pt"
    _, weights = make(50257 if "llmc" in content.__code__.co_names else 99, "gelu")
    save(path, content(weights))
    for load in (gpt2.load_model, load_tokenizer)[: 1 + ("unknown kind" in message)]:
        with pytest.raises((ValueError, OSError), match=message) as error:
            load(path)
        assert str(path) in str(error.value) and len(str(error.value)) < 500
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_checkpoint_that_is_cut_short_is_refused(tmp_path, share):
    path = save(tmp_path / "ckpt.pt", nanogpt(make(99, "gelu")[1], 99))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: damaged or cut short"):
        gpt2.load_model(path)


def test_a_folder_of_a_files_name_is_a_folder(tmp_path):
    (tmp_path / "out" / "ckpt.pt").mkdir(parents=True)
    with pytest.raises(OSError, match="not a model: a folder with"):
        gpt2.load_model(tmp_path / "out" / "ckpt.pt")
    save(tmp_path / "out" / "ckpt_2.pt", nanogpt(make(99)[1], 99))
    with pytest.raises(OSError, match="ckpt_2.pt may be: name the file"):
        gpt2.load_model(tmp_path / "out")


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_a_folder_with_pytorch_model_bin(tmp_path, shards, activation):
    theirs, _ = make(99, activation)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    items = [*theirs.state_dict().items()]
    names = ["pytorch_model.bin"] if shards == 1 else ["pytorch_model-1.bin", "pytorch_model-2.bin"]
    parts = [dict(items[i::shards]) for i in range(shards)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, tmp_path / name)
    if shards == 2:
        weight_map = {n: name for name, part in zip(names, parts, strict=True) for n in part}
        text = hf.json.dumps({"weight_map": weight_map})
        (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    ours, idx = gpt2.load_model(tmp_path, kernels="torch").eval(), torch.randint(0, 99, (2, 24))
    assert_close(ours(idx), theirs(idx).logits, rtol=1e-5, atol=1e-5)
    torch.save(parts[0] | {"x": Evil()}, tmp_path / names[0])
    with pytest.raises(ValueError, match=f"{names[0]}: a pickle that names"):
        gpt2.load_model(tmp_path)
