"""transformers' GPT2LMHeadModel is the oracle, with random weights."""

import json
from dataclasses import replace
from importlib import resources

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import gpt2
from gpt2 import hf
from gpt2.checkpoint import load_chat_template, load_tokenizer, save_checkpoint
from gpt2.config import PRESETS, GPTConfig
from gpt2.data.chat import jinja
from gpt2.export import limits
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.train.objectives import LanguageModeling
from gpt2.train.pretrain import pretrain

ODD = GPTConfig(n_layer=3, n_head=5, n_embd=60, block_size=37, vocab_size=501)
SMALL = GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=50257)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TABLE, HEAD = "transformer.wte.weight", "lm_head.weight"


def save_theirs(folder, config=ODD, **options) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
            n_positions=config.block_size, vocab_size=config.vocab_size,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    for p in model.parameters():  # biases and layer norms away from 0 and 1 too
        p.data += 0.02 * torch.randn_like(p)
    model.save_pretrained(folder, **options)
    return model


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(path, change):
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path)


def turned(name, ours, theirs):
    """A parameter of ours as transformers has it."""
    return ours.t() if hf.is_transposed(name) else ours[: len(theirs)]


def test_logits_loss_and_every_gradient(tmp_path):
    theirs = save_theirs(tmp_path)
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
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    found = {n: turned(n, p.grad, expected[n]) for n, p in ours.named_parameters()}
    assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_logits_at_the_124m_shape(tmp_path):
    theirs = save_theirs(tmp_path, PRESETS["gpt2"])
    ours = gpt2.load_model(tmp_path, kernels="torch")
    assert ours.n_params() == 124_439_808
    idx = torch.randint(0, 50257, (2, 96))
    with torch.no_grad():
        assert (ours(idx) - theirs(idx).logits).abs().max() <= 1e-4


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
    # As transformers writes it, with a token for padding, it is still GPT-2's.
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert load_tokenizer(tmp_path / "out").name == "gpt2"
    with pytest.raises(OSError):
        hf.export_hf(ours, tmp_path / "out")


def test_what_muon_trained_is_a_gpt2(train_config, tmp_path):
    pretrain(replace(train_config, optimizer="muon"))
    ours = gpt2.load_model(tmp_path / "runs" / "run", kernels="torch")
    hf.export_hf(ours, tmp_path / "out", None)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    idx = torch.randint(0, 65, (4, 32))
    with torch.no_grad():
        assert_close(theirs(idx).logits, ours(idx), rtol=1e-4, atol=1e-5)


def openais_own(tensors):
    """Names without prefix, with the causal mask as a buffer, as openai-community/gpt2 has them."""
    bare = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    return bare | {"h.0.attn.bias": torch.ones(1, 1, 37, 37, dtype=torch.bool)}


@pytest.mark.parametrize(
    "change, dtype",
    [
        (openais_own, torch.float32),
        (lambda t: t | {HEAD: t[TABLE].clone()}, torch.float32),
        (lambda t: {k: v.half() for k, v in t.items()}, torch.float16),
        (lambda t: {k: v.bfloat16() for k, v in t.items()}, torch.bfloat16),
        (None, torch.float32),
    ],
    ids=["openai", "head", "float16", "bfloat16", "sharded"],
)
def test_layouts_of_the_same_weights(tmp_path, change, dtype):
    theirs = save_theirs(tmp_path, max_shard_size="50GB" if change else "200KB")
    assert (tmp_path / INDEX).exists() == (change is None)
    if change:
        change_tensors(tmp_path / WEIGHTS, change)
    ours = dict(gpt2.load_model(tmp_path, kernels="torch").named_parameters())
    for name, p in theirs.named_parameters():
        assert torch.equal(turned(name, ours[name], p), p.to(dtype).float()), name


def test_names_of_the_hub_are_downloaded(tmp_path, monkeypatch):
    """Though a folder has the same name, as the package's own has in the checkout."""
    save_theirs(tmp_path / "downloaded")
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo, **_: asked.append(repo) or "downloaded"
    )
    for name in ("gpt2", "gpt2-medium", "someone/model"):
        assert gpt2.load_model(name, kernels="torch").config == ODD
    assert asked == ["openai-community/gpt2", "openai-community/gpt2-medium", "someone/model"]
    assert load_tokenizer("gpt2").name == "gpt2"
    with pytest.raises(ValueError, match="downloaded: has no tokenizer files"):
        load_tokenizer("someone/model")
    monkeypatch.undo()
    with pytest.raises(OSError, match="cannot download 'openai-community/gpt2-xl'"):
        gpt2.load_model("gpt2-xl")


@pytest.mark.parametrize("name, calls", [(WEIGHTS, 1), ("model-1-of-2.safetensors", 1), ("x", 2)])
def test_pickles_are_downloaded_where_there_is_nothing_else(tmp_path, monkeypatch, name, calls):
    (tmp_path / name).touch()
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda repo, allow_patterns: asked.append(allow_patterns) or str(tmp_path),
    )
    assert hf.download("someone/model") == tmp_path
    assert ["pytorch_model*.bin" in patterns for patterns in asked] == [False, True][:calls]


