import pytest
import torch
from torch import Tensor

from mpm.backbones import attention
from mpm.backbones.attention import Attention, RelativePositionBias, attend
from tests.networks import randomize

KINDS = ["all", "query_value", "none"]


def naive(module: Attention, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Head by head, query by query."""
    B, T, D = x.shape
    h = module.num_heads
    d = D // h
    b_qkv = x.new_zeros(3 * D) if module.qkv.bias is None else module.qkv.bias
    if module.q_bias is not None:
        b_qkv = torch.cat([module.q_bias, x.new_zeros(D), module.v_bias])
    q, k, v = (x @ module.qkv.weight.T + b_qkv).split(D, dim=-1)
    out = torch.zeros_like(x)
    for b in range(B):
        for i in range(h):
            head = slice(i * d, (i + 1) * d)
            for t in range(T):
                logits = torch.stack([q[b, t, head] @ k[b, s, head] / d**0.5 for s in range(T)])
                if bias is not None:
                    logits = logits + bias.expand(B, h, T, T)[b, i, t]
                weights = logits.exp() / logits.exp().sum()
                out[b, t, head] = weights @ v[b, :, head]
    return out @ module.proj.weight.T + module.proj.bias


@pytest.mark.parametrize("bias_shape", [None, (1, 2, 5, 5), (3, 2, 5, 5), (2, 5, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_equals_a_loop(kind, bias_shape) -> None:
    module = randomize(Attention(8, 2, qkv_bias=kind)).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    bias = None if bias_shape is None else torch.randn(bias_shape, dtype=torch.float64)
    torch.testing.assert_close(module(x, bias), naive(module, x, bias), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_all_then_take(kind, with_bias) -> None:
    module = randomize(Attention(8, 2, qkv_bias=kind)).double()
    x, rows = torch.randn(3, 5, 8, dtype=torch.float64), torch.tensor([[0, 4], [2, 1], [3, 3]])
    bias = torch.randn(3, 2, 5, 5, dtype=torch.float64) if with_bias else None
    picked = None if bias is None else torch.stack([bias[b, :, rows[b]] for b in range(3)])
    expected = torch.stack([naive(module, x, bias)[b, rows[b]] for b in range(3)])
    torch.testing.assert_close(module(x, picked, rows), expected, rtol=1e-9, atol=1e-9)


def test_a_bias_on_the_keys_changes_nothing() -> None:
    """Why BEiT has none."""
    full, split = randomize(Attention(8, 2)).double(), Attention(8, 2, qkv_bias="query_value").double()
    q_bias, _, v_bias = full.qkv.bias.detach().split(8)
    weights = {name: tensor for name, tensor in full.state_dict().items() if name != "qkv.bias"}
    split.load_state_dict(weights | {"q_bias": q_bias, "v_bias": v_bias})
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(split(x), full(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("has_amx", [False, True])
def test_bf16_equals_fp32_on_every_cpu(has_amx: bool, with_bias: bool, monkeypatch) -> None:
    """The way that is taken depends on the CPU; each is compared with the fused kernel in float32."""
    monkeypatch.setattr(attention, "_has_amx", lambda: has_amx)
    q, k, v = torch.randn(3, 2, 4, 6, 32).bfloat16().requires_grad_().unbind(0)
    bias = torch.randn(1, 4, 6, 6) if with_bias else None
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), bias)
    found = attend(q, k, v, bias)
    assert found.dtype == torch.bfloat16
    # bf16 keeps 8 bits: logits of size 3 are off by .01, values of size 1 by .004
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@pytest.mark.parametrize("grid", [(3, 3), (2, 4), (4, 1)])
def test_relative_bias_equals_a_loop(grid, num_prefix) -> None:
    module = randomize(RelativePositionBias(grid, 2, num_prefix=num_prefix))
    (rows, columns), R = grid, num_prefix
    N, offsets = rows * columns, (2 * rows - 1) * (2 * columns - 1)
    assert len(module.bias_table) == offsets + (3 if R else 0)
    found = module()
    assert found.shape == (1, 2, R + N, R + N)
    for i in range(R + N):
        for j in range(R + N):
            if i < R and j < R:
                row = offsets + 2
            elif i < R:
                row = offsets
            elif j < R:
                row = offsets + 1
            else:
                down = (i - R) // columns - (j - R) // columns + rows - 1
                across = (i - R) % columns - (j - R) % columns + columns - 1
                row = down * (2 * columns - 1) + across
            assert torch.equal(found[0, :, i, j], module.bias_table[row])


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
def test_relative_bias_of_some_patches_is_a_part_of_all(num_prefix: int) -> None:
    module, at = (
        randomize(RelativePositionBias((2, 4), 3, num_prefix=num_prefix)),
        torch.tensor([[1, 6, 3], [7, 0, 2]]),
    )
    everything, found = module()[0], module(at)
    for b in range(2):
        kept = [*range(num_prefix), *(num_prefix + at[b]).tolist()]
        assert torch.equal(found[b], everything[:, kept][:, :, kept])


def test_rows_of_the_published_tables() -> None:
    """(2 * 14 - 1)^2 + 3 and so on for 384 and 512 pixels (BEiT)."""
    with torch.device("meta"):
        rows = [len(RelativePositionBias((g, g), 12, num_prefix=1).bias_table) for g in (14, 24, 32)]
    assert rows == [732, 2212, 3972]
