"""Tensors of another form in files than in mpm: prefix tokens, positions, layers that see pixels."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from mpm.patchify.stems import merge_factors

__all__ = ["TOKENS", "Form", "check_tokens", "form_of", "tokens_in", "tokens_out"]

TOKENS = {"class_token": "cls_token", "distillation_token": "dist_token", "registers": "reg_token"}


class Form(NamedTuple):
    """Axes of a tensor in files and in mpm, as einops writes them."""

    theirs: str
    ours: str
    axes: dict[str, int]

    def inward(self, tensor: Tensor) -> Tensor:
        """A file's tensor in mpm's form."""
        return rearrange(tensor, f"{self.theirs} -> {self.ours}", **self.axes).contiguous()

    def outward(self, tensor: Tensor) -> Tensor:
        """An mpm tensor in the file's form."""
        return rearrange(tensor, f"{self.ours} -> {self.theirs}", **self.axes).contiguous()


_SAME = Form("...", "...", {})


def form_of(name: str, layout: str, patch_size: tuple[int, int]) -> Form:
    """The form of an mpm parameter in a layout."""
    patch = {"h": patch_size[0], "w": patch_size[1]}
    match name.split("."):
        case ["backbone", "stem", "proj", "weight"]:
            return Form("d c h w", "d (h w c)", patch)
        case ["backbone", "stem", "projs", step, "weight"]:
            side = merge_factors(patch_size[0])[int(step)]
            return Form("d c h w", "d (h w c)", {"h": side, "w": side})
        case ["readout", "tokens"]:
            return Form("1 q d", "q d", {})
        case ["predictor", "encoder_mask_token" | "mask_token"]:
            return Form("1 1 d", "d", {})
        case ["predictor", "head", "weight"] if layout == "simmim":  # a 1x1 convolution, then PixelShuffle
            return Form("(c h w) d 1 1", "(h w c) d", patch)
        case ["predictor", "head", "bias"] if layout == "simmim":
            return Form("(c h w)", "(h w c)", patch)
    return _SAME


def check_tokens(state: Mapping[str, Tensor], dim: int, *keys: str) -> None:
    """Whether tokens and positions have the shapes that recognition and `tokens_in` take for granted.

    Raises:
        ValueError: if one has not.
    """
    for key in keys:
        rows = 1 if key in ("cls_token", "dist_token") else "*"
        shape = state[key].shape if key in state else None
        if shape is not None and (len(shape) != 3 or shape[::2] != (1, dim) or rows not in ("*", shape[1])):
            raise ValueError(f"{key} is {list(shape)}, where [1, {rows}, {dim}] is expected")


def tokens_in(
    file: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Prefix tokens and position tables of a file, in mpm's form.

    A prefix token's own position, which some files keep in `pos_embed`, is added to the token (exact).

    Args:
        file: tensors of the file.
        config: facts as `load_official` gives them.

    Returns: tensors by mpm's names, and notes.

    Raises:
        ValueError: if the decoder gives a prefix token a position.
    """
    trunk, notes = config["backbone"], []
    tokens = [file[theirs][0] for ours, theirs in TOKENS.items() if trunk[ours]]
    patches = _patches(config)
    ours = {"backbone.prefix_tokens": torch.cat(tokens)} if tokens else {}  # [R,D]
    if "pos_embed" in file:
        slots, table = file["pos_embed"][0].tensor_split([-patches])  # [0 or R,D], [N,D]
        ours["backbone.positions.table"] = table
        if slots.any():
            ours["backbone.prefix_tokens"] = ours["backbone.prefix_tokens"] + slots
            notes.append("the position of each prefix token, in pos_embed, is added to the token")
    if "decoder_pos_embed" in file and config["predictor"] is not None:
        slots, table = file["decoder_pos_embed"][0].tensor_split([-patches])
        ours["predictor.positions.table"] = table
        if slots.any():
            raise ValueError(
                "decoder_pos_embed is not 0 at the prefix tokens, which mpm's decoder gives no position; "
                "drop the decoder's keys to read the encoder alone"
            )
    return ours, tuple(notes)


def tokens_out(state: Mapping[str, Tensor], config: Mapping[str, Any], *, slots: bool) -> dict[str, Tensor]:
    """Prefix tokens and position tables of mpm, in a file's form.

    Args:
        state: of mpm.
        config: facts as `load_official` gives them.
        slots: whether `pos_embed` has a row, of zeros, for each prefix token.
    """
    trunk = config["backbone"]
    theirs: dict[str, Tensor] = {}
    counts = [int(trunk[ours]) for ours in TOKENS]
    if prefix := sum(counts):
        parts = state["backbone.prefix_tokens"].split(counts)
        theirs |= {
            name: part[None].clone() for name, part in zip(TOKENS.values(), parts, strict=True) if len(part)
        }
    for ours, name, rows in (
        ("backbone.positions.table", "pos_embed", prefix if slots else 0),
        ("predictor.positions.table", "decoder_pos_embed", prefix),
    ):
        if ours in state:
            table = state[ours]
            theirs[name] = torch.cat([table.new_zeros(rows, table.shape[1]), table])[None]
    return theirs


def _patches(config: Mapping[str, Any]) -> int:
    (height, width), (rows, columns) = config["image_size"], config["backbone"]["patch_size"]
    return (height // rows) * (width // columns)