def change_config(**changes):
    return lambda folder: change_json(folder / "config.json", **changes)


def change_weights(**changes):
    """Each named parameter is what its function gives for the embedding table (501, 60)."""
    names = {"table": TABLE, "bare": "wte.weight", "head": HEAD}
    return lambda folder: change_tensors(
        folder / WEIGHTS, lambda t: t | {names[n]: f(t[TABLE]) for n, f in changes.items()}
    )


def write_index(text):
    def change(folder):
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(text)

    return change


def write_config(text):
    return lambda folder: (folder / "config.json").write_text(text)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (change_config(model_type="llama"), "model_type is 'llama'"),
        (change_config(activation_function="relu"), "activation_function is 'relu'"),
        (change_config(tie_word_embeddings=False), "tie_word_embeddings is False"),
        (change_config(layer_norm_epsilon=[]), r"layer_norm_epsilon is \[\]"),
        (change_config(n_inner=7), "n_inner is 7"), (change_config(n_layer=2), "unknown"),
        (change_config(n_layer=4), "missing"),
        (change_config(n_head=7), "n_embd 60 must be a multiple of n_head 7"),
        (change_config(n_embd=5 << 20), "h.0.attn.c_attn.bias has shape .180,., .*.15728640,."),
        (change_config(n_positions=36), "transformer.wpe.weight has shape"),
        (write_config("{"), "config.json: not valid JSON"),
        (write_config("[" * 100_000), "config.json: not valid JSON"),
        (write_config("[]"), "config.json: must hold an object"),
        (write_index('{"metadata": {"total'), "index.json: not valid JSON"),
        (write_index("{}"), "weight_map must name files of this folder"),
        (write_index('{"weight_map": {"a": []}}'), "weight_map must name files of this folder"),
        (write_index('{"weight_map": {"a": "../a"}}'), "weight_map must name files of this folder"),
        (write_index('{"weight_map": {"a": "model-1.safetensors"}}'), "no such file.*model-1"),
        (lambda d: (d / WEIGHTS).unlink(), "no such file.*model.safetensors"),
        (lambda d: cut(d / WEIGHTS), "model.safetensors: damaged or cut short"),
        (lambda d: (d / WEIGHTS).write_bytes(b"\x80\x02}."), "or not safetensors"),
        (lambda d: (d / WEIGHTS).rename(d / "pytorch_model.bin"), "_model.bin: damaged"),
        (change_weights(head=torch.randn_like), "lm_head.weight is a head of its own"),
        (change_weights(bare=torch.clone), "weight is there twice"),
        (change_weights(table=lambda x: x[:, :1]), "wte.weight has shape .501, 1."),
        (change_weights(table=torch.Tensor.double), "wte.weight has shape .501, 60., dtype F64"),
        (change_weights(table=lambda x: x / 0), "wte.weight holds values that are not finite"),
    ],
)  # fmt: skip
def test_folders_of_something_else_or_with_damage(tmp_path, spoil, message):
    save_theirs(tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, OSError), match=f"(?=.*{tmp_path}).*{message}"):
        gpt2.load_model(tmp_path, kernels="torch")


@pytest.mark.parametrize("key", ["n_layer", "n_head", "n_embd", "vocab_size", "n_positions"])
def test_sizes_that_are_none(tmp_path, key):
    for value in (0, -8, True, None, "501", 1.0, float("nan"), 10**12, [], {}):
        sizes = {"n_layer": 3, "n_head": 5, "n_embd": 60, "vocab_size": 501} | {key: value}
        (tmp_path / "config.json").write_text(json.dumps(sizes))
        ours = key.replace("n_positions", "block_size")
        with pytest.raises(ValueError, match=f"config.json: {ours} cannot be .* number from 1 to"):
            gpt2.load_model(tmp_path)


@pytest.fixture
def small(tmp_path):
    hf.export_hf(gpt2.GPT(SMALL, "torch"), tmp_path / "small", GPT2Tokenizer())
    return tmp_path / "small"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda d: change_json(d / "vocab.json", dog=1), "vocab.json: a tokenizer of its own"),
        (lambda d: cut(d / "merges.txt"), "merges.txt: a tokenizer of its own"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json: not a tokenizer that"),
        (lambda d: (d / "spiece.model").write_text(""), "spiece.model: a tokenizer of its own"),
        (lambda d: (d / "added_tokens.json").write_text('{"<|user|>": 50257}'), "added_tokens"),
        (lambda d: change_json(d / "config.json", eos_token_id=7), "eos_token_id is 7"),
    ],
)
def test_tokenizers_of_another_kind_are_refused(small, spoil, message):
    assert load_tokenizer(small).name == "gpt2"
    spoil(small)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(small)
    assert gpt2.load_model(small).n_tokens == 50257  # token ids can still be used


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_of_its_own_is_refused(small, file):
    assert load_chat_template(small) is None
    (small / file).write_text('{"chat_template": "{{ messages }}"}')
    with pytest.raises(ValueError, match=f"{file}: a chat template of its own"):
        load_chat_template(small)


