"""LoRA against peft, on transformers' GPT-2 with the same random weights."""

import json
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import GPT2LMHeadModel

from gpt2 import GPT, lora
from gpt2.config import GPTConfig, LoRAConfig
from gpt2.hf import export_hf, load_hf
from gpt2.lora import adapter_parameters, adapters_off, add_lora, load_adapters, save_adapters
from gpt2.model import Linear
from gpt2.train.objectives import LanguageModeling

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=20, block_size=16, vocab_size=101)
TARGETS = [("c_attn",), ("c_attn", "c_proj", "c_fc"), ("attn.c_proj", "mlp.c_fc")]
# peft's use
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def make_base(folder, seed=0) -> GPT:
    """A random model, and its export for transformers in folder."""
    torch.manual_seed(seed)
    model = GPT(SHAPE, "torch")
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    model.transformer.wte.weight.data[SHAPE.vocab_size :] = 0.0
    export_hf(model, folder)
    return model


def adapted(folder, *args, **options) -> GPT:
    """One with adapters that do something: B is not zero."""
    model = add_lora(make_base(folder), LoRAConfig(*args, **options))
    for parameter in adapter_parameters(model).values():
        parameter.data = 0.3 * torch.randn_like(parameter)
    return model


def some_tokens(rows=2):
    return torch.randint(0, SHAPE.vocab_size, (rows, 16))


@pytest.mark.parametrize("targets", TARGETS)
def test_our_files_in_peft_outputs_loss_and_gradients(tmp_path, targets):
    model = adapted(tmp_path / "hf", 3, 5.0, targets=targets)
    save_adapters(model, tmp_path / "adapters", str(tmp_path / "hf"))
    theirs = peft.PeftModel.from_pretrained(
        GPT2LMHeadModel.from_pretrained(tmp_path / "hf"), tmp_path / "adapters", is_trainable=True
    )
    assert theirs.peft_config["default"].fan_in_fan_out
    idx = some_tokens(3)
    out = theirs(idx, labels=idx)
    assert_close(model(idx), out.logits, rtol=1e-5, atol=1e-5)
    batch = {"idx": idx[:, :-1], "targets": idx[:, 1:].contiguous()}
    loss = LanguageModeling(model)(batch)[0] / batch["targets"].numel()
    assert_close(loss, out.loss, rtol=1e-6, atol=1e-6)
    loss.backward()
    out.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = ((n, p.grad) for n, p in theirs.named_parameters() if p.grad is not None)
    expected = {n.removeprefix(lora.PREFIX).replace(".default", ""): grad for n, grad in found}
    assert len(expected) == 2 * len(lora.lora_layers(model))
    assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_files_of_peft_in_ours(tmp_path, targets, rslora):
    make_base(tmp_path / "hf")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=list(targets), fan_in_fan_out=True, use_rslora=rslora,
        task_type="CAUSAL_LM", init_lora_weights="gaussian",
    )  # fmt: skip
    theirs = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path / "hf"), config)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path / "adapters")
    model = load_adapters(load_hf(tmp_path / "hf", kernels="torch"), tmp_path / "adapters")
    idx = some_tokens()
    expected = theirs.eval()(idx).logits
    assert_close(model(idx), expected, rtol=1e-5, atol=1e-5)
    # Written again, the tensors are the same, name for name.
    save_adapters(model, tmp_path / "again")
    before, after = (load_file(tmp_path / f / "adapter_model.safetensors")
                     for f in ("adapters", "again"))  # fmt: skip
    assert_close(after, before, rtol=0, atol=0)
    # Merged and exported, transformers alone computes the same.
    export_hf(lora.merge(model), tmp_path / "merged")
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    assert_close(merged(idx).logits, expected, rtol=1e-4, atol=1e-5)


