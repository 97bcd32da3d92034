"""transformers' GPT2LMHeadModel is the oracle, with random weights."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import gpt2
from gpt2 import hf
from gpt2.checkpoint import load_tokenizer
from gpt2.config import PRESETS, GPTConfig
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.train.objectives import LanguageModeling

ODD = GPTConfig(n_layer=3, n_head=5, n_embd=60, block_size=37, vocab_size=501)


def theirs_like(config: GPTConfig) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
            n_positions=config.block_size, vocab_size=config.vocab_size,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    for p in model.parameters():  # biases and layer norms away from 0 and 1 too
        p.data += 0.02 * torch.randn_like(p)
    return model


def save(model: GPT2LMHeadModel, folder) -> None:
    model.save_pretrained(folder)


def test_logits_loss_and_every_gradient(tmp_path):
    theirs = theirs_like(ODD)
    save(theirs, tmp_path)
    ours = gpt2.load_model(tmp_path, kernels="torch")
    assert ours.config == ODD
    idx = torch.randint(0, 501, (3, 37))
    out = theirs(idx, labels=idx)
    assert_close(ours(idx), out.logits, rtol=1e-4, atol=1e-5)
    loss, _ = LanguageModeling(ours)({"idx": idx[:, :-1], "targets": idx[:, 1:].contiguous()})
    loss = loss / (3 * 36)
    assert_close(loss, out.loss, rtol=1e-5, atol=1e-6)
    loss.backward()
    out.loss.backward()
    grads = {name: p.grad for name, p in ours.named_parameters()}
    for name, p in theirs.named_parameters():
        mine = grads.pop(name)
        mine = mine.t() if hf.is_transposed(name) else mine[: len(p)]
        assert_close(mine, p.grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert not grads


def test_logits_at_the_124m_shape(tmp_path):
    theirs = theirs_like(PRESETS["gpt2"])
    save(theirs, tmp_path)
    ours = gpt2.load_model(tmp_path, kernels="torch")
    assert ours.n_params() == 124_439_808
    idx = torch.randint(0, 50257, (2, 96))
    with torch.no_grad():
        assert (ours(idx) - theirs(idx).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("length", [1, 2, 13])
def test_greedy_continuation_token_for_token(tmp_path, length):
    theirs = theirs_like(ODD)
    save(theirs, tmp_path)
    ours = gpt2.load_model(tmp_path, kernels="torch")
    prompt = torch.randint(0, 501, (1, length))
    expected = theirs.generate(
        prompt, max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(prompt)
    )
    [mine] = gpt2.generate(ours, prompt.tolist(), max_new_tokens=20, temperature=0)
    assert mine == expected[0, length:].tolist()


@pytest.mark.parametrize("bias", [True, False])
def test_export_loads_in_transformers(tmp_path, bias):
    config = GPTConfig(n_layer=2, n_head=3, n_embd=48, block_size=33, vocab_size=50257, bias=bias)
    ours = gpt2.GPT(config, "torch")
    hf.export_hf(ours, tmp_path / "out", GPT2Tokenizer())
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    idx = torch.randint(0, 50257, (2, 33))
    with torch.no_grad():
        assert_close(theirs(idx).logits, ours(idx), rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("hello world")["input_ids"] == [31373, 995]
    again = gpt2.load_model(tmp_path / "out", kernels="torch")
    assert_close(again(idx), ours(idx))
    with pytest.raises(OSError):
        hf.export_hf(ours, tmp_path / "out")


def test_openais_own_layout(tmp_path):
    """Names without prefix, with the causal mask as a buffer, as openai-community/gpt2 has them."""
    from safetensors.torch import load_file, save_file

    theirs = theirs_like(ODD)
    save(theirs, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 37, 37)
    save_file(bare, tmp_path / "model.safetensors")
    idx = torch.randint(0, 501, (1, 37))
    ours = gpt2.load_model(tmp_path, kernels="torch")
    assert_close(ours(idx), theirs(idx).logits, rtol=1e-4, atol=1e-5)


def test_sharded_folder(tmp_path):
    theirs = theirs_like(ODD)
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    idx = torch.randint(0, 501, (1, 37))
    ours = gpt2.load_model(tmp_path, kernels="torch")
    assert_close(ours(idx), theirs(idx).logits, rtol=1e-4, atol=1e-5)


def test_names_of_the_hub_are_downloaded(tmp_path, monkeypatch):
    save(theirs_like(ODD), tmp_path)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo, **_: asked.append(repo) or str(tmp_path)
    )
    assert gpt2.load_model("gpt2-medium", kernels="torch").config == ODD
    assert gpt2.load_model("someone/model", kernels="torch").config == ODD
    assert asked == ["openai-community/gpt2-medium", "someone/model"]


def test_a_folder_of_the_same_name_does_not_hide_the_hub(tmp_path, monkeypatch):
    """As the package's own folder would, for a script run in the checkout."""
    save(theirs_like(ODD), tmp_path / "downloaded")
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: "downloaded")
    assert gpt2.load_model("gpt2", kernels="torch").config == ODD
    assert load_tokenizer("gpt2").name == "gpt2"


def test_download_that_fails():
    with pytest.raises(OSError, match="cannot download 'openai-community/gpt2-xl'"):
        gpt2.load_model("gpt2-xl")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"n_inner": 7}, "n_inner is 7"),
        ({"n_layer": 2}, "unknown"),
        ({"n_layer": 4}, "missing"),
        ({"n_positions": 36}, "transformer.wpe.weight has shape"),
    ],
)
def test_folders_that_are_something_else(tmp_path, change, message):
    save(theirs_like(ODD), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        gpt2.load_model(tmp_path, kernels="torch")


def test_folders_with_damage(tmp_path):
    save(theirs_like(ODD), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or cut short"):
        gpt2.load_model(tmp_path, kernels="torch")
    weights.unlink()
    with pytest.raises(OSError, match="safetensors weights"):
        gpt2.load_model(tmp_path, kernels="torch")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        gpt2.load_model(tmp_path, kernels="torch")
