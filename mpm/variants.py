"""The published architectures by name: plain data, so that checking a configuration needs no torch.

Sources: ViT (arXiv:2010.11929), DeiT (2012.12877), DeiT III (2204.07118), CaiT (2103.17239), "Three things
everyone should know about ViTs" (2203.09795), BEiT (2106.08254), BEiT v2 (2208.06366), MAE (2111.06377),
SimMIM (2111.09886).
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

__all__ = ["BLOCKS_PATTERN", "SIZES", "VARIANTS", "Architecture", "Variant", "architecture", "variant"]

BLOCKS_PATTERN = r"^vit_(ti|s|b|l)_([1-9]\d{0,2})x([1-9]\d?)$"

LINEAR_STEM: Mapping[str, Any] = MappingProxyType({"kind": "linear"})
LEARNED: Mapping[str, Any] = MappingProxyType({"table": "learned", "bias": "none"})
SINCOS: Mapping[str, Any] = MappingProxyType({"table": "sincos", "bias": "none"})
SHARED_BIAS: Mapping[str, Any] = MappingProxyType({"table": "none", "bias": "shared"})


class Architecture(NamedTuple):
    """All that fixes a backbone but the images; the keys of a configuration's `backbone` section.

    Attributes:
        patch_size: height and width of a patch in pixels.
        dim: width of a token.
        depth: blocks one after the other.
        heads: attention heads of a branch.
        mlp_ratio: hidden width of an MLP over `dim`.
        branches: attentions, and MLPs, side by side in a block.
        attention: "softmax" or "talking_heads".
        qkv_bias: projections with a bias: "all", "query_value" or "none".
        layer_scale: start value of LayerScale; None: none.
        drop_path: probability of skipping a residual branch.
        drop_path_rule: "linear", from 0 at the first block to the rate at the last, or "constant".
        class_token: whether a token stands for the image.
        distillation_token: whether another one stands for the teacher's answer.
        registers: further tokens. The order is class, distillation, registers.
        stem: `kind` and the options of that kind.
        positions: `table` (learned, sincos, none) and relative `bias` (none, shared, per_block).
    """

    patch_size: tuple[int, int]
    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    branches: int = 1
    attention: str = "softmax"
    qkv_bias: str = "all"
    layer_scale: float | None = None
    drop_path: float = 0.0
    drop_path_rule: str = "linear"
    class_token: bool = True
    distillation_token: bool = False
    registers: int = 0
    stem: Mapping[str, Any] = LINEAR_STEM
    positions: Mapping[str, Any] = LEARNED

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches."""
        return self.class_token + self.distillation_token + self.registers

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Of each block."""
        if self.drop_path_rule == "constant":
            return (self.drop_path,) * self.depth
        return tuple(self.drop_path * index / max(self.depth - 1, 1) for index in range(self.depth))

    def for_fine_tuning(self) -> "Architecture":
        """What a classifier makes of it.

        A fixed position table is trained (MAE); a shared bias is copied to each block (BEiT).
        """
        loosened = {"sincos": "learned", "shared": "per_block"}
        return self._replace(
            positions={key: loosened.get(value, value) for key, value in self.positions.items()}
        )


# what a name stands for where a checkpoint may differ from it in the rest
SIZES = ("patch_size", "dim", "depth", "heads", "mlp_ratio", "branches", "attention")


class Variant(NamedTuple):
    """A published architecture.

    Attributes:
        architecture: of the backbone; pretraining's where that differs from fine-tuning's.
        paper: where it comes from.
        layout: names and shapes of the official weights, in which parameters are counted.
        image_sizes: published, in pixels.
        readout: `kind` and options of the classifier's reader.
        networks: what it is published as: "classifier", "encoder", "pretraining".
        initialization: how pretraining starts, see `mpm.backbones.initialization`.
        classifier_initialization: how a classifier starts.
        head_std: deviation of the classifier's first head.
        predictor: `kind` and options of what predicts in pretraining.
    """

    architecture: Architecture
    paper: str
    layout: str
    image_sizes: tuple[int, ...] = (224,)
    readout: Mapping[str, Any] = MappingProxyType({"kind": "token"})
    networks: tuple[str, ...] = ("classifier",)
    initialization: str = "vit"
    classifier_initialization: str = "vit"
    head_std: float = 0.02
    predictor: Mapping[str, Any] = MappingProxyType({"kind": "linear"})


_SIZES = {
    "ti": Architecture((16, 16), dim=192, depth=12, heads=3),
    "s": Architecture((16, 16), dim=384, depth=12, heads=6),
    "m": Architecture((16, 16), dim=512, depth=12, heads=8),
    "b": Architecture((16, 16), dim=768, depth=12, heads=12),
    "l": Architecture((16, 16), dim=1024, depth=24, heads=16),
    "h": Architecture((14, 14), dim=1280, depth=32, heads=16),
}
_MEAN: Mapping[str, Any] = MappingProxyType({"kind": "mean"})
_MAE_DECODER: Mapping[str, Any] = MappingProxyType({"kind": "decoder", "dim": 512, "depth": 8, "heads": 16})


def _vits() -> dict[str, Variant]:
    named = {
        f"vit_{size}": Variant(_SIZES[size], "ViT", "deit", (224, 384) if size != "h" else (224,))
        for size in ("ti", "s", "b", "l", "h")
    }
    return named | {"debug": Variant(Architecture((4, 4), dim=32, depth=2, heads=2), "-", "deit", (32,))}


def _deits() -> dict[str, Variant]:
    """DeiT (table 1; drop path of table 9) and DeiT III (rates of its recipes; none is known for M)."""
    named = {}
    for size in ("ti", "s", "b"):
        plain = _SIZES[size]._replace(drop_path=0.1)
        named[f"deit_{size}"] = Variant(plain, "DeiT", "deit", (224, 384))
        distilled = plain._replace(distillation_token=True)
        named[f"deit_{size}_distilled"] = Variant(distilled, "DeiT", "deit", (224, 384))
    for size, rate in {"s": 0.05, "m": 0.0, "b": 0.2, "l": 0.45, "h": 0.6}.items():
        third = _SIZES[size]._replace(layer_scale=1e-4, drop_path=rate, drop_path_rule="constant")
        image_sizes = (224, 384) if size in "sbl" else (224,)
        named[f"deit3_{size}"] = Variant(third, "DeiT III", "deit3", image_sizes)
    return named


def _caits() -> dict[str, Variant]:
    """CaiT: heads of width 48; LayerScale starts at 1e-5 for 24 blocks and at 1e-6 for more.

    The released code starts XXS-36 at 1e-5, against the paper's rule.
    """
    widths = {"xxs": 192, "xs": 288, "s": 384, "m": 768}
    rates = {
        ("xxs", 24): 0.05, ("xxs", 36): 0.1, ("xs", 24): 0.05, ("xs", 36): 0.1, ("s", 24): 0.1,
        ("s", 36): 0.2, ("s", 48): 0.3, ("m", 24): 0.2, ("m", 36): 0.3, ("m", 48): 0.4,
    }  # fmt: skip
    return {
        f"cait_{size}{depth}": Variant(
            Architecture(
                (16, 16),
                dim=widths[size],
                depth=depth,
                heads=widths[size] // 48,
                attention="talking_heads",
                layer_scale=1e-5 if depth == 24 else 1e-6,
                drop_path=rate,
                drop_path_rule="constant",
                class_token=False,
            ),
            "CaiT",
            "cait",
            (224, 384, 448),
            MappingProxyType({"kind": "class_attention"}),
        )
        for (size, depth), rate in rates.items()
    }


def _three_things(size: str, depth: int, branches: int) -> Variant:
    """N x P: `depth` stages of `branches` parallel blocks; drop path of section 2.2, constant."""
    rate = {"ti": 0.0, "s": 0.05, "b": 0.1, "l": 0.4}[size]
    return Variant(
        _SIZES[size]._replace(depth=depth, branches=branches, drop_path=rate, drop_path_rule="constant"),
        "Three things",
        "three_things",
        (224, 384) if (depth, branches) == (_SIZES[size].depth, 1) else (224,),
    )


def _masked() -> dict[str, Variant]:
    """Networks published for masked pretraining, in that form, and what fine-tuning makes of them."""
    named, both = {}, ("encoder", "pretraining")
    for family, paper in {"beit": "BEiT", "beitv2": "BEiT v2"}.items():
        for size, scale, image_sizes in (("b", 0.1, (224, 384)), ("l", 1e-5, (224, 384, 512))):
            trunk = _SIZES[size]._replace(
                qkv_bias="query_value", layer_scale=scale, drop_path=0.1, positions=SHARED_BIAS
            )
            published = image_sizes if family == "beit" else (224,)
            networks, start = ("classifier", "pretraining"), ("beit", "beit_finetuning", 2e-5)
            pretrained = Variant(trunk, paper, "beit", published, _MEAN, networks, *start)
            if family == "beitv2":
                early = {"kind": "class_pretraining", "early_layer": trunk.depth - 3, "depth": 2}
                pretrained = pretrained._replace(predictor=MappingProxyType(early))
            named[f"{family}_{size}"] = pretrained
    for size in ("b", "l", "h"):
        trunk = _SIZES[size]._replace(positions=SINCOS)
        start = ("mae", "vit", 2e-5)
        named[f"mae_{size}"] = Variant(trunk, "MAE", "mae", (224,), _MEAN, both, *start, _MAE_DECODER)
    trunk, starts = (
        named["beit_b"].architecture,
        ("beit", "beit_finetuning", 2e-5),
    )  # SimMIM's ViT is BEiT's code
    named["simmim_b"] = Variant(trunk, "SimMIM", "simmim", (224,), _MEAN, both, *starts)
    return named


# blocks of the paper's figures and tables; `variant` knows any other N x P, too
_PUBLISHED_BLOCKS = {
    "ti": ((12, 1), (24, 1), (12, 2)),
    "s": (
        *((12, 1), (24, 1), (12, 2), (36, 1), (18, 2), (12, 3), (9, 4)),
        *((48, 1), (24, 2), (60, 1), (30, 2), (20, 3), (15, 4)),
    ),
    "b": ((12, 1), (13, 1), (24, 1), (12, 2), (36, 1), (18, 2), (12, 3), (9, 4)),
    "l": ((24, 1), (12, 2)),
}
VARIANTS: Mapping[str, Variant] = MappingProxyType(
    _vits()
    | _deits()
    | _caits()
    | {
        f"vit_{size}_{depth}x{branches}": _three_things(size, depth, branches)
        for size, shapes in _PUBLISHED_BLOCKS.items()
        for depth, branches in shapes
    }
    | _masked()
)


def variant(name: str) -> Variant:
    """A published architecture by name, or `vit_{ti,s,b,l}_NxP`: N stages of P parallel blocks.

    Raises:
        ValueError: if there is none of that name.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    if match := re.match(BLOCKS_PATTERN, name):
        return _three_things(match[1], int(match[2]), int(match[3]))
    import difflib

    near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f'variant "{name}" is unknown; {hint}`mpm models` lists them, and any N x P is one, as vit_b_18x2'
    )


def architecture(name: str | None, **stated: Any) -> Architecture:
    """A backbone's architecture: what is stated, else the named variant's.

    Args:
        name: of a variant; None: the sizes are stated.
        stated: attributes of `Architecture`; of `positions` some keys are enough.

    Raises:
        ValueError: if the name, or an attribute, is unknown, or a size is stated nowhere.
    """
    if unknown := stated.keys() - set(Architecture._fields):
        raise ValueError(f"{min(unknown)} is unknown; the keys are {', '.join(Architecture._fields)}")
    base = variant(name).architecture if name is not None else None
    positions = {**(base.positions if base else LEARNED), **stated.get("positions", {})}
    if base is not None:
        return base._replace(**(stated | {"positions": positions}))
    missing = [key for key in ("patch_size", "dim", "depth", "heads") if key not in stated]
    if missing:
        raise ValueError(f"{missing[0]} is required without a variant; give it, or a variant such as vit_b")
    return Architecture(**(stated | {"positions": positions}))
