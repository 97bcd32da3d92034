"""What is saved of a model and its optimizer: tensors by file and name, to and from host memory.

model.safetensors       float32 weights under Hugging Face's names, without padding
optimizer.safetensors   AdamW's moments and step, Muon's momentum, as <parameter>/<state>
adapter_model.safetensors   instead of model.safetensors where LoRA adapters are trained

Where ranks share tensors out (gpt2.train.layouts), files hold whole ones.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt2 import lora
from gpt2.model import GPT
from gpt2.storage import read_checked

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
MOMENTS, STEP = ("exp_avg", "exp_avg_sq"), "step"  # AdamW's names of its state
MOMENTUM = "momentum_buffer"  # Muon's
Tensors = dict[str, dict[str, Tensor]]  # file name -> tensor name -> tensor in host memory
Optimizer = torch.optim.Optimizer


@torch.no_grad()
def snapshot(
    model: GPT, optimizer: Optimizer | None = None, out: Tensors | None = None, *, keep: bool = True
) -> Tensors:
    """Copies of a model's weights and an optimizer's moments in host memory.

    Where ranks share these out all must call it; only those with keep copy what is gathered.
    out: an earlier snapshot of the same model, whose memory is written over and returned."""
    out = {} if out is None else out
    for file, name, tensor in _tensors(model, optimizer):
        if keep:
            memory = out.setdefault(file, {})
            if name not in memory:
                memory[name] = host_memory(tensor)
            memory[name].copy_(tensor, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return out


@torch.no_grad()
def restore(folder: Path, model: GPT, optimizer: Optimizer | None = None) -> None:
    """Copies the tensors in a folder's files into a model and, where given, an optimizer.
    Raises OSError, and ValueError where they are not exactly those of the model."""
    file, prefix, saved = _saved(model)
    shapes = {name: tuple(_unpadded(name, p, model).shape) for name, p in saved.items()}
    weights = read_checked(folder / file, {prefix + n: s for n, s in shapes.items()}, ("F32",))
    for name, parameter in saved.items():
        parameter.copy_(_placed(weights[prefix + name], parameter))
    if optimizer is None:
        return
    wanted = {
        f"{name}/{key}": () if key == STEP else shapes[name]
        for name, p in saved.items()
        for key in state_names(optimizer, p)
    }
    moments = read_checked(folder / OPTIMIZER, wanted, ("F32",))
    own = {p for group in optimizer.param_groups for p in group["params"]}
    for name, p in saved.items():
        if p in own:
            for key in state_names(optimizer, p):
                value = moments[f"{name}/{key}"]
                # Fused AdamW wants its step where the parameter is. A copy: it counts in place.
                optimizer.state[p][key] = (
                    value.to(p.device, copy=True)
                    if key == STEP
                    else torch.zeros_like(p).copy_(_placed(value, p))
                )


def state_names(optimizer: Optimizer, parameter: nn.Parameter) -> tuple[str, ...]:
    """What an optimizer of gpt2.train.optim keeps of a parameter."""
    return (MOMENTUM,) if parameter in optimizer.matrices else (*MOMENTS, STEP)


def host_memory(like: Tensor) -> Tensor:
    """Memory for a copy of a tensor, page-locked where that tensor is on a GPU."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")


def _saved(model: GPT) -> tuple[str, str, dict[str, nn.Parameter]]:
    """The file of the weights, the prefix of their names in it, and which: adapters alone."""
    if lora.lora_config(model) is not None:
        return lora.TENSORS, lora.PREFIX, lora.adapter_parameters(model)
    return MODEL, "", dict(model.named_parameters())


def _tensors(model: GPT, optimizer: Optimizer | None) -> Iterator[tuple[str, str, Tensor]]:
    """(file, name, tensor) of all that is saved; a collective where ranks share it out."""

    def whole(name: str, tensor: Tensor) -> Tensor:
        return _unpadded(name, tensor.full_tensor() if is_shared_out(tensor) else tensor, model)

    file, prefix, saved = _saved(model)
    for name, parameter in saved.items():
        yield file, prefix + name, whole(name, parameter.detach())
    if optimizer is not None:
        # An optimizer whose state lies on other ranks as well has a way to get it.
        moments = getattr(optimizer, "moments", optimizer.state.__getitem__)
        for name, parameter in saved.items():
            for key, value in moments(parameter).items():
                yield OPTIMIZER, f"{name}/{key}", whole(name, value)


def _unpadded(name: str, tensor: Tensor, model: GPT) -> Tensor:
    is_table = name == "transformer.wte.weight" and tensor.dim() == 2  # not AdamW's step
    return tensor[: model.config.vocab_size] if is_table else tensor


def is_shared_out(tensor: Tensor) -> bool:
    """Whether ranks have parts of it."""
    return hasattr(tensor, "full_tensor")  # a DTensor; importing that takes long


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """value with the padding of a parameter; of one that ranks share out, this rank's part."""
    whole = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    whole[: len(value)] = value
    return part_of(whole, like) if is_shared_out(like) else whole


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank has, shared out as another one is."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
