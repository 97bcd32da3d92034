"""The rule that every kernel test goes by, and what the tests share."""

import torch
from torch import Tensor


def assert_as_exact_as_torch(
    ours: Tensor, theirs: Tensor, exact: Tensor, name: str, *, ulps: float = 4.0, terms: float = 0.0
) -> None:
    """The error of ours against exact (fp64) is at most twice theirs, torch's own at the same
    dtype, plus some ulps.

    Errors are the largest over the tensor; the ulp is that of the largest exact entry in ours'
    dtype, or fp32's of terms, the size of what is subtracted on the way, where that is larger.
    """
    assert ours.shape == exact.shape, (
        f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    )
    assert torch.equal(ours.isnan(), theirs.isnan()), f"{name}: NaN in other places than torch's"
    assert torch.equal(ours.isinf(), theirs.isinf()), (
        f"{name}: infinity in other places than torch's"
    )
    finite = ours.isfinite()
    if not finite.any():
        return
    exact = exact[finite]
    error = (ours[finite].double() - exact).abs().max().item()
    allowed = 2 * (theirs[finite].double() - exact).abs().max().item()
    floor = ulps * torch.finfo(ours.dtype).eps * exact.abs().max().item()
    floor = max(floor, torch.finfo(torch.float32).eps * terms)
    assert error <= allowed + floor, f"{name}: error {error:.3g} > {allowed:.3g} + {floor:.3g}"


def leaf(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of t that collects its own gradient."""
    return t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
