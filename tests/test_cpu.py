"""The operations of a CPU against torch's, with float64 as the judge."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from gpt2 import cpu
from gpt2.config import GPTConfig, LoRAConfig
from gpt2.cpu import DECODE_ROWS, Choice
from gpt2.data.loader import _select_backend
from gpt2.device import check_built
from gpt2.generate import evaluating
from gpt2.lora import add_lora, merge
from gpt2.model import GPT, KVCache
from gpt2.ops import select_ops
from tests.kernel_rule import DEEP, results
from triton_kernels import reference

CPP = pytest.param(True, id="cpp", marks=pytest.mark.skipif(not cpu.kernels, reason=cpu.why_not()))
HOME = pytest.mark.parametrize("cpp", [CPP, pytest.param(False, id="torch")])
DTYPE = pytest.mark.parametrize("dtype", cpu.DTYPES, ids=cpu.DTYPES.values())
needs_cpp = pytest.mark.skipif(not cpu.kernels, reason=cpu.why_not())


def plain_gelu(x):
    return F.gelu(x, approximate="tanh")


def no_worse(ours, theirs, exact):
    """Against float64, the error is at most twice torch's, or that of a short sum's rounding."""
    for a, b, right in zip(ours, theirs, exact, strict=True):
        error, allowed = ((x.double() - right).abs().max() for x in (a, b))
        assert error <= 2 * allowed + DEEP * right.abs().max()


def compare(function, oracle, inputs, grads):
    exact = results(oracle, [x.double() for x in inputs], [g.double() for g in grads])
    no_worse(results(function, inputs, grads), results(oracle, inputs, grads), exact)


@needs_cpp
@DTYPE
@pytest.mark.parametrize("shape", [(3, 17), (2, 5, 4096), (1,), (0, 4)], ids=str)
def test_gelu(dtype, shape):
    x, dy = (4 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    if x.numel():
        compare(cpu.gelu, plain_gelu, [x], [dy])
        compare(cpu.gelu, plain_gelu, [x.movedim(0, -1)], [dy.movedim(0, -1)])
    assert cpu.gelu(x).shape == x.shape


@needs_cpp
def test_gelu_far_out():
    ends = torch.tensor([0.0, -0.0, 30.0, -30.0, 1e30, -1e30, torch.inf, torch.nan])
    ends.requires_grad_()
    y = cpu.gelu(ends)
    y.sum().backward()
    assert_close(y.detach(), F.gelu(ends.detach(), approximate="tanh"), equal_nan=True)
    assert_close(ends.grad[:4], torch.tensor([0.5, 0.5, 1.0, 0.0]))


ATTENTION_SHAPES = (2, 1, 1, 16), (1, 33, 3, 16), (2, 64, 2, 32), (1, 130, 2, 48), (2, 97, 1, 64)


def document_starts(kind, B, T):
    if kind == "none":
        return None
    starts = torch.zeros(B, T, dtype=torch.int32)
    starts[:, T // 3 :] = T // 3
    starts[-1, T // 2 :] = T // 2
    if kind == "left padding":  # of which no query sees anything
        starts[0] = T // 2
    return starts


@needs_cpp
@DTYPE
@pytest.mark.parametrize("documents", ["none", "packed", "left padding"])
@pytest.mark.parametrize(
    "shape",
    [(2, 1, 1, 16), (1, 33, 3, 16), (2, 64, 2, 32), (1, 130, 2, 48), (2, 97, 1, 64)],
    ids=str,
)
def test_attention(dtype, documents, shape):
    B, T, H, D = shape
    qkv, dout = torch.randn(B, T, 3, H, D).to(dtype), torch.randn(B, T, H, D).to(dtype)
    starts = document_starts(documents, B, T)
    seen = torch.ones(B, T, dtype=torch.bool)
    if starts is not None:
        seen = starts <= torch.arange(T)
    dout[~seen] = 0.0  # the reference gives NaN where nothing is visible

    def masked(attention):
        return lambda qkv: attention(qkv, doc_start=starts).where(seen[..., None, None], 0.0)

    def oracle(qkv):
        blind = torch.zeros(B, T, dtype=torch.int32) if starts is None else starts
        blind = blind.minimum(torch.arange(T, dtype=torch.int32))  # so that it has no NaN
        out = reference.attention(qkv, doc_start=blind)
        return out.where(seen[..., None, None], 0.0)

    compare(masked(cpu.attention), oracle, [qkv], [dout])
    assert not cpu.attention(qkv, doc_start=starts)[~seen].any()


@needs_cpp
def test_attention_of_other_shapes_is_the_references():
    for qkv in (torch.randn(1, 5, 3, 2, 8), torch.randn(1, 5, 3, 2, 16, dtype=torch.float64)):
        assert_close(cpu.attention(qkv), reference.attention(qkv))


def test_an_embeddings_gradient_joins_that_of_the_head():
    weight, idx = torch.randn(cpu.LARGE // 64, 64), torch.tensor([[3, 1, 3], [0, 3, 9]])

    def run(embedding):
        leaf = weight.clone().requires_grad_()
        ((embedding(idx, leaf) * 2).sum(1) @ leaf.t()).square().mean().backward()
        return leaf.grad

    ours = run(cpu.embedding)
    assert ours.layout == torch.strided
    assert_close(ours, run(F.embedding))


# -- the head and the loss -------------------------------------------------------------------------


def run(x, weight, targets, function=reference.linear_cross_entropy, **options):
    """Loss, dx and dweight."""
    options |= dict(vocab_size=65)
    return results(lambda x, w: function(x, w, targets, **options), [x, weight], [0.7])


@pytest.fixture
def problem():
    targets = torch.randint(0, 65, (50,))
    targets[::7] = -100
    return torch.randn(50, 16), torch.randn(72, 16), targets


@HOME
@pytest.mark.parametrize("chunk_rows", [1, 8, 49, 50])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_same_loss_and_gradients(problem, reduction, chunk_rows, cpp):
    whole = run(*problem, reduction=reduction)
    options = dict(chunk_rows=chunk_rows, choice=Choice(cpp), reduction=reduction)
    chunked = run(*problem, cpu.linear_cross_entropy, **options)
    assert_close(chunked, whole, rtol=1e-5, atol=1e-6)
    assert not chunked[2][65:].any()  # the vocabulary's padding


@HOME
def test_the_heads_rounding(cpp):
    x, weight = 3 * torch.randn(40, 64), torch.randn(5000, 64)
    targets = torch.randint(0, 5000, (40,))

    def loss(x, weight):
        if x.dtype == torch.float64:
            return reference.linear_cross_entropy(x, weight, targets, reduction="sum")
        options = dict(choice=Choice(cpp), chunk_rows=16, reduction="sum")
        return cpu.linear_cross_entropy(x, weight, targets, **options)

    compare(loss, lambda *a: reference.linear_cross_entropy(*a, targets, reduction="sum"),
            [x, weight], [torch.tensor(1.0)])  # fmt: skip


@HOME
def test_bf16_autocast(problem, cpp):
    with torch.autocast("cpu", torch.bfloat16):
        whole = run(*problem, reduction="sum")
        options = dict(chunk_rows=8, choice=Choice(cpp), reduction="sum")
        chunked = run(*problem, cpu.linear_cross_entropy, **options)
    for a, b in zip(chunked, whole, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.01 * b.norm()


@HOME
def test_only_what_needs_a_gradient(problem, cpp):
    x, weight, targets = problem
    expected = run(*problem, reduction="sum")
    options = dict(vocab_size=65, chunk_rows=8, choice=Choice(cpp))
    weight.requires_grad_()
    loss = cpu.linear_cross_entropy(x, weight, targets, reduction="sum", **options)
    (0.7 * loss).backward()
    assert_close(weight.grad, expected[2])
    with pytest.raises(RuntimeError, match="differentiated before"):
        loss.backward()
    for reduction in ("sum", "none"):
        with torch.no_grad():
            loss = cpu.linear_cross_entropy(x, weight, targets, reduction=reduction, **options)
        assert_close(loss.sum(), expected[0])
        assert loss.grad_fn is None


@HOME
def test_a_target_beyond_the_vocabulary_is_refused(problem, cpp):
    x, weight, targets = problem
    targets[3] = 65
    with pytest.raises(IndexError, match="65 is out of bounds"):
        cpu.linear_cross_entropy(
            x, weight, targets, choice=Choice(cpp), chunk_rows=8, vocab_size=65
        )


# -- the products ----------------------------------------------------------------------------------


def test_all_products_are_the_same_to_rounding():
    x, dy, weight = torch.randn(37, 48), torch.randn(37, 80), torch.randn(80, 48)
    for kind, pair in (("forward", (x, weight)), ("dx", (dy, weight)), ("dweight", (dy, x))):
        exact = cpu.PRODUCTS[kind]["torch"](*(t.double() for t in pair))
        for product in cpu.PRODUCTS[kind].values():
            assert_close(product(*pair).double(), exact, rtol=1e-5, atol=1e-4)


def test_a_layer_takes_the_chosen_products():
    layer, x = torch.nn.Linear(48, 80), torch.randn(3, 7, 48)
    taken, plain = [], results(layer, [x], [torch.ones(3, 7, 80)])
    choice = Choice(False, {f"80x48 {kind}": "onednn" for kind in cpu.PRODUCTS})
    choice.of, of = lambda kind, w: taken.append(kind) or of(kind, w), choice.of
    ours = results(
        lambda x: choice.linear(x, layer.weight, layer.bias), [x], [torch.ones(3, 7, 80)]
    )
    assert_close(ours, plain)
    assert taken == ["forward", "dx", "dweight"]


def test_the_fastest_product_has_to_be_right_and_clearly_faster(monkeypatch):
    x, now = torch.randn(8, 8), 0.0

    def product(seconds, error=0.0):
        def run(x):
            nonlocal now
            now += next(seconds) if hasattr(seconds, "__next__") else seconds
            return x * (1 + error)

        return run

    monkeypatch.setattr(cpu.time, "perf_counter", lambda: now)
    disturbed = iter([1.0, 1.0, 9.0, 1.0, 9.0])
    for other, chosen in (
        (product(0.5), "other"),
        (product(0.9), "torch"),  # within the noise
        (product(0.5, error=1e-3), "torch"),  # as bfloat16 would be
        (product(2.0), "torch"),
    ):
        assert cpu.fastest({"torch": product(1.0), "other": other}, (x,)) == chosen
    assert cpu.fastest({"torch": product(disturbed), "other": product(0.98)}, (x,)) == "torch"


def test_small_products_are_not_timed():
    small = GPT(GPTConfig(vocab_size=65, block_size=16, n_layer=1, n_head=2, n_embd=32))
    assert cpu.choose(small, rows=64) == {}
    wide = GPT(GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=128))
    found = cpu.choose(wide, rows=4096)
    assert set(found.values()) <= {"torch", "onednn"}
    assert {"512x128 dx", "128x512 dweight", "384x128 forward"} <= set(found)


def test_which_kernels_a_cpu_takes(monkeypatch):
    assert select_ops("auto").name == ("cpp" if cpu.kernels else "torch")
    assert select_ops("torch").choice is None
    monkeypatch.setattr(cpu, "kernels", None)
    assert select_ops("auto").name == "torch" and select_ops("auto").choice is not None
    with pytest.raises(ValueError, match="'cpp' cannot run: .* is not built"):
        select_ops("cpp")
    with pytest.raises(ValueError, match="they are for a CPU"):
        select_ops("cpp", "cuda")


@needs_cpp
def test_a_module_of_other_sources_is_none(monkeypatch, tmp_path):
    """After `git pull`, say: its functions may take other arguments."""
    check_built(cpu.kernels)
    monkeypatch.setattr("gpt2.device.CSRC", tmp_path)
    check_built(cpu.kernels)  # as in a wheel, where there are no sources
    (tmp_path / "decode.cpp").write_text("// changed")
    with pytest.raises(ImportError, match="_cpu_kernels is not built, or from other sources"):
        check_built(cpu.kernels)
    with pytest.raises(ImportError, match="_token_loader is not built, or from other sources"):
        _select_backend("cpp")
    assert _select_backend("auto")[1] == "numpy"


UNUSUAL = {
    "bias too short": ((1, 8), (64, 8), torch.zeros(4)),
    "bias of bfloat16": ((1, 8), (64, 8), torch.zeros(64).bfloat16()),
    "bias of 2 dimensions": ((1, 8), (64, 8), torch.zeros(1, 32)),
    "weight of 1 dimension": ((1, 8), (8,), None),
    "no channels": ((2, 0), (3, 0), None),
    "no outputs": ((2, 8), (0, 8), None),
    "no rows": ((0, 8), (3, 8), None),
    "x too narrow": ((2, 7), (3, 8), None),
    "x of no dimension": ((), (3, 1), None),
}


@pytest.mark.parametrize("x, weight, bias", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_linear_layers_are_torchs(x, weight, bias):
    """Results and errors."""
    linear = Choice(True, {"64x8 forward": "onednn", "3x8 forward": "onednn"}).linear

    def of(function):
        try:
            with torch.no_grad():
                return function(torch.ones(x), torch.ones(weight), bias)
        except Exception as error:
            return type(error), str(error)

    ours, theirs = of(linear), of(F.linear)
    if isinstance(theirs, torch.Tensor):
        assert_close(ours, theirs)
    else:
        assert ours == theirs


@needs_cpp
@DTYPE
@pytest.mark.parametrize("n_embd, n_head, bias", [(32, 2, True), (48, 3, False), (20, 2, True)])
def test_a_decode_step_is_the_models_forward(n_embd, n_head, bias, dtype):
    """Rows padded on the left; and none depends on how many there are beside it."""
    config = GPTConfig(
        vocab_size=70, block_size=32, n_layer=3, n_head=n_head, n_embd=n_embd, bias=bias
    )
    model = GPT(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
        parameter.data = parameter.to(dtype).float()
    idx, padding = torch.randint(0, 70, (DECODE_ROWS, 20)), torch.arange(DECODE_ROWS) % 7
    start = torch.minimum(torch.arange(20), padding[:, None]).int()
    found = {}
    with torch.no_grad():
        right = model(idx, doc_start=start)[:, 12:]
        prompts = KVCache(config, DECODE_ROWS, 24, "cpu", torch.float32)
        model.hidden(idx[:, :12], cache=prompts, doc_start=start[:, :12])
        with evaluating(model, cpu.DTYPES[dtype]):
            step = cpu.decoder(model)
            for n in (DECODE_ROWS, *range(1, 9)):
                cache = KVCache(config, n, 24, "cpu", torch.float32)
                cache.keys_values.copy_(prompts.keys_values[:, :, :n])
                cache.length = 12
                first = start[:n, 19:].contiguous()
                steps = [step(cache, idx[:n, t], first) for t in range(12, 20)]
                found[n] = torch.stack(steps, 1)
                assert cache.length == 20
                assert torch.equal(found[n], found[DECODE_ROWS][:n])
    assert_close(found[DECODE_ROWS], right, rtol=0, atol=1e-5)


@needs_cpp
@pytest.mark.parametrize("change, has_one", [
    (lambda m: m, True),
    (lambda m: add_lora(m, LoRAConfig(rank=2)), False),
    (lambda m: merge(add_lora(m, LoRAConfig(rank=2))), True),
    (lambda m: m.to(torch.float64), False),
    (lambda m: m.to(torch.bfloat16), False),
], ids="plain adapters merged float64 bfloat16".split())  # fmt: skip
def test_which_models_have_a_decode_step(tiny, change, has_one):
    assert (cpu.decoder(change(GPT(tiny))) is not None) == has_one
    assert cpu.decoder(GPT(tiny, "torch")) is None
    assert cpu.decoder(GPT(replace(tiny, exact_gelu=True))) is None
