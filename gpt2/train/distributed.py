"""Which processes take part, on which device each; sums over them, and what they agree on."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Distributed:
    """This process among those that torchrun started; rank 0 of 1 without torchrun.

    control: a gloo group over CPU memory, for what is agreed without waiting for a GPU.
    """

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """value added up over all processes."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; all must ask."""
        return self.vote(lambda: flag)()

    def vote(self, flag: Callable[[], bool]) -> Callable[[], bool]:
        """Starts what any() does; the function that is returned waits for the result."""
        if self.world_size == 1:
            return flag
        ballot = torch.tensor(int(flag()))
        work = dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self.control, async_op=True)

        def result() -> bool:
            work.wait()
            return bool(ballot)

        return result

    def gather(self, value) -> list:
        """Every process's value, in the order of ranks, on all of them."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value):
        """The main process's value, on all."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.control)


def start(device: str = "auto", timeout_s: float = 600.0) -> Distributed:
    """Joins torchrun's other processes, if there are any, and picks this one's device.

    timeout_s: how long a collective waits for a rank before it fails.
    Raises ValueError for a device that is not there.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = select_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if world_size == 1:
        return Distributed(rank, world_size, chosen)
    # Gloo's connections are made when first used: restarts after a lost rank then do not meet stale
    # addresses.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    timeout = timedelta(seconds=timeout_s)
    if chosen.type == "cuda":
        dist.init_process_group("nccl", device_id=chosen, timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    return Distributed(rank, world_size, chosen, dist.new_group(backend="gloo", timeout=timeout))


def stop(group: Distributed) -> None:
    """Leaves the group, all processes together."""
    if group.world_size > 1:
        group.barrier()
        dist.destroy_process_group()


def select_device(device: str = "auto", local_rank: int = 0) -> torch.device:
    """The device for "auto", "cpu", "cuda", "cuda:1". Raises ValueError where it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: use auto, cpu, cuda or cuda:1") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {device!r}: torch sees no CUDA GPU; use --device cpu")
        index = local_rank if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"device cuda:{index}: torch sees {torch.cuda.device_count()} GPUs")
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    elif chosen.type != "cpu":
        raise ValueError(f"device {device!r} is not supported: use auto, cpu, cuda or cuda:1")
    return chosen


# Dense peaks with fp32 accumulation in TFLOP/s of bf16 matmuls, from NVIDIA's data sheets. The
# first name that occurs in the device's name counts. Unlike marketing figures these are without
# sparsity.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H800": 989.4,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's published peak in FLOP/s, or None: CPUs, float32, GPUs not in the table."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for key, tflops in PEAK_TFLOPS.items() if key in name), None)
