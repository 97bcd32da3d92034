"""The one place that decides a run's device, its precision, and whether it is compiled.

Whoever needs one of the three asks an Execution, so that no two parts of a run can differ in it.
"""

import hashlib
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

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

CSRC = Path(__file__).resolve().parent.parent / "csrc"  # where the package lies in a checkout
NOT_BUILT = (
    "is not built, or from other sources than lie here: install a C++17 compiler and run "
    "`pip install -e .` again"
)


def check_built(module) -> None:
    """Raises ImportError where a C++ module is not what the sources in a checkout are: it may take
    its arguments in another order, and they are addresses."""
    sources = sorted(path for path in CSRC.glob("*") if path.suffix in (".cpp", ".h"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    if sources and getattr(module, "sources", None) != digest:
        raise ImportError(f"{module.__name__} {NOT_BUILT}")


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
    elif chosen.type == "mps":
        raise ValueError(
            "device 'mps': losses are summed in float64, which Apple's GPUs have not, and nothing "
            "here has been tested on one; use --device cpu"
        )
    elif chosen.type != "cpu":
        raise ValueError(f"device {device!r} is not supported: use auto, cpu, cuda or cuda:1")
    return chosen


@dataclass(frozen=True)
class Execution:
    """How a run computes; see execution().

    dtype: of matmuls, float32 or bfloat16; weights, statistics and reductions stay float32.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    compiled: bool = False

    def autocast(self) -> AbstractContextManager:
        """The precision of matmuls, as a context."""
        # No pass uses a weight twice, and a cache would keep bf16 copies of those shared out.
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype != torch.float32,
            cache_enabled=False,
        )  # fmt: skip

    @property
    def peak_flops(self) -> float | None:
        """The device's published peak in FLOP/s; None for CPUs, float32, and GPUs not listed."""
        if self.device.type != "cuda" or self.dtype != torch.bfloat16:
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((tflops * 1e12 for key, tflops in PEAK_TFLOPS.items() if key in name), None)

    def describe(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        on_cpu = self.device.type == "cpu"
        if on_cpu and self.dtype == torch.float32 and has_fast_bfloat16(self.device):
            dtype += " (this processor is faster in bfloat16: --dtype fast)"
        compiled = "on" if self.compiled else "off"
        return f"{device_name(self.device)}, matmuls in {dtype}, compile {compiled}"


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions that multiply it; others emulate it, and are slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def execution(device: torch.device, dtype: str = "auto", compile: str = "auto") -> Execution:
    """What dtype (auto, fast, float32, bfloat16) and compile (auto, on, off) mean on a device.

    fast: bfloat16 where the device multiplies it faster than float32.  auto: that and compiled on a
    GPU, neither on a CPU, whose results then have float32's accuracy.
    """
    on_gpu = device.type == "cuda"
    if dtype == "fast" or dtype == "auto" and on_gpu:
        dtype = "bfloat16" if has_fast_bfloat16(device) else "float32"
    elif dtype == "auto":
        dtype = "float32"
    return Execution(device, getattr(torch, dtype), compile == "on" or compile == "auto" and on_gpu)


@contextmanager
def deterministic() -> Iterator[None]:
    """torch takes operations that give the same bits each time, or raises RuntimeError.

    Without it a compiled embedding adds up its gradient with atomics on a GPU, in any order.
    """
    options = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), options.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        options.fill_uninitialized_memory = False  # nothing here reads such memory
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=warn_only)
        options.fill_uninitialized_memory = before[1]


def device_name(device: torch.device) -> str:
    """In words, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The CPU's model as its maker calls it, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
