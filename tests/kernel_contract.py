"""What holds for every operation of triton_kernels, one test for all of them.

test_kernels.py runs these on a CPU, through Triton's interpreter, and gpu/test_kernels_gpu.py on a
GPU; each brings the fixture `device`. How exact the operations are is tested in files of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import triton_kernels
from tests.kernel_rule import SAME_BITS, results
from triton_kernels import launch, reference

# Dynamo and Inductor call deprecated parts of PyTorch (instances of autograd.Function, torch.jit).
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@dataclass(frozen=True)
class Case:
    """call(module, *tensors): an operation on tensors that get gradients, its other arguments made
    to fit. shapes(N) are those of the tensors.
    """

    name: str
    call: Callable
    shapes: Callable[[int], list[tuple[int, ...]]]

    def tensors(self, N: int, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        g = torch.Generator().manual_seed(0)
        return [torch.randn(s, generator=g).to(device, dtype) for s in self.shapes(N)]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return as_tuple(self.call(triton_kernels, *tensors))

    def results(self, tensors: list[Tensor], function: Callable | None = None) -> list[Tensor]:
        """Of function, or the operation itself, with 0.5 and 2 for the gradients of the outputs."""
        return results(function or self, tensors, [0.5, 2.0])


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def packed(module, qkv):
    start = torch.arange(qkv.shape[1], dtype=torch.int32, device=qkv.device) // 9 * 9
    return module.attention(qkv, doc_start=start.expand(qkv.shape[:2]))


def residual_norm(module, x, residual, weight, bias):
    return module.layer_norm(x, weight, bias, residual=residual)


def targets_for(x: Tensor, V: int = 90) -> Tensor:
    targets = torch.arange(len(x), device=x.device) * 7 % V
    return torch.where(targets % 3 == 1, -100, targets)


def loss(**options):
    def call(module, logits):
        logits = logits * 1 if options.get("inplace_backward") else logits
        return module.cross_entropy(logits, targets_for(logits), **options)

    return call, lambda N: [(N, 90)]


def linear_loss(**options):
    def call(module, x, weight):
        return module.linear_cross_entropy(x, weight, targets_for(x), vocab_size=90, **options)

    return call, lambda N: [(N, 16), (96, 16)]


CASES = [
    Case("attention", lambda m, qkv: m.attention(qkv), lambda N: [(N, 21, 3, 1, 16)]),
    Case("attention, documents", packed, lambda N: [(N, 40, 3, 1, 8)]),
    Case("layer_norm", lambda m, x, w: m.layer_norm(x, w), lambda N: [(N, 3, 48), (48,)]),
    Case("layer_norm, residual", residual_norm, lambda N: [(N, 3, 48)] * 2 + [(48,)] * 2),
    Case("cross_entropy mean", *loss()),
    Case("cross_entropy none", *loss(reduction="none")),
    Case("cross_entropy in place", *loss(reduction="sum", inplace_backward=True)),
    Case("linear_cross_entropy mean", *linear_loss()),
    Case("linear_cross_entropy none", *linear_loss(reduction="none")),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


def test_same_bits_twice(case, device):
    tensors = case.tensors(3, device, torch.float16)
    assert_close(case.results(tensors), case.results(tensors), **SAME_BITS)


def test_nothing_in(case, device):
    """No rows: outputs and gradients are torch's."""
    tensors = case.tensors(0, device)
    theirs = case.results(tensors, lambda *t: case.call(reference, *t))
    assert_close(case.results(tensors), theirs, **SAME_BITS, equal_nan=True)


def test_backward_twice(case, device):
    tensors = [t.requires_grad_() for t in case.tensors(3, device)]
    total = sum(o.sum() for o in case(*tensors))
    total.backward(retain_graph=True)
    twice = [2 * t.grad for t in tensors]
    if case.name == "cross_entropy in place":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
        return
    total.backward()
    assert_close([t.grad for t in tensors], twice, **SAME_BITS)


