"""Causal self-attention on packed projections, forward and backward, as three Triton kernels.

Forward, for one query row with scores s_j = scale * q.k_j over the keys it may see:
    m = max_j s_j,  l = sum_j exp(s_j - m),  out = sum_j exp(s_j - m) v_j / l,  lse = m + log l
one tile of keys at a time, rescaling by exp(m_old - m_new) when the maximum moves (online softmax,
Milakov and Gimelshein, arXiv 1805.02867; tiled as in FlashAttention, arXiv 2205.14135).
Backward, from p_j = exp(s_j - lse) and delta = sum_d out_d dout_d = sum_j p_j dp_j:
    dv_j = sum_i p_ij dout_i,   dp_ij = dout_i.v_j,   ds_ij = p_ij (dp_ij - delta_i)
    dq_i = scale * sum_j ds_ij k_j,   dk_j = scale * sum_i ds_ij q_i
All exponentials are base 2, with log2(e) folded into the scale; m and lse are kept in those units.

The backward is split: the dq kernel owns a tile of queries (and writes delta, which it
needs first), then the dk/dv kernel owns a tile of keys. That is seven matrix products where five
would do, but no atomics, so the result is the same bits each time, and no fp32 workspace beyond
lse and delta.

Which keys a query sees: doc_start[query] <= key <= query. Tiles that nobody may see are not
visited, tiles that everybody sees take a loop without masks, the rest take a masked one. The loop
bounds come from the least and greatest doc_start of the rows at hand, so any doc_start gives the
right answer, and a non-decreasing one (packed documents, left padding) also skips the most.

Rounding: dot products take the input's dtype and accumulate in fp32; p and ds are rounded to that
dtype before the second product; statistics, accumulators and delta stay in fp32.

What bounds the backward on sm_80 and sm_90 is shared memory, from which a matrix product reads its
operands: there, for D up to 64, those that do not change in a loop go into registers before it.
(For more they spill; elsewhere the bound is another, and the way there costs more than it saves.)
Pointers move with their loop, since a multiple of an int64 stride in each iteration costs a third
of a masked one.

B batch, T time, H heads, D head dimension. Left out: dropout, arbitrary masks, more than 128 for D.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels.launch import (
    INTERPRETED,
    architecture,
    attention_tiles,
    check_same_device,
    check_tensor,
    operator,
)

LOG2_E = math.log2(math.e)
MAX_HEAD_DIM = 128


@triton.jit
def _load_rows(ptr, row, last, D: tl.constexpr, offs, CHECK: tl.constexpr):
    """A tile of rows; those beyond `last` read as 0 where CHECK, and so do columns beyond D."""
    BLOCK_D: tl.constexpr = offs.shape[1]
    if D < BLOCK_D:
        mask = (tl.arange(0, BLOCK_D) < D)[None, :]
        if CHECK:
            mask = mask & (row < last)[:, None]
        x = tl.load(ptr + offs, mask=mask, other=0.0)
    elif CHECK:
        x = tl.load(ptr + offs, mask=(row < last)[:, None], other=0.0)
    else:
        x = tl.load(ptr + offs)
    return x


@triton.jit
def _store_rows(ptr, x, row, last, D: tl.constexpr, offs):
    BLOCK_D: tl.constexpr = offs.shape[1]
    mask = (row < last)[:, None]
    if D < BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(ptr + offs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _offsets(stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D) element offsets from a tile's first row; int64, for any row stride."""
    return tl.arange(0, BLOCK)[:, None] * tl.cast(stride, tl.int64) + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _in_registers(x):
    """x as the result of a product with the identity: exact, but a row with an inf becomes NaN.

    A product takes its left operand from registers only if it was computed; what was loaded it
    reads from shared memory, every time, and shared memory is what bounds the backward.
    """
    D: tl.constexpr = x.shape[1]
    eye = tl.arange(0, D)[:, None] == tl.arange(0, D)[None, :]
    return tl.dot(x, eye.to(x.dtype), input_precision="ieee").to(x.dtype)


@triton.jit
def _masked(s, query, key, first, DIAGONAL: tl.constexpr, HAS_DOC: tl.constexpr):
    """Scores, -inf where a query does not see a key."""
    if DIAGONAL:
        s = tl.where(key <= query, s, float("-inf"))
    if HAS_DOC:
        s = tl.where(key >= first, s, float("-inf"))
    return s