@pytest.mark.parametrize("rows", [50257, 50258, 50304])
def test_rows_beyond_the_tokenizer_are_kept_and_never_generated(tmp_path, rows):
    theirs = save_theirs(tmp_path / "in", replace(SMALL, vocab_size=rows))
    with torch.no_grad():  # the last row is the likeliest, always
        theirs.transformer.ln_f.bias[:] = 1.0
        theirs.transformer.wte.weight[-1] = 50.0
    theirs.save_pretrained(tmp_path / "in")
    model, idx = gpt2.load_model(tmp_path / "in", kernels="torch"), torch.randint(0, rows, (1, 9))
    assert_close(model(idx), theirs(idx).logits, rtol=1e-4, atol=1e-4)
    [tokens] = gpt2.generate(model, [[1]], max_new_tokens=9, temperature=0, repetition_penalty=1.1)
    assert (model.n_tokens, max(tokens) < 50257) == (50257, True)
    assert load_tokenizer(tmp_path / "in").decode(tokens)
    hf.export_hf(model, tmp_path / "out", GPT2Tokenizer())
    assert load_file(tmp_path / "out" / WEIGHTS)["wte.weight"].shape == (rows, 8)
    vocab = resources.files("gpt2") / "assets" / "encoder.json"
    assert (tmp_path / "out" / "vocab.json").read_bytes() == vocab.read_bytes()


def train_bpe(folder, **options):
    """A BPE of bytes of its own, with its end of text first, as the tokenizers library makes it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["</s>"], initial_alphabet=alphabet
    )
    text = (resources.files("gpt2") / "assets" / "tiny_shakespeare.txt").read_text()
    theirs.train_from_iterator([text[:50_000]], trainer)
    theirs.add_tokens(["[NAME]"])
    theirs.save(str(folder / "tokenizer.json"))
    return theirs


def test_a_tokenizer_json_of_its_own_is_used_and_goes_through_checkpoints_and_exports(tmp_path):
    config = replace(SMALL, vocab_size=512)
    save_theirs(tmp_path, config)
    theirs, ours = train_bpe(tmp_path), []
    change_json(tmp_path / "config.json", eos_token_id=0)
    model = gpt2.load_model(tmp_path, kernels="torch")
    assert model.n_tokens == 501 and theirs.get_vocab_size() == 501
    ours.append(load_tokenizer(tmp_path))
    save_checkpoint(tmp_path / "run", 1, model, tokenizer=ours[0].to_dict(), train={})
    ours.append(load_tokenizer(tmp_path / "run"))
    hf.export_hf(model, tmp_path / "out", ours[1])
    ours.append(load_tokenizer(tmp_path / "out"))
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("To be, or not", "it's\t\n\n  \u4e2d\U0001f600\xe9 [NAME]x", "", "<|endoftext|>"):
        wanted = theirs.encode(text).ids
        assert again(text)["input_ids"] == wanted
        for tokenizer in ours:
            assert tokenizer.encode(text) == wanted and tokenizer.decode(wanted) == text
    assert {t.eot for t in ours} == {0} and again.eos_token == ours[0].decode([0]) == "</s>"
    assert 0 not in ours[0].encode("</s>")
    assert ours[0].encode("a<|endoftext|>", allow_special=True)[-1] == 0
    with pytest.raises(ValueError, match="how this model's own tokenizer splits text.*--format hf"):
        list(limits(model, ours[0], None, "gguf", "f32"))


def change_json_at(*keys, value):
    def change(content):
        *way, last = keys
        for key in way:
            content = content[key]
        content[last] = value

    return change


PREFIX = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
AROUND = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}


@pytest.mark.parametrize(
    "change, eos, message",
    [
        (change_json_at("model", "dropout", value=0.1), 0, "another kind than BPE"),
        (change_json_at("pre_tokenizer", value=PREFIX), 0, "another kind than BPE"),
        (change_json_at("pre_tokenizer", value=None), 0, "not a tokenizer that is understood"),
        (change_json_at("post_processor", value=AROUND), 0, "another kind than BPE"),
        (lambda c: c["model"]["vocab"].pop("!"), 0, "another kind than BPE"),
        (change_json_at("added_tokens", 1, "id", value=10**9), 0, "another kind than BPE"),
        (change_json_at("model", "merges", value=[["a", "zzz"]]), 0, "that is understood .*zzz"),
        (change_json_at("model", value=WORDS), 0, "another kind than BPE"),
        (lambda c: None, 501, "eos_token_id 501 of config.json is none of its tokens"),
        (lambda c: None, [0], "eos_token_id .0. of config.json is none of its tokens"),
    ],
)  # fmt: skip
def test_a_tokenizer_json_that_is_not_understood_is_refused(tmp_path, change, eos, message):
    save_theirs(tmp_path, replace(SMALL, vocab_size=512))
    train_bpe(tmp_path)
    change_json(tmp_path / "config.json", eos_token_id=eos)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer.json: .*{message}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("generation", [True, False])
def test_a_folders_chat_template_is_used_where_it_is_one_of_ours(small, generation):
    (small / "chat_template.jinja").write_text(jinja("alpaca_2", generation))
    assert load_chat_template(small) == "alpaca_2"
