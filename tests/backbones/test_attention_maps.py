import pytest
import torch
from torch import Tensor, nn

from mpm.backbones.attention import Softmax, TalkingHeads
from mpm.backbones.attention_maps import attention_maps, recorded_attention
from mpm.backbones.backbone import Backbone
from mpm.backbones.readouts import ClassAttentionReadout, MeanReadout, TokenReadout
from tests.networks import DIM, GRID, HEADS, make_backbone, random_images, randomize

TRUNKS = {
    "softmax": {},
    "relative bias": {"relative_bias": "shared", "learned_positions": None},
    "talking heads": {"attention": "talking_heads", "relative_bias": "per_block"},
    "parallel": {"branches": 2, "relative_bias": "shared"},
    "no prefix": {"num_prefix": 0},
}


def trunk_of(kind: str) -> Backbone:
    backbone = randomize(make_backbone(**TRUNKS[kind])).double().eval()
    assert isinstance(backbone, Backbone)
    return backbone


def images_of(count: int = 2) -> Tensor:
    return random_images(count).double()


@pytest.mark.parametrize("kind", TRUNKS)
def test_recorded_weights_times_values_are_what_every_attention_gives(kind: str) -> None:
    backbone = trunk_of(kind)
    readout = randomize(ClassAttentionReadout(DIM, HEADS, num_vectors=2)).double()
    whole = nn.ModuleList([backbone, readout])
    called: list[tuple[Tensor, Tensor]] = []
    for part in whole.modules():
        if isinstance(part, Softmax | TalkingHeads):
            part.register_forward_hook(lambda _, inputs, output: called.append((inputs[2], output)))
    with recorded_attention(whole) as recorded:
        readout(backbone(images_of()))
    assert len(recorded) == len(called) == 2 * (2 if kind == "parallel" else 1) + 2
    for weights, (values, output) in zip(recorded, called, strict=True):
        torch.testing.assert_close(weights @ values, output, rtol=1e-10, atol=1e-10)


def test_nothing_is_recorded_afterwards_nor_changed() -> None:
    backbone = trunk_of("talking heads")
    images = images_of()
    before = backbone(images).patches
    with recorded_attention(backbone) as recorded:
        during = backbone(images).patches
    count = len(recorded)
    assert torch.equal(backbone(images).patches, before)
    assert torch.equal(during, before)
    assert len(recorded) == count == 2


def rows_of_the_last_block(backbone: Backbone, images: Tensor) -> Tensor:
    """Softmax of all tokens over all, [B,h,T,T], written out from the block's parameters."""
    block = backbone.blocks[-1]
    encoded = backbone.encode(backbone.embed(images), layers=[0])
    x = block.norm1(encoded.layers[0])
    q, k, _ = (x @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, dim=-1)
    d = DIM // HEADS
    per_head = []
    for head in range(HEADS):
        part = slice(head * d, (head + 1) * d)
        logits = torch.einsum("bsd,btd->bst", q[..., part], k[..., part]) / d**0.5
        if encoded.bias is not None:
            logits = logits + encoded.bias[:, head]
        per_head.append(logits.softmax(-1))
    return torch.stack(per_head, 1)


@pytest.mark.parametrize("kind", ["softmax", "relative bias"])
def test_a_map_is_the_row_of_what_is_read(kind: str) -> None:
    backbone, images = trunk_of(kind), images_of()
    rows = rows_of_the_last_block(backbone, images)
    of_token = rows[:, :, 0, 1:].float().unflatten(-1, GRID)[:, None]
    of_mean = rows[:, :, 1:, 1:].mean(2).float().unflatten(-1, GRID)[:, None]
    found = attention_maps(backbone, images, readout=TokenReadout(DIM))
    torch.testing.assert_close(found.weights, of_token)
    assert (found.groups, found.query) == (("",), "class token, last block")
    for readout in (None, MeanReadout(DIM)):
        found = attention_maps(backbone, images, readout=readout)
        torch.testing.assert_close(found.weights, of_mean)
        assert found.query == "mean over the patches, last block"
        found = attention_maps(backbone, images, readout=readout, query="class_token")
        torch.testing.assert_close(found.weights, of_token)
    found = attention_maps(backbone, images, readout=TokenReadout(DIM), query="patches")
    torch.testing.assert_close(found.weights, of_mean)


def test_branches_are_told_apart() -> None:
    backbone, images = trunk_of("parallel"), images_of()
    found = attention_maps(backbone, images, readout=TokenReadout(DIM))
    assert found.groups == ("branch 1", "branch 2")
    assert found.weights.shape == (2, 2, HEADS, *GRID)
    last = backbone.blocks[-1]
    last.attns = nn.ModuleList([last.attns[1], last.attns[0]])
    swapped = attention_maps(backbone, images, readout=TokenReadout(DIM))
    torch.testing.assert_close(swapped.weights, found.weights.flip(1))


def test_class_attention_is_the_first_querys_of_each_block() -> None:
    """Where all keys are equal, every one of the 2 queries and 12 patches gets 1/14."""
    backbone = trunk_of("no prefix")
    readout = randomize(ClassAttentionReadout(DIM, HEADS, depth=3, num_vectors=2)).double()
    found = attention_maps(backbone, images_of(), readout=readout)
    assert found.groups == ("class-attention block 1", "class-attention block 2", "class-attention block 3")
    assert found.weights.shape == (2, 3, HEADS, *GRID)
    assert (found.weights.sum((-1, -2)) < 1).all()
    nn.init.zeros_(readout.blocks[1].attn.k.weight)
    found = attention_maps(backbone, images_of(), readout=readout)
    torch.testing.assert_close(found.weights[:, 1], torch.full((2, HEADS, *GRID), 1 / 14))
    with pytest.raises(ValueError, match="class token reads by class attention; leave --query out"):
        attention_maps(backbone, images_of(), readout=readout, query="class_token")
    with pytest.raises(ValueError, match="no class token; leave --query out"):
        attention_maps(backbone, images_of(), readout=MeanReadout(DIM), query="class_token")
