"""Multi-head self-attention, whose queries can be fewer than its keys, and BEiT's relative position bias."""

from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.patchify.masks import take

__all__ = [
    "Attention",
    "ClassAttention",
    "QKVBias",
    "RelativePositionBias",
    "Softmax",
    "TalkingHeads",
    "attend",
]

QKVBias = Literal["all", "query_value", "none"]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention by the fastest exact way on this device and type.

    On CPUs without AMX tiles torch's fused kernel is slow in bf16: there the two products are written out,
    with the softmax in float32 (1.24 times a whole training step of ViT-S, docs/evidence.md).

    Args:
        q: [B,h,S,d].
        k: [B,h,T,d].
        v: [B,h,T,d].
        bias: added to the logits, broadcastable to [B,h,S,T].

    Returns: [B,h,S,d].
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not _has_amx():
        return _weights(_logits(q, k), bias).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype))


def _logits(q: Tensor, k: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)


def _weights(logits: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax over the keys, in float32 at least: [B,h,S,T]."""
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


@cache
def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


class Softmax(nn.Module):
    """Softmax attention, see `attend`."""

    def weights(self, q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
        """What `forward` multiplies the values with: [B,h,S,d], [B,h,T,d] -> [B,h,S,T], rows sum to 1."""
        return _weights(_logits(q, k), bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """[B,h,S,d], [B,h,T,d], [B,h,T,d] -> [B,h,S,d]."""
        return attend(q, k, v, bias)


class TalkingHeads(nn.Module):
    """Softmax attention whose heads mix their logits before the softmax and their weights after it.

    As in CaiT (arXiv:2103.17239): both mixings are linear maps over the heads, with bias. A map over heads
    is one `baddbmm` on [B,h,S*T] (ratios: docs/evidence.md). A bias of the logits is added after the first
    mixing: each head keeps its own.

    Args:
        num_heads: h.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.proj_l = nn.Linear(num_heads, num_heads)
        self.proj_w = nn.Linear(num_heads, num_heads)

    def weights(self, q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
        """What `forward` multiplies the values with: [B,h,S,d], [B,h,T,d] -> [B,h,S,T].

        Mixed over the heads, they can be negative, and rows need not sum to 1.
        """
        weights = _weights(_mix(self.proj_l, _logits(q, k)), bias)
        return _mix(self.proj_w, weights.to(q.dtype))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """[B,h,S,d], [B,h,T,d], [B,h,T,d] -> [B,h,S,d]."""
        return self.weights(q, k, bias) @ v


def _mix(over_heads: nn.Linear, x: Tensor) -> Tensor:
    """A linear map over the heads of [B,h,S,T]."""
    B, h = x.shape[:2]
    return torch.baddbmm(over_heads.bias[:, None], over_heads.weight.expand(B, h, h), x.flatten(2)).view_as(x)


class Attention(nn.Module):
    """Multi-head self-attention with fused projections (parameter names as in timm).

    Args:
        dim: width.
        num_heads: of width `inner_dim` / num_heads each.
        qkv_bias: on queries, keys and values; on queries and values only (BEiT: a bias on the keys adds the
            same to all logits of a query, which softmax cancels); or none.
        attend: what queries, keys and values give; None: `Softmax`.
        inner_dim: width of all queries together; None: `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: QKVBias = "all",
        attend: nn.Module | None = None,
        inner_dim: int | None = None,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.inner_dim = inner_dim or dim
        self.qkv = nn.Linear(dim, 3 * self.inner_dim, bias=qkv_bias == "all")
        self.attend = attend or Softmax()
        self.proj = nn.Linear(self.inner_dim, dim)
        split = qkv_bias == "query_value"
        self.q_bias = nn.Parameter(torch.empty(self.inner_dim)) if split else None
        self.v_bias = nn.Parameter(torch.empty(self.inner_dim)) if split else None

    def reset_parameters(self) -> None:
        """Set BEiT's biases to zero; the Linear layers are the initialisation scheme's."""
        for bias in (self.q_bias, self.v_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, bias: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Attend from all tokens, or from some of them, to all.

        Args:
            x: [B,T,D].
            bias: broadcastable to [B,h,T,T], or to [B,h,S,T] with `rows`.
            rows: int64 [B,S], the tokens that ask.

        Returns: [B,T,D], or [B,S,D] with `rows`.
        """
        width, weight, all_bias = self.inner_dim, self.qkv.weight, self.fused_bias()
        if rows is None:
            q, k, v = self._heads(F.linear(x, weight, all_bias), 3)
        else:
            q_bias, kv_bias = (None, None) if all_bias is None else (all_bias[:width], all_bias[width:])
            (q,) = self._heads(F.linear(take(x, rows), weight[:width], q_bias), 1)
            k, v = self._heads(F.linear(x, weight[width:], kv_bias), 2)
        return self.proj(self.attend(q, k, v, bias).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """[B,T,count*width] -> count times [B,h,T,d]."""
        B, T, _ = x.shape
        return x.reshape(B, T, count, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def fused_bias(self) -> Tensor | None:
        """Of queries, keys and values [3*width], zero for the keys where they have none."""
        if self.q_bias is None or self.v_bias is None:
            return self.qkv.bias
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])


class ClassAttention(nn.Module):
    """Attention of a few queries to themselves and the patches (CaiT, arXiv:2103.17239, section 3).

    Args:
        dim: width.
        num_heads: of width dim / num_heads each.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.attend = Softmax()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, num_queries: int) -> Tensor:
        """[B,Q+N,D], the first Q of which ask -> [B,Q,D]."""
        q, k, v = (
            layer(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for layer, tokens in ((self.q, x[:, :num_queries]), (self.k, x), (self.v, x))
        )
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class RelativePositionBias(nn.Module):
    """A learned bias per head and offset between two patches (BEiT, arXiv:2106.08254).

    The table has a row for each offset, (2 rows - 1)(2 columns - 1), and where there are prefix tokens three
    more: prefix to patch, patch to prefix, prefix to prefix (732 rows on a 14x14 grid), which all
    prefix tokens share.

    Args:
        grid: patches per side (rows, columns).
        num_heads: of the attention.
        num_prefix: prefix tokens before the patches.
    """

    index: Tensor

    def __init__(self, grid: tuple[int, int], num_heads: int, *, num_prefix: int):
        super().__init__()
        self.grid = grid
        self.num_prefix = num_prefix
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.bias_table = nn.Parameter(torch.empty(offsets + 3 * bool(num_prefix), num_heads))
        # no weight, so no state dict brings it: it must be there from the start
        self.register_buffer("index", _offset_index(grid), persistent=False)

    def reset_parameters(self) -> None:
        """Bias zero; the index once more, as memory that came from the meta device holds anything."""
        nn.init.zeros_(self.bias_table)
        self.index.copy_(_offset_index(self.grid))

    def forward(self, at: Tensor | None = None) -> Tensor:
        """The bias of the patches at grid index `at` [B,T] (None: all N in order): [1 or B,h,R+T,R+T]."""
        index = self.index[None] if at is None else self.index[at[:, :, None], at[:, None, :]]  # [B,T,T]
        if self.num_prefix:
            R, rows = self.num_prefix, len(self.bias_table)
            index = F.pad(index, (R, 0, 0, 0), value=rows - 2)  # patch to prefix
            index = F.pad(index, (0, 0, R, 0), value=rows - 3)  # prefix to patch
            index[:, :R, :R] = rows - 1
        return self.bias_table[index].permute(0, 3, 1, 2)


def _offset_index(grid: tuple[int, int]) -> Tensor:
    """The row of the table for each pair of patches, int64 [N,N]."""
    rows, columns = grid
    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    return (row[:, None] - row + rows - 1) * (2 * columns - 1) + (column[:, None] - column + columns - 1)