def test_begins_as_no_change_and_trains_only_adapters(tmp_path):
    model, idx = make_base(tmp_path / "hf"), some_tokens()
    before, names = model(idx), {n for n, _ in model.named_parameters()}
    add_lora(model, LoRAConfig(2))
    assert torch.equal(model(idx), before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == adapter_parameters(model).keys() and len(trained) == 2 * 4 * SHAPE.n_layer
    # The weights of the base keep their names.
    assert {n for n, _ in model.named_parameters()} - trained == names


def test_off_merged_and_merged_back(tmp_path):
    model, plain = adapted(tmp_path / "hf", 4, dropout=0.5).eval(), make_base(tmp_path / "plain")
    idx = some_tokens()
    on, off = model(idx), plain(idx)
    assert (on - off).abs().max() > 0.1
    with adapters_off(model):
        assert torch.equal(model(idx), off)
    with pytest.raises(RuntimeError), adapters_off(model):
        raise RuntimeError
    assert torch.equal(model(idx), on)
    lora.merge(model)
    assert_close(model(idx), on, rtol=1e-4, atol=1e-5)
    # The same kind of layers as before, with the faster one for decoding.
    assert [*map(type, model.modules())] == [*map(type, plain.modules())]
    layer = model.transformer.h[0].mlp.c_fc
    assert type(layer) is Linear and layer.ops is model.ops and lora.lora_config(model) is None
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert all(p.requires_grad for p in model.parameters())


def test_dropout_is_on_what_adapters_see_in_training_only(tmp_path):
    model, idx = adapted(tmp_path / "hf", 4, dropout=0.5), some_tokens()
    model.set_dropout(0.0)  # that of the base; the adapters keep theirs
    assert not torch.equal(model(idx), model(idx))
    with adapters_off(model):
        assert torch.equal(model(idx), model(idx))


def test_compiled_and_bfloat16_equal_eager(tmp_path):
    model, idx = adapted(tmp_path / "hf", 4), some_tokens()

    def both(idx):  # as DPO does
        with torch.no_grad(), adapters_off(model):
            reference = model(idx)
        return model(idx), reference

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    assert_close(compiled(idx), both(idx), rtol=1e-5, atol=1e-5)
    assert all(layer.on for layer in lora.lora_layers(model).values())
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(idx)
    assert logits.dtype == torch.bfloat16
    assert_close(logits.float(), model(idx), rtol=0.05, atol=0.05)
    logits.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in adapter_parameters(model).values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"c_fc": 2}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"), ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 3}, "c_attn.lora_A.weight has shape .2, 20., .* must have .3, 20."),
        ({"r": "2"}, "rank cannot be '2'"), ({"r": None}, "rank cannot be None"),
        ({"lora_alpha": float("inf")}, "alpha cannot be inf"),
        ({"lora_alpha": None}, "alpha cannot be None"),
        ({"lora_dropout": 2}, "dropout must lie in"),
    ],
)  # fmt: skip
def test_other_adapters_are_refused(tmp_path, changes, words):
    folder = tmp_path / "adapters"
    save_adapters(add_lora(make_base(tmp_path / "hf"), LoRAConfig(2)), folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=f"{folder}.*{words}"):
        load_adapters(GPT(SHAPE), folder)


def test_adapters_and_models_that_do_not_fit(tmp_path):
    model, folder = add_lora(make_base(tmp_path / "hf"), LoRAConfig(2)), tmp_path / "adapters"
    for wrong, words in (
        (lambda: add_lora(model, LoRAConfig(2)), "merge them first"),
        (lambda: export_hf(model, tmp_path / "export"), "merge them first"),
        (lambda: save_adapters(GPT(SHAPE), folder), "no adapters to save"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
    save_adapters(model, folder)
    for change, words in (({"n_layer": 3}, "missing.*h.2"), ({"n_embd": 24}, "must have .2, 24.")):
        other = GPT(replace(SHAPE, **change))
        with pytest.raises(ValueError, match=words):
            load_adapters(other, folder)
        assert lora.lora_config(other) is None  # as it was
    with pytest.raises(OSError, match="no such file"):
        load_adapters(GPT(SHAPE), tmp_path / "nothing")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(rank=0), "at least 1"), (dict(alpha=0.0), "above 0"), (dict(dropout=1.0), "in .0, 1"),
        (dict(targets=()), "empty"), (dict(targets=("c_atn",)), "mean 'c_attn'"),
        (dict(targets=("lm_head",)), "known are"),
    ],
)  # fmt: skip
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        LoRAConfig(**options)