def test_second_derivatives_are_refused(case, device):
    tensors = [t.requires_grad_() for t in case.tensors(3, device)]
    total = case(*tensors)[0].square().sum()
    (gradient,) = torch.autograd.grad(total, tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_only_gradients_that_are_needed(case, device):
    tensors = case.tensors(3, device)
    expected = case.results(tensors)[-len(tensors) :]
    for i, gradient in enumerate(expected):
        leaves = [t.detach().requires_grad_(j == i) for j, t in enumerate(tensors)]
        outputs = zip(case(*leaves), (0.5, 2.0), strict=False)
        sum(u * o.sum() for o, u in outputs if o.grad_fn).backward()
        assert_close(leaves[i].grad, gradient, rtol=1e-6, atol=1e-6)
        assert [t.grad is None for t in leaves] == [j != i for j in range(len(leaves))]


def test_without_gradients(case, device):
    tensors = [t.requires_grad_() for t in case.tensors(3, device)]
    expected = case(*tensors)
    with torch.no_grad():
        outputs = case(*tensors)
    assert all(e.grad_fn for e in expected) and not any(o.grad_fn for o in outputs)
    assert_close(outputs, expected, **SAME_BITS)


@pytest.mark.parametrize("layout", ["transposed", "every other", "padded", "expanded"])
def test_odd_layouts(case, device, layout):
    """Of the inputs, and of the gradients that come in."""

    def odd(t: Tensor) -> Tensor:
        last = 1 if t.dim() == 5 else -1  # of qkv the last must stay
        if layout == "transposed" and t.dim() > 1:
            return t.transpose(0, last).contiguous().transpose(0, last)
        if layout == "every other" and t.dim() > 0:
            return torch.stack([t, t], 1).flatten(0, 1)[::2]
        if layout == "padded" and t.dim() > 1:
            return torch.nn.functional.pad(t, (0, 3))[..., :-3]
        return t[:1].expand(t.shape) if layout == "expanded" and t.dim() > 0 else t

    tensors = [odd(t) for t in case.tensors(3, device)]
    ours = case.results(tensors, lambda *t: tuple(odd(o) for o in case(*t)))
    plain = case.results(
        [t.contiguous() for t in tensors],
        lambda *t: tuple(odd(o.contiguous()).contiguous() for o in case(*t)),
    )
    assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def wrapped(case: Case) -> Callable:
    """The operation between others, as a model has it."""
    return lambda *tensors: tuple((o * 2).float() for o in case(*(t * 1.5 for t in tensors)))


def test_checkpointed_equals_plain(case, device):
    tensors, function = case.tensors(3, device), wrapped(case)
    again = case.results(tensors, lambda *t: checkpoint(function, *t, use_reentrant=False))
    assert_close(again, case.results(tensors, function), **SAME_BITS)


@compiles
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_equals_eager(case, device, autocast):
    """In one graph, and for any number of rows with one compilation."""
    function = wrapped(case)
    torch._dynamo.reset()  # all cases are one code object, which may be compiled a few times only
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    tolerance = dict(rtol=2e-2, atol=2e-2) if autocast else dict(rtol=1e-5, atol=1e-5)
    for N in (2, 3):
        tensors = case.tensors(N, device)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            eager, ours = case.results(tensors, function), case.results(tensors, compiled)
        assert_close(ours, eager, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(case, device, dtype):
    """As on inputs of autocast's dtype; losses and gradients of fp32 tensors stay fp32."""
    tensors = [t.requires_grad_() for t in case.tensors(3, device)]
    with torch.autocast(device, dtype):
        outputs = case(*tensors)
    sum(o.float().sum() for o in outputs).backward()
    assert outputs[0].dtype == (torch.float32 if "cross_entropy" in case.name else dtype)
    assert all(t.grad.dtype == torch.float32 for t in tensors)
    theirs = as_tuple(case.call(reference, *(t.detach() for t in tensors)))
    assert_close(outputs, theirs, rtol=2e-2, atol=2e-2, check_dtype=False)


def operator_arguments(device: str) -> list[tuple]:
    def rand(*shape, dtype=torch.float16):
        return torch.rand(shape, device=device).to(dtype)

    qkv, out, lse = rand(1, 9, 3, 1, 16), rand(1, 9, 1, 16), rand(1, 1, 9, dtype=torch.float32)
    docs, f32 = torch.zeros(1, 9, dtype=torch.int32, device=device), torch.float32
    x, s, w, row = rand(5, 24), rand(5, 24, dtype=f32), rand(24), rand(5, dtype=f32)
    padded, plain, targets = rand(5, 64)[:, :50], rand(5, 50), torch.arange(5, device=device)
    weight, f16 = rand(70, 24), torch.float16
    linear = x, weight, targets, -100, 60, f16
    return [
        ("attention_fwd", qkv, docs), ("attention_fwd", qkv, None),
        ("attention_bwd", out, qkv, out, lse, docs), ("attention_bwd", out, qkv, out, lse, None),
        ("layer_norm_fwd", x, w, w, s, 1e-5, f16), ("layer_norm_fwd", x, w, None, None, 1e-5, f16),
        ("layer_norm_bwd", x, s, s, w, row, row, f16, True, f16),
        ("layer_norm_bwd", x, None, s, w, row, row, f16, False, None),
        ("cross_entropy_fwd", padded, targets, -100), ("cross_entropy_fwd", plain, targets, -100),
        ("cross_entropy_bwd", row, padded, targets, row, -100),
        ("cross_entropy_bwd", row[0], plain, targets, row, -100),
        ("linear_cross_entropy_bwd", row, x, weight, targets, row, -100, 60, f16, True, True),
        ("scaled", x, row[0], f32), ("linear_cross_entropy_fwd", *linear, True, True),
        ("linear_cross_entropy_fwd", *linear, False, True),
        ("linear_cross_entropy_fwd", *linear, False, False),
    ]  # fmt: skip


def test_operators_pass_opcheck(device):
    arguments = operator_arguments(device)
    assert {name for name, *_ in arguments} == set(launch.OPERATORS)
    for name, *rest in arguments:
        torch.library.opcheck(getattr(torch.ops.gpt2_triton, name).default, tuple(rest))


def test_offsets_beyond_int32(device):
    """Row 2 of this view starts 2^31 elements into its buffer; on a CPU only the pages that are
    touched take memory.
    """
    far = torch.empty(3, 2**30, dtype=torch.float16, device=device)[:, :48]
    far.copy_(torch.randn(3, 48))
    near, weight = far.clone(), torch.ones(48, device=device)
    targets = torch.tensor([3, 0, 47], device=device)
    for function in (
        lambda x: triton_kernels.layer_norm(x, weight),
        lambda x: triton_kernels.cross_entropy(x, targets, reduction="none"),
        lambda x: triton_kernels.cross_entropy(x, targets, inplace_backward=True),
    ):
        expected = results(function, [near.clone()], [1.0])
        assert_close(results(function, [far], [1.0]), expected, **SAME_BITS)


# Bad input: a ValueError that names the operation, the argument, the value and the limit


QKV, DOCS = torch.zeros(2, 5, 3, 2, 16), torch.zeros(2, 5, dtype=torch.int32)
X, WEIGHT, TARGETS = torch.zeros(4, 9), torch.zeros(20, 9), torch.zeros(4, dtype=torch.int64)
GOOD = {
    "attention": {"qkv": QKV, "doc_start": DOCS},
    "layer_norm": {"x": X, "weight": torch.ones(9)},
    "cross_entropy": {"logits": X, "targets": TARGETS},
    "linear_cross_entropy": {"x": X, "weight": WEIGHT, "targets": TARGETS},
}
BAD = [
    ("attention", "qkv", QKV.flatten(2), r"qkv must be \(B, T, 3, H, D\), got \(2, 5, 96\)"),
    ("attention", "qkv", QKV[:, :, :2], r"got \(2, 5, 2, 2, 16\)"),
    ("attention", "qkv", QKV.double(), "float64; cast it to float32, float16 or bfloat16"),
    ("attention", "qkv", torch.zeros(2, 5, 3, 2, 129), "dimension 129, the limit is 1 to 128"),
    ("attention", "qkv", QKV.mT.contiguous().mT, "stride 2 along D"),
    ("attention", "qkv", QKV.to("meta"), "qkv is on meta"),
    ("attention", "doc_start", DOCS[:, :4], r"doc_start is \(2, 4\), it must be .* \(2, 5\)"),
    ("attention", "doc_start", DOCS[0], r"doc_start is \(5,\)"),
    ("attention", "doc_start", DOCS.long(), "doc_start is torch.int64"),
    ("attention", "doc_start", DOCS.to("meta"), "doc_start is on meta and qkv on"),
    ("layer_norm", "weight", torch.ones(8), r"weight has shape \(8,\)"),
    ("layer_norm", "bias", torch.ones(1, 9), r"bias has shape \(1, 9\)"),
    ("layer_norm", "residual", torch.ones(3, 9), r"residual has shape \(3, 9\)"),
    ("layer_norm", "x", X.double(), "x is torch.float64; cast"),
    ("layer_norm", "weight", torch.ones(9, dtype=torch.int64), "weight is torch.int64; cast"),
    ("layer_norm", "x", torch.tensor(1.0), r"x has shape \(\)"),
    ("layer_norm", "x", torch.ones(2, 16385), "1 to 16384 channels"),
    ("layer_norm", "bias", torch.ones(9, device="meta"), "bias is on meta and x on"),
    ("cross_entropy", "logits", X[None], r"logits has shape \(1, 4, 9\)"),
    ("cross_entropy", "logits", X[:, :0], r"logits has shape \(4, 0\)"),
    ("cross_entropy", "logits", X.double(), "logits is torch.float64; cast"),
    ("cross_entropy", "targets", TARGETS[:3], r"targets has shape \(3,\), but logits has 4 rows"),
    ("cross_entropy", "targets", X[:, 0], "targets is torch.float32; class indices"),
    ("cross_entropy", "targets", TARGETS.to("meta"), "targets is on meta and logits on"),
    ("cross_entropy", "reduction", "avg", "'avg'; it must be one of mean, sum, none"),
    ("linear_cross_entropy", "x", X[0], r"x has shape \(9,\)"),
    ("linear_cross_entropy", "weight", WEIGHT.t(), r"shape \(9, 20\), but x is 9 wide"),
    ("linear_cross_entropy", "weight", WEIGHT.half(), "is torch.float16 and x torch.float32"),
    ("linear_cross_entropy", "weight", WEIGHT.to("meta"), "weight is on meta and x on"),
    ("linear_cross_entropy", "x", X.double(), "x is torch.float64; cast"),
    ("linear_cross_entropy", "targets", TARGETS[:2], r"shape \(2,\), but x has 4 rows"),
    ("linear_cross_entropy", "reduction", "avg", "reduction is 'avg'"),
    ("linear_cross_entropy", "vocab_size", 21, r"vocab_size is 21; it must be in 1..20"),
]  # fmt: skip


@pytest.mark.parametrize("op, name, value, says", BAD, ids=[f"{op} {says}" for op, *_, says in BAD])
def test_bad_input(device, op, name, value, says):
    arguments = GOOD[op] | {name: value}
    for key, t in arguments.items():
        if isinstance(t, Tensor) and t.device.type == "cpu":
            arguments[key] = t.to(device)
    with pytest.raises(ValueError, match=f"^{op}: .*{says}"):
        getattr(triton_kernels, op)(**arguments)
