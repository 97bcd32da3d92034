"""LoRA against peft, on transformers' GPT-2 with the same random weights."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import GPT2LMHeadModel

from gpt2 import GPT
from gpt2.config import GPTConfig, LoRAConfig
from gpt2.hf import export_hf, load_hf
from gpt2.lora import (
    adapter_parameters,
    adapters_off,
    add_lora,
    load_adapters,
    lora_config,
    lora_layers,
    merge,
    save_adapters,
)  # fmt: skip
from gpt2.train.objectives import LanguageModeling

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=20, block_size=16, vocab_size=101)
TARGETS = [("c_attn",), ("c_attn", "c_proj", "c_fc"), ("attn.c_proj", "mlp.c_fc")]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft's use
]


def make_base(folder, seed=0) -> GPT:
    """A random model, and its export for transformers in folder."""
    torch.manual_seed(seed)
    model = GPT(SHAPE, "torch")
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    model.transformer.wte.weight.data[SHAPE.vocab_size :] = 0.0
    export_hf(model, folder)
    return model


def randomise(model: GPT) -> None:
    """B away from zero, so that the adapters do something."""
    for parameter in adapter_parameters(model).values():
        parameter.data = 0.3 * torch.randn_like(parameter)


def loss_and_gradients(model: GPT, idx):
    batch = {"idx": idx[:, :-1], "targets": idx[:, 1:].contiguous()}
    loss = LanguageModeling(model)(batch)[0] / batch["targets"].numel()
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("targets", TARGETS)
def test_our_files_in_peft_outputs_loss_and_gradients(tmp_path, targets):
    model = add_lora(make_base(tmp_path / "hf"), LoRAConfig(3, 5.0, targets=targets))
    randomise(model)
    save_adapters(model, tmp_path / "adapters", str(tmp_path / "hf"))
    theirs = peft.PeftModel.from_pretrained(
        GPT2LMHeadModel.from_pretrained(tmp_path / "hf"), tmp_path / "adapters", is_trainable=True
    )
    assert theirs.peft_config["default"].fan_in_fan_out
    idx = torch.randint(0, SHAPE.vocab_size, (3, 16))
    out = theirs(idx, labels=idx)
    assert_close(model(idx), out.logits, rtol=1e-5, atol=1e-5)
    loss, gradients = loss_and_gradients(model, idx)
    assert_close(loss, out.loss, rtol=1e-6, atol=1e-6)
    out.loss.backward()
    expected = {
        n.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.grad is not None
    }
    assert gradients.keys() == expected.keys() and len(expected) == 2 * len(lora_layers(model))
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


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
    idx = torch.randint(0, SHAPE.vocab_size, (2, 16))
    expected = theirs.eval()(idx).logits
    assert_close(model(idx), expected, rtol=1e-5, atol=1e-5)
    # Written again, the tensors are the same, name for name.
    save_adapters(model, tmp_path / "again")
    before, after = (load_file(tmp_path / f / "adapter_model.safetensors")
                     for f in ("adapters", "again"))  # fmt: skip
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Merged and exported, transformers alone computes the same.
    export_hf(merge(model), tmp_path / "merged")
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    assert_close(merged(idx).logits, expected, rtol=1e-4, atol=1e-5)


def test_begins_as_no_change_and_trains_only_adapters(tmp_path):
    model = make_base(tmp_path / "hf")
    idx = torch.randint(0, SHAPE.vocab_size, (2, 16))
    before, names = model(idx), {n for n, _ in model.named_parameters()}
    add_lora(model, LoRAConfig(2))
    assert torch.equal(model(idx), before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == adapter_parameters(model).keys()
    # The weights of the base keep their names.
    assert {n for n, _ in model.named_parameters()} - trained == names
    assert len(trained) == 2 * 4 * SHAPE.n_layer
    c = SHAPE.n_embd
    per_block = 2 * ((c + 3 * c) + (c + c) + (c + 4 * c) + (4 * c + c))
    assert sum(p.numel() for p in adapter_parameters(model).values()) == 2 * per_block


def test_off_merged_and_merged_back(tmp_path):
    model = make_base(tmp_path / "hf").eval()
    idx = torch.randint(0, SHAPE.vocab_size, (2, 16))
    before = model(idx)
    randomise(add_lora(model, LoRAConfig(4, dropout=0.5)))
    adapted = model(idx)
    assert (adapted - before).abs().max() > 0.1
    with adapters_off(model):
        assert torch.equal(model(idx), before)
    with pytest.raises(RuntimeError), adapters_off(model):
        raise RuntimeError
    assert torch.equal(model(idx), adapted)
    names = {n for n, _ in make_base(tmp_path / "again").named_parameters()}
    merge(model)
    assert_close(model(idx), adapted, rtol=1e-4, atol=1e-5)
    assert {n for n, _ in model.named_parameters()} == names and lora_config(model) is None
    assert all(p.requires_grad for p in model.parameters())


def test_dropout_is_on_what_adapters_see_in_training_only(tmp_path):
    model = make_base(tmp_path / "hf")
    idx = torch.randint(0, SHAPE.vocab_size, (2, 16))
    randomise(add_lora(model, LoRAConfig(4, dropout=0.5)))
    model.set_dropout(0.0)  # that of the base; the adapters keep theirs
    assert not torch.equal(model(idx), model(idx))
    with adapters_off(model):
        assert torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_compiled_and_bfloat16_equal_eager(tmp_path):
    model = make_base(tmp_path / "hf")
    randomise(add_lora(model, LoRAConfig(4)))
    idx = torch.randint(0, SHAPE.vocab_size, (2, 16))

    class Both(torch.nn.Module):  # as DPO does: with and without adapters in one forward
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, idx):
            with torch.no_grad(), adapters_off(self.model):
                reference = self.model(idx)
            return self.model(idx), reference

    both = Both()
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for mine, expected in zip(compiled(idx), both(idx), strict=True):
        assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    assert all(layer.switch.on for layer in lora_layers(model).values())
    with torch.autocast("cpu", torch.bfloat16):
        adapted = model(idx)
    assert adapted.dtype == torch.bfloat16
    assert_close(adapted.float(), model(idx), rtol=0.05, atol=0.05)
    loss_and_gradients(model, idx)
    assert all(p.grad.dtype == torch.float32 for p in adapter_parameters(model).values())


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"c_fc": 2}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 3}, "rank 3 needs"),
    ],
)
def test_other_adapters_are_refused(tmp_path, changes, words):
    model = add_lora(make_base(tmp_path / "hf"), LoRAConfig(2))
    save_adapters(model, tmp_path / "adapters")
    edit_config(tmp_path / "adapters", **changes)
    with pytest.raises(ValueError, match=words):
        load_adapters(GPT(SHAPE), tmp_path / "adapters")


def test_bad_input(tmp_path):
    model = add_lora(make_base(tmp_path / "hf"), LoRAConfig(2))
    with pytest.raises(ValueError, match="merge them first"):
        add_lora(model, LoRAConfig(2))
    with pytest.raises(ValueError, match="merge"):
        export_hf(model, tmp_path / "export")
    folder = tmp_path / "adapters"
    save_adapters(model, folder)
    deeper = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=20, block_size=16, vocab_size=101))
    with pytest.raises(ValueError, match="another model.*3 layers.*h.2"):
        load_adapters(deeper, folder)
    wider = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=24, block_size=16, vocab_size=101))
    with pytest.raises(ValueError, match="another model.*width 24"):
        load_adapters(wider, folder)
    assert lora_config(wider) is None  # as it was
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-40])
    with pytest.raises(ValueError, match="damaged"):
        load_adapters(GPT(SHAPE), folder)
    with pytest.raises(OSError, match="needs adapter_model"):
        load_adapters(GPT(SHAPE), tmp_path / "nothing")
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapters(GPT(SHAPE), folder)
    for options, words in (
        (dict(rank=0), "at least 1"), (dict(alpha=0.0), "above 0"), (dict(dropout=1.0), "in .0, 1"),
        (dict(targets=()), "empty"), (dict(targets=("c_atn",)), "mean 'c_attn'"),
        (dict(targets=("lm_head",)), "known are"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            LoRAConfig(**options)
