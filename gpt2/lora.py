"""LoRA: a frozen model learns a low-rank update of some of its linear layers.

    y = W x + b + (alpha / rank) B A dropout(x),    A (rank, in) random, B (out, rank) zero at first

    add_lora(model, LoRAConfig(rank=8))             in place; now only A and B are trained
    with adapters_off(model): ...                   the model as it was
    save_adapters(model, folder)                    peft's files; load_adapters reads them
    merge(model)                                    W += (alpha / rank) B A; plain layers again

A layer that gets an adapter keeps its weight and bias, and so their names in checkpoints; besides
it has lora_A.weight and lora_B.weight, before whose names peft writes base_model.model.
GPT-2 of Hugging Face stores W transposed, in peft's config fan_in_fan_out; A and B are the same.

Sources: Hu et al., LoRA (arXiv 2106.09685), section 4; https://github.com/huggingface/peft.
Left out: adapters on embeddings and biases, several adapters at a time, DoRA, quantised weights.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from gpt2 import storage
from gpt2.config import LORA_LAYERS, LoRAConfig
from gpt2.model import GPT, Linear

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
# What an adapter_config.json may say so that the formula above holds; options that neither these
# two lists name must be off (None, false, empty). Some ways to begin change W too: not listed.
ALLOWED = {"peft_type": ("LORA",), "bias": ("none",),
           "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}  # fmt: skip
READ_OR_IRRELEVANT = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules",
    "layers_pattern", "layers_to_transform", "base_model_name_or_path", "revision", "task_type",
    "peft_version", "auto_mapping", "inference_mode", "fan_in_fan_out", "megatron_core",
    "qalora_group_size",
}  # fmt: skip


class LoRALinear(nn.Linear):
    """A linear layer with an adapter, made by add_lora."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.lora_A = nn.Linear(self.in_features, config.rank, bias=False, device=device)
        self.lora_B = nn.Linear(config.rank, self.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as peft and nn.Linear begin
        nn.init.zeros_(self.lora_B.weight)
        self.scale, self.dropout, self.on, self.ops = config.scale, config.dropout, True, linear.ops
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ops.linear(x, self.weight, self.bias)  # (..., out)
        if not self.on:
            return y
        # F.dropout and not nn.Dropout: GPT.set_dropout must not change it.
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return y + self.lora_B(self.lora_A(x)) * self.scale


def add_lora(model: GPT, config: LoRAConfig, base: dict | None = None) -> GPT:
    """Puts adapters, at first no change, into a model, in place, and freezes all else; returns it.

    base: what checkpoints are to say of the model as it is, {"path", "xxh3_128"}.
    Raises ValueError for a model that has adapters.
    """
    if lora_config(model) is not None:
        raise ValueError("the model has adapters already: merge them first")
    model.requires_grad_(False)
    for block in model.transformer.h:
        for layer in config.layers:
            block.set_submodule(layer, LoRALinear(block.get_submodule(layer), config))
    model.lora, model.lora_base = config, base
    return model


def lora_config(model: GPT) -> LoRAConfig | None:
    """The adapters that a model has; None for none."""
    return getattr(model, "lora", None)


@contextmanager
def adapters_off(model: GPT) -> Iterator[None]:
    """The model without its adapters, as long as the context lasts."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


@torch.no_grad()
def merge(model: GPT) -> GPT:
    """Adds the adapters to the weights, in place; returns the model, with nothing frozen."""
    for name, layer in lora_layers(model).items():
        with torch.device("meta"):
            plain = Linear(layer.in_features, layer.out_features, False, model.ops)
        plain.weight, plain.bias = layer.weight, layer.bias
        plain.weight += layer.lora_B.weight @ layer.lora_A.weight * layer.scale
        model.set_submodule(name, plain.train(layer.training))
    model.lora = model.lora_base = None
    return model.requires_grad_(True)


def lora_layers(model: GPT) -> dict[str, LoRALinear]:
    """The layers with adapters by their names, such as transformer.h.0.attn.c_attn."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def weights_hash(model: GPT) -> str:
    """xxh3-128 of a model's weights, by which adapters know the model that they are for."""
    digest = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        rows = model.config.vocab_size if name == "transformer.wte.weight" else len(parameter)
        digest.update(name.encode())
        digest.update(parameter[:rows].detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def adapter_parameters(model: GPT) -> dict[str, nn.Parameter]:
    """What is trained: transformer.h.0.attn.c_attn.lora_A.weight and so on."""
    return {n: p for n, p in model.named_parameters() if ".lora_" in n}


def adapter_config(config: LoRAConfig, base: str | None = None) -> dict:
    """peft's adapter_config.json; base: where its users find the model."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
        "target_modules": list(config.targets), "fan_in_fan_out": True, "bias": "none",
        "inference_mode": True,
    }  # fmt: skip


def save_adapters(model: GPT, folder: str | Path, base: str | None = None) -> None:
    """Writes what peft.PeftModel.from_pretrained loads onto the exported base model. Raises
    ValueError for a model without adapters, OSError where the folder cannot be written."""
    config, folder = lora_config(model), Path(folder)
    if config is None:
        raise ValueError("the model has no adapters to save")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + n: p.detach().cpu() for n, p in adapter_parameters(model).items()}
    storage.write_tensors(folder / TENSORS, tensors, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(adapter_config(config, base), indent=2) + "\n")


@torch.no_grad()
def load_adapters(model: GPT, folder: str | Path) -> GPT:
    """Puts the adapters of a folder, ours or peft's, into a model, in place; returns the model.
    Raises OSError where a file is missing, ValueError for adapters of another shape or kind."""
    path = Path(folder) / TENSORS
    config = _read_config(Path(folder) / CONFIG, storage.read_shapes(path))
    tensors = storage.read_checked(path, adapter_shapes(model, config))
    add_lora(model, config)
    for name, parameter in adapter_parameters(model).items():
        parameter.copy_(tensors[PREFIX + name])
    return model


def _read_config(path: Path, found: storage.Found) -> LoRAConfig:
    """What adapter_config.json says; which layers have one, the names of the tensors say."""
    config = storage.read_json(path)
    for key, value in config.items():
        allowed = value in ALLOWED[key] if key in ALLOWED else not value
        if not allowed and key not in READ_OR_IRRELEVANT:
            raise ValueError(f"{path}: {key} is {value!r:.40}, which is not supported here")
    layers = [layer for layer in LORA_LAYERS if any(f".{layer}.lora_A" in name for name in found)]
    if not layers:
        raise ValueError(f"{path.parent / TENSORS}: holds no adapters of GPT-2's linear layers")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    values = {"rank": rank, "alpha": alpha, "dropout": config.get("lora_dropout") or 0.0}
    made = storage.make(LoRAConfig, values | {"targets": layers}, path)
    # rslora's scale is alpha / sqrt(rank)
    return replace(made, alpha=alpha * math.sqrt(rank)) if config.get("use_rslora") else made


def base_name(folder: Path) -> str:
    """What an adapter_config.json names as its base model. Raises ValueError where it does not."""
    name = storage.read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{folder / CONFIG}: base_model_name_or_path does not name the base model")
    return name


def adapter_shapes(model: GPT, config: LoRAConfig) -> storage.Shapes:
    """The tensors of config's adapters on a model, under peft's names, and their shapes."""
    shapes = {}
    for i, block in enumerate(model.transformer.h):
        for layer in config.layers:
            linear, name = block.get_submodule(layer), f"{PREFIX}transformer.h.{i}.{layer}"
            shapes[f"{name}.lora_A.weight"] = (config.rank, linear.in_features)
            shapes[f"{name}.lora_B.weight"] = (linear.out_features, config.rank)
    return shapes
