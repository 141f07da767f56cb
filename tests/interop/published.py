"""Tiny networks with the names of published weights: timm's, and naive ones where timm has none."""

from typing import Any, NamedTuple

import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Mlp, ParallelThingsBlock, VisionTransformer
from torch import Tensor, nn

from mpm.interop.networks import network_of

PATCH, SIDE, DIM, HEADS, DEPTH, CLASSES = 4, 16, 24, 3, 2, 5
SIZES = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}
SIZES |= {"num_classes": CLASSES}


class NumberedBlock(nn.Module):
    """P attentions, then P MLPs, under the official names; `init_values` starts LayerScale."""

    branches = 1

    def __init__(self, dim: int, num_heads: int, init_values: float | None, **_: Any):
        super().__init__()
        self.scaled = init_values is not None
        for j in range(self.branches):
            number = str(j or "")
            setattr(self, f"norm1{number}", nn.LayerNorm(dim, eps=1e-6))
            setattr(self, f"attn{number}", Attention(dim, num_heads, qkv_bias=True))
            setattr(self, f"norm2{number}", nn.LayerNorm(dim, eps=1e-6))
            setattr(self, f"mlp{number}", Mlp(dim, 4 * dim))
            for half in (1, 2) if self.scaled else ():
                setattr(self, f"gamma_{half}" + (f"_{j}" if j else ""), nn.Parameter(torch.ones(dim)))

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        for half, kind in ((1, "attn"), (2, "mlp")):
            added = torch.zeros_like(x)
            for j in range(self.branches):
                number = str(j or "")
                part = getattr(self, f"{kind}{number}")(getattr(self, f"norm{half}{number}")(x))
                gamma = f"gamma_{half}" + (f"_{j}" if j else "")
                added = added + (part * getattr(self, gamma) if self.scaled else part)
            x = x + added
        return x


class TwiceNumberedBlock(NumberedBlock):
    branches = 2


class ConvolutionalHMLP(nn.Module):
    """The hMLP stem as published, of convolutions; here for patches of 4."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any):
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.grid_size = (img_size // patch_size,) * 2
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 4, 2, stride=2),
            nn.BatchNorm2d(embed_dim // 4),
            nn.GELU(),
            nn.Conv2d(embed_dim // 4, embed_dim, 2, stride=2),
            nn.BatchNorm2d(embed_dim),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Case(NamedTuple):
    build: type[nn.Module]
    arguments: dict[str, Any]
    family: str
    in_timm: bool = True


_VIT, _BEIT = VisionTransformer, Beit
_RELATIVE = {"use_abs_pos_emb": False, "init_values": 0.1}
CASES = {
    "deit": Case(_VIT, {}, "deit"),
    "deit of patches 4x8": Case(_VIT, {"patch_size": (4, 8), "img_size": (16, 32)}, "deit"),
    "deit distilled": Case(VisionTransformerDistilled, {}, "deit"),
    "deit without qkv bias": Case(_VIT, {"qkv_bias": False}, "deit"),
    "deit3": Case(_VIT, {"init_values": 0.1, "no_embed_class": True}, "deit3"),
    "deit3, official": Case(
        _VIT, {"init_values": 0.1, "no_embed_class": True, "block_fn": NumberedBlock}, "deit3", False
    ),
    "parallel": Case(_VIT, {"init_values": 0.1, "block_fn": ParallelThingsBlock}, "timm"),
    "parallel, official": Case(
        _VIT,
        {"init_values": 0.1, "no_embed_class": True, "block_fn": TwiceNumberedBlock},
        "three_things",
        False,
    ),
    "parallel without LayerScale, official": Case(
        _VIT, {"no_embed_class": True, "block_fn": TwiceNumberedBlock}, "three_things", False
    ),
    "hmlp": Case(_VIT, {"no_embed_class": True, "embed_layer": ConvolutionalHMLP}, "three_things", False),
    "registers": Case(_VIT, {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.1}, "timm"),
    "registers with slots": Case(_VIT, {"reg_tokens": 2}, "timm", False),  # mpm writes them without
    "registers alone": Case(
        _VIT, {"reg_tokens": 2, "no_embed_class": True, "class_token": False, "global_pool": "avg"}, "timm"
    ),
    "normed stem": Case(_VIT, {"embed_norm_layer": "layernorm", "init_values": 0.1}, "timm"),
    "mean": Case(_VIT, {"global_pool": "avg"}, "mae"),
    "cait": Case(Cait, {"mlp_ratio_token_only": 2.0}, "cait"),
    "beit": Case(_BEIT, _RELATIVE | {"use_rel_pos_bias": True}, "beit"),
    "beit, class token": Case(_BEIT, _RELATIVE | {"use_rel_pos_bias": True, "global_pool": "token"}, "beit"),
    "beit, shared bias": Case(_BEIT, _RELATIVE | {"use_shared_rel_pos_bias": True}, "beit"),
    "beit, positions": Case(_BEIT, {}, "beit"),
}


def published(case: Case, *, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network of timm with random weights, in eval mode."""
    return randomize(case.build(**SIZES | case.arguments)).to(dtype).eval()


def randomize(network: nn.Module) -> nn.Module:
    """Random values in every parameter and statistic."""
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.3)
    return network


def ours(
    config: dict[str, Any], state: dict[str, Tensor], *, dtype: torch.dtype = torch.float64
) -> nn.ModuleDict:
    """mpm's network of facts and weights, in eval mode; the state must be all of it."""
    out_dim = len(state["predictor.head.weight"]) if "predictor.head.weight" in state else 0
    network = network_of(config, out_dim=out_dim).to(dtype)
    for part in network.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()  # indices, which are not in the state
    network.load_state_dict(state)
    return network.eval()


def logits(network: nn.ModuleDict, images: Tensor) -> Tensor:
    """The mean over the heads."""
    vectors = network["readout"](network["backbone"](images))
    return torch.stack([head(vectors[:, q]) for q, head in enumerate(network["heads"])]).mean(0)