@triton.jit
def _first_keys(doc_ptr, stride_doc_t, query, start_m, T, BLOCK_N: tl.constexpr):
    """doc_start of a tile of queries, and where its masked and unmasked loops over keys begin."""
    first = tl.load(doc_ptr + tl.minimum(query, T - 1) * stride_doc_t)
    lo = tl.maximum(tl.min(first, 0), 0) // BLOCK_N * BLOCK_N
    lo = tl.minimum(lo, start_m)
    full_lo = tl.minimum(tl.cdiv(tl.max(first, 0), BLOCK_N) * BLOCK_N, start_m)
    return first, lo, tl.maximum(full_lo, lo)


@triton.jit
def _fwd_keys(
    acc, m, den, q, k_ptr, v_ptr, stride_t, lo, hi, query, first, T, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, DIAGONAL: tl.constexpr, HAS_DOC: tl.constexpr,
):  # fmt: skip
    """Carry the online softmax of a tile of queries over the keys lo <= key < hi."""
    offs = _offsets(stride_t, BLOCK_N, q.shape[1])
    k_ptr += lo * stride_t
    v_ptr += lo * stride_t
    for start_n in tl.range(lo, hi, BLOCK_N):
        key = start_n + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, key, T, D, offs, DIAGONAL)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N), not yet scaled
        s = _masked(s, query[:, None], key[None, :], first[:, None], DIAGONAL, HAS_DOC)
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)  # finite: m starts at M_FLOOR
        p = tl.exp2(s * scale_log2 - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        den = den * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = _load_rows(v_ptr, key, T, D, offs, DIAGONAL)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")  # (BLOCK_M, BLOCK_D)
        m = m_new
        k_ptr += BLOCK_N * stride_t
        v_ptr += BLOCK_N * stride_t
    return acc, m, den


@triton.jit
def _attention_fwd_kernel(
    qkv_ptr,  # (B, T, 3, H, D), any strides but 1 for D
    out_ptr,  # (B, T, H, D), contiguous
    lse_ptr,  # (B, H, T) fp32, in log2 units; +inf where a query sees no key
    doc_ptr,  # (B, T) int32, or None
    stride_b, stride_t, stride_p, stride_h, stride_doc_b, stride_doc_t,
    T, H, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_DOC: tl.constexpr,
):  # fmt: skip
    tl.static_assert(BLOCK_M % BLOCK_N == 0)
    M_FLOOR: tl.constexpr = -3.0e38  # in place of -inf, so that no row ever computes inf - inf
    tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    start_m = (tiles - 1 - pid % tiles) * BLOCK_M  # the longest rows first: the tail is short ones
    b = (pid // tiles // H).to(tl.int64)
    h = (pid // tiles % H).to(tl.int64)
    stride_t = tl.cast(stride_t, tl.int64)

    query = start_m + tl.arange(0, BLOCK_M)
    q_ptr = qkv_ptr + b * stride_b + h * stride_h
    k_ptr = q_ptr + stride_p
    v_ptr = k_ptr + stride_p
    offs = _offsets(stride_t, BLOCK_M, BLOCK_D)
    q = _load_rows(q_ptr + start_m * stride_t, query, T, D, offs, True)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], M_FLOOR, tl.float32)
    den = tl.zeros([BLOCK_M], tl.float32)
    first = query
    full_lo = 0
    if HAS_DOC:
        row_ptr = doc_ptr + b * stride_doc_b
        first, lo, full_lo = _first_keys(row_ptr, stride_doc_t, query, start_m, T, BLOCK_N)
        acc, m, den = _fwd_keys(
            acc, m, den, q, k_ptr, v_ptr, stride_t, lo, full_lo, query, first, T, scale_log2,
            D, BLOCK_N, False, True,
        )  # fmt: skip
    acc, m, den = _fwd_keys(
        acc, m, den, q, k_ptr, v_ptr, stride_t, full_lo, start_m, query, first, T, scale_log2,
        D, BLOCK_N, False, False,
    )  # fmt: skip
    acc, m, den = _fwd_keys(
        acc, m, den, q, k_ptr, v_ptr, stride_t, start_m, tl.minimum(start_m + BLOCK_M, T),
        query, first, T, scale_log2, D, BLOCK_N, True, HAS_DOC,
    )  # fmt: skip

    sees_none = den == 0.0
    den = tl.where(sees_none, 1.0, den)
    out = acc / den[:, None]
    lse = tl.where(sees_none, float("inf"), m + tl.log2(den))
    tl.store(lse_ptr + (b * H + h) * T + query, lse, mask=query < T)
    out_ptr += ((b * T + start_m) * H + h) * D
    _store_rows(out_ptr, out, query, T, D, _offsets(H * D, BLOCK_M, BLOCK_D))


@triton.jit
def _dq_keys(
    dq, q, do, lse, delta, k_ptr, v_ptr, stride_t, lo, hi, query, first, T, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, DIAGONAL: tl.constexpr, HAS_DOC: tl.constexpr,
):  # fmt: skip
    """Add to dq / scale of a tile of queries what the keys lo <= key < hi give."""
    offs = _offsets(stride_t, BLOCK_N, q.shape[1])
    k_ptr += lo * stride_t
    v_ptr += lo * stride_t
    for start_n in tl.range(lo, hi, BLOCK_N):
        key = start_n + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, key, T, D, offs, DIAGONAL)
        v = _load_rows(v_ptr, key, T, D, offs, DIAGONAL)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        s = _masked(s, query[:, None], key[None, :], first[:, None], DIAGONAL, HAS_DOC)
        p = tl.exp2(s * scale_log2 - lse[:, None])
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")  # (BLOCK_M, BLOCK_D)
        k_ptr += BLOCK_N * stride_t
        v_ptr += BLOCK_N * stride_t
    return dq


@triton.jit
def _attention_bwd_dq_kernel(
    qkv_ptr,  # (B, T, 3, H, D), any strides but 1 for D
    out_ptr,  # (B, T, H, D), contiguous
    do_ptr,  # (B, T, H, D), any strides but 1 for D
    lse_ptr,  # (B, H, T) fp32
    delta_ptr,  # (B, H, T) fp32, written here
    dqkv_ptr,  # (B, T, 3, H, D), contiguous; dq is written here
    doc_ptr,  # (B, T) int32, or None
    stride_b, stride_t, stride_p, stride_h, stride_do_b, stride_do_t, stride_do_h,
    stride_doc_b, stride_doc_t, T, H, scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_DOC: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    tl.static_assert(BLOCK_M % BLOCK_N == 0)
    tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    start_m = (tiles - 1 - pid % tiles) * BLOCK_M
    b = (pid // tiles // H).to(tl.int64)
    h = (pid // tiles % H).to(tl.int64)
    stride_t = tl.cast(stride_t, tl.int64)
    stride_do_t = tl.cast(stride_do_t, tl.int64)

    query = start_m + tl.arange(0, BLOCK_M)
    q_ptr = qkv_ptr + b * stride_b + h * stride_h
    k_ptr = q_ptr + stride_p
    v_ptr = k_ptr + stride_p
    out_ptr += ((b * T + start_m) * H + h) * D
    do_ptr += b * stride_do_b + start_m * stride_do_t + h * stride_do_h
    lse_ptr += (b * H + h) * T
    delta_ptr += (b * H + h) * T

    do_offs = _offsets(stride_do_t, BLOCK_M, BLOCK_D)
    do = _load_rows(do_ptr, query, T, D, do_offs, True)
    out_offs = _offsets(H * D, BLOCK_M, BLOCK_D)
    out = _load_rows(out_ptr, query, T, D, out_offs, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + query, delta, mask=query < T)
    lse = tl.load(lse_ptr + query, mask=query < T, other=float("inf"))  # inf makes p 0
    q_offs = _offsets(stride_t, BLOCK_M, BLOCK_D)
    q = _load_rows(q_ptr + start_m * stride_t, query, T, D, q_offs, True)

    if IN_REGISTERS:
        q = _in_registers(q)
        do = _in_registers(do)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first = query
    full_lo = 0
    if HAS_DOC:
        row_ptr = doc_ptr + b * stride_doc_b
        first, lo, full_lo = _first_keys(row_ptr, stride_doc_t, query, start_m, T, BLOCK_N)
        dq = _dq_keys(
            dq, q, do, lse, delta, k_ptr, v_ptr, stride_t, lo, full_lo, query, first, T, scale_log2,
            D, BLOCK_N, False, True,
        )  # fmt: skip
    dq = _dq_keys(
        dq, q, do, lse, delta, k_ptr, v_ptr, stride_t, full_lo, start_m,
        query, first, T, scale_log2, D, BLOCK_N, False, False,
    )  # fmt: skip
    dq = _dq_keys(
        dq, q, do, lse, delta, k_ptr, v_ptr, stride_t, start_m, tl.minimum(start_m + BLOCK_M, T),
        query, first, T, scale_log2, D, BLOCK_N, True, HAS_DOC,
    )  # fmt: skip

    dqkv_ptr += ((b * T + start_m) * 3 * H + h) * D
    _store_rows(dqkv_ptr, dq * scale, query, T, D, _offsets(3 * H * D, BLOCK_M, BLOCK_D))


@triton.jit
def _dkv_queries(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, doc_ptr, stride_t, stride_do_t, stride_doc_t,
    lo, hi, key, T, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, CHECK: tl.constexpr, DIAGONAL: tl.constexpr,
    HAS_DOC: tl.constexpr,
):  # fmt: skip
    """Add to dk / scale and dv of a tile of keys what the queries lo <= query < hi give.

    Scores are computed transposed, (BLOCK_N, BLOCK_M), so that p and ds are left operands as they
    stand in registers.
    """
    q_offs = _offsets(stride_t, BLOCK_M, k.shape[1])
    do_offs = _offsets(stride_do_t, BLOCK_M, k.shape[1])
    at = tl.arange(0, BLOCK_M)
    q_ptr += lo * stride_t
    do_ptr += lo * stride_do_t
    lse_ptr += lo
    delta_ptr += lo
    for start_m in tl.range(lo, hi, BLOCK_M):
        query = start_m + at
        q = _load_rows(q_ptr, query, T, D, q_offs, CHECK)
        do = _load_rows(do_ptr, query, T, D, do_offs, CHECK)
        if CHECK:
            in_row = query < T
            lse = tl.load(lse_ptr + at, mask=in_row, other=float("inf"))  # inf makes p 0
            delta = tl.load(delta_ptr + at, mask=in_row, other=0.0)
        else:
            lse = tl.load(lse_ptr + at)
            delta = tl.load(delta_ptr + at)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BLOCK_N, BLOCK_M)
        first = query
        if HAS_DOC:
            first = tl.load(doc_ptr + tl.minimum(query, T - 1) * stride_doc_t)
        s = _masked(s, query[None, :], key[:, None], first[None, :], DIAGONAL, HAS_DOC)
        p = tl.exp2(s * scale_log2 - lse[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")  # (BLOCK_N, BLOCK_D)
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        q_ptr += BLOCK_M * stride_t
        do_ptr += BLOCK_M * stride_do_t
        lse_ptr += BLOCK_M
        delta_ptr += BLOCK_M
    return dk, dv


@triton.jit
def _last_queries(doc_ptr, stride_doc_t, start_n, T, BLOCK_N: tl.constexpr, SCAN: tl.constexpr):
    """For a tile of keys: the first query not to see it all, and the end of those that see any."""
    full_end = T
    end = start_n
    for start in tl.range(start_n, T, SCAN):
        query = start + tl.arange(0, SCAN)
        in_row = query < T
        first = tl.load(doc_ptr + query * stride_doc_t, mask=in_row, other=0)
        sees_any = in_row & (first < start_n + BLOCK_N)
        full_end = tl.minimum(full_end, tl.min(tl.where(first > start_n, query, T), 0))
        end = tl.maximum(end, tl.max(tl.where(sees_any, query + 1, 0), 0))
    return full_end, end


@triton.jit
def _attention_bwd_dkv_kernel(
    qkv_ptr,  # (B, T, 3, H, D), any strides but 1 for D
    do_ptr,  # (B, T, H, D), any strides but 1 for D
    lse_ptr,  # (B, H, T) fp32
    delta_ptr,  # (B, H, T) fp32
    dqkv_ptr,  # (B, T, 3, H, D), contiguous; dk and dv are written here
    doc_ptr,  # (B, T) int32, or None
    stride_b, stride_t, stride_p, stride_h, stride_do_b, stride_do_t, stride_do_h,
    stride_doc_b, stride_doc_t, T, H, scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_DOC: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    DIAGONAL: tl.constexpr = BLOCK_N if BLOCK_N > BLOCK_M else BLOCK_M  # queries the mask may cut
    tl.static_assert(DIAGONAL % BLOCK_M == 0)
    tiles = tl.cdiv(T, BLOCK_N)
    pid = tl.program_id(0)
    start_n = pid % tiles * BLOCK_N  # the keys that most queries see come first
    b = (pid // tiles // H).to(tl.int64)
    h = (pid // tiles % H).to(tl.int64)
    stride_t = tl.cast(stride_t, tl.int64)
    stride_do_t = tl.cast(stride_do_t, tl.int64)

    key = start_n + tl.arange(0, BLOCK_N)
    q_ptr = qkv_ptr + b * stride_b + h * stride_h
    kv_ptr = q_ptr + start_n * stride_t + stride_p
    do_ptr += b * stride_do_b + h * stride_do_h
    lse_ptr += (b * H + h) * T
    delta_ptr += (b * H + h) * T
    offs = _offsets(stride_t, BLOCK_N, BLOCK_D)
    k = _load_rows(kv_ptr, key, T, D, offs, True)
    v = _load_rows(kv_ptr + stride_p, key, T, D, offs, True)

    full_end = T
    end = T
    if HAS_DOC:
        doc_ptr += b * stride_doc_b
        full_end, end = _last_queries(doc_ptr, stride_doc_t, start_n, T, BLOCK_N, 1024)
    full_lo = start_n + DIAGONAL
    full_hi = full_lo + tl.maximum(full_end - full_lo, 0) // BLOCK_M * BLOCK_M

    if IN_REGISTERS:
        k = _in_registers(k)
        v = _in_registers(v)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk, dv = _dkv_queries(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, doc_ptr, stride_t, stride_do_t,
        stride_doc_t, start_n, tl.minimum(full_lo, end), key, T, scale_log2,
        D, BLOCK_M, True, True, HAS_DOC,
    )  # fmt: skip
    dk, dv = _dkv_queries(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, doc_ptr, stride_t, stride_do_t,
        stride_doc_t, full_lo, full_hi, key, T, scale_log2,
        D, BLOCK_M, False, False, False,
    )  # fmt: skip
    dk, dv = _dkv_queries(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, doc_ptr, stride_t, stride_do_t,
        stride_doc_t, full_hi, end, key, T, scale_log2,
        D, BLOCK_M, True, False, HAS_DOC,
    )  # fmt: skip

    dk_ptr = dqkv_ptr + (((b * T + start_n) * 3 + 1) * H + h) * D
    out_offs = _offsets(3 * H * D, BLOCK_N, BLOCK_D)
    _store_rows(dk_ptr, dk * scale, key, T, D, out_offs)
    _store_rows(dk_ptr + H * D, dv, key, T, D, out_offs)


def _options(name: str, qkv: Tensor, doc_start: Tensor | None) -> tuple[int, dict]:
    """Programs of kernel `name` ("fwd", "dq" or "dkv"), and its keyword arguments."""
    B, T, _, H, D = qkv.shape
    arch = architecture(qkv.device)
    tiles = attention_tiles(name, arch, qkv.dtype.itemsize, D, T)
    options = dict(
        D=D, BLOCK_D=max(16, triton.next_power_of_2(D)),  # 16: the least that tl.dot takes
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, HAS_DOC=doc_start is not None,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if name != "fwd":
        pays = arch in ("interpret", "sm_80", "sm_90") and D <= 64
        options["IN_REGISTERS"] = pays and qkv.dtype != torch.float32
    return triton.cdiv(T, tiles.block_n if name == "dkv" else tiles.block_m) * B * H, options


@operator
def attention_fwd(qkv: Tensor, doc_start: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """qkv (B, T, 3, H, D) -> out (B, T, H, D), lse (B, H, T) fp32."""
    B, T, _, H, D = qkv.shape
    out, lse = qkv.new_empty(B, T, H, D), qkv.new_empty(B, H, T, dtype=torch.float32)
    yield out, lse
    _check_documents(doc_start)
    if INTERPRETED and qkv.dtype == torch.bfloat16:  # whose arithmetic it gets wrong without a word
        exact = attention_fwd(qkv.float(), doc_start)
        out.copy_(exact[0]), lse.copy_(exact[1])
        return
    doc_strides = (0, 0) if doc_start is None else doc_start.stride()
    numbers = (*qkv.stride()[:4], *doc_strides, T, H, D**-0.5 * LOG2_E)
    programs, options = _options("fwd", qkv, doc_start)
    _attention_fwd_kernel[(programs,)](qkv, out, lse, doc_start, *numbers, **options)


@operator
def attention_bwd(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, doc_start: Tensor | None
) -> Iterator[Tensor]:
    """dout (B, T, H, D), any strides -> dqkv (B, T, 3, H, D), contiguous."""
    dqkv = qkv.new_empty(qkv.shape)
    yield dqkv
    _, T, _, H, D = qkv.shape
    if INTERPRETED and qkv.dtype == torch.bfloat16:
        dqkv.copy_(attention_bwd(dout.float(), qkv.float(), out.float(), lse, doc_start))
        return
    if dout.stride(3) != 1:  # an expanded gradient, as from out.sum(): the one copy made here
        dout = dout.contiguous()
    out, lse = out.contiguous(), lse.contiguous()  # they are, unless a caller of the op copied them
    delta = torch.empty_like(lse)
    doc_strides = (0, 0) if doc_start is None else doc_start.stride()
    numbers = (*qkv.stride()[:4], *dout.stride()[:3], *doc_strides, T, H, D**-0.5, D**-0.5 * LOG2_E)
    programs, options = _options("dq", qkv, doc_start)
    _attention_bwd_dq_kernel[(programs,)](
        qkv, out, dout, lse, delta, dqkv, doc_start, *numbers, **options
    )
    programs, options = _options("dkv", qkv, doc_start)
    _attention_bwd_dkv_kernel[(programs,)](
        qkv, dout, lse, delta, dqkv, doc_start, *numbers, **options
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, doc_start):
        out, lse = attention_fwd(qkv, doc_start)
        ctx.save_for_backward(qkv, out, lse, doc_start)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return attention_bwd(dout, *ctx.saved_tensors), None


def _check(qkv: Tensor, doc_start: Tensor | None) -> None:
    """What can be told without reading device memory."""
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"attention: qkv must be (B, T, 3, H, D), got {tuple(qkv.shape)};"
            " view the projection as (B, T, 3, n_head, head_dim)"
        )
    check_tensor("attention", "qkv", qkv)
    D = qkv.shape[4]
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(
            f"attention: qkv has head dimension {D}, the limit is 1 to {MAX_HEAD_DIM};"
            " use more heads, or triton_kernels.reference.attention"
        )
    if D > 1 and qkv.stride(4) != 1:
        raise ValueError(
            f"attention: qkv has stride {qkv.stride(4)} along D, it must be 1 (other strides are"
            " free); pass qkv.contiguous()"
        )
    if doc_start is None:
        return
    if doc_start.shape != qkv.shape[:2]:
        raise ValueError(
            f"attention: doc_start is {tuple(doc_start.shape)}, it must be (B, T) ="
            f" {tuple(qkv.shape[:2])}; expand it if all rows are alike"
        )
    if doc_start.dtype != torch.int32:
        raise ValueError(f"attention: doc_start is {doc_start.dtype}; pass doc_start.int()")
    check_same_device("attention", "doc_start", doc_start, "qkv", qkv)


def _check_documents(doc_start: Tensor | None) -> None:
    """Raise where doc_start leaves its row. On a GPU that waits for it: only in anomaly mode."""
    if doc_start is None or doc_start.numel() == 0:
        return
    if not (doc_start.is_cpu or torch.is_anomaly_enabled()):
        return
    least, most, T = int(doc_start.min()), int(doc_start.max()), doc_start.shape[1]
    if least < 0 or most >= T:
        raise ValueError(
            f"attention: doc_start holds {least if least < 0 else most}, the limit is 0 to T - 1 ="
            f" {T - 1}; give each query the position in its row of its document's first token"
        )


def attention(qkv: Tensor, *, doc_start: Tensor | None = None) -> Tensor:
    """Causal self-attention on packed projections, with scores q.k / sqrt(D).

    qkv (B, T, 3, H, D) fp16, bf16 or fp32: queries, keys and values as c_attn writes them, with any
        strides but 1 along D; D at most 128. Under autocast it is cast to autocast's dtype.
    doc_start (B, T) int32, 0 to T - 1: first key that a query may see (packed documents, left
        padding). A query before its own doc_start sees nothing: output and gradient are 0.
    Returns (B, T, H, D), contiguous. The gradient of qkv is contiguous too, and deterministic.
    Range: p is recomputed as exp(s - lse) from an fp32 lse, so its relative error is about 1e-7
        times the score. In fp32, with scores of 100 to 1000, errors of 120 random cases were at
        most 1.2e-7 times the largest score; to torch's they were as 0.9 in the median, 3.4 at most.
        Larger scores stay finite. All of qkv must be finite: an infinite or NaN key or value makes
        all queries of its tile NaN, those that do not see it too, as 0 times NaN.
    Raises ValueError for shapes, dtypes, strides or devices outside these; for values in doc_start
        on a CPU, or on a GPU under torch.autograd.set_detect_anomaly(True): reading them syncs.
    Source: torch.nn.functional.scaled_dot_product_attention(is_causal=True).
    """
    _check(qkv, doc_start)
    if torch.is_autocast_enabled(qkv.device.type):
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
    return _Attention.apply(qkv, doc_start)
