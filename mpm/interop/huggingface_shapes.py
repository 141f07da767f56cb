"""Tensors of another shape in transformers than in mpm: tokens, positions, pixels, attention."""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mpm.interop.huggingface_classes import Kind

__all__ = ["TOKENS", "give_their_shapes", "take_their_shapes"]

TOKENS = ("embeddings.cls_token", "embeddings.distillation_token")
_PIXELS = "(c h w) ... -> (h w c) ..."  # their order of a patch's pixels, where a convolution has them


def take_their_shapes(state: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    """Our names with their shapes -> our shapes, in place.

    Raises:
        ValueError: if the decoder gives the class token a position.
    """
    backbone = config["backbone"]
    stem = "backbone.stem.proj.weight"
    state[stem] = rearrange(state[stem], "d c h w -> d (h w c)")
    table = "backbone.positions.table"
    if table in state:
        R = len(state["backbone.prefix_tokens"])
        state["backbone.prefix_tokens"] = state["backbone.prefix_tokens"] + state[table][0, :R]
        state[table] = state[table][0, R:]  # [N,D]
    for token in ("predictor.mask_token", "predictor.encoder_mask_token"):
        if token in state:
            state[token] = state[token].flatten()
    if (decoder_table := state.get("predictor.positions.table")) is not None:
        if decoder_table[0, 0].any():
            raise ValueError(
                "decoder_pos_embed moves the class token, which mpm's decoder cannot; it must be 0 there"
            )
        state["predictor.positions.table"] = decoder_table[0, 1:]
    head = "predictor.head.weight"
    if head in state and state[head].dim() == 4:  # a convolution before a pixel shuffle
        axes = dict(zip("hw", backbone["patch_size"], strict=True))
        state[head] = rearrange(state[head].flatten(1), _PIXELS, **axes)
        state["predictor.head.bias"] = rearrange(state["predictor.head.bias"], _PIXELS, **axes)
    for name in [name for name in state if name.endswith(".attn.q.weight")]:
        kind = backbone["qkv_bias"] if name.startswith("backbone") else "all"
        _fuse(state, name.removesuffix("q.weight"), kind)


def _fuse(state: dict[str, Tensor], attention: str, kind: str) -> None:
    """Queries, keys and values to one map, in place."""
    weights = [state.pop(f"{attention}{part}.weight") for part in "qkv"]
    biases = [state.pop(f"{attention}{part}.bias", None) for part in "qkv"]
    state[f"{attention}qkv.weight"] = torch.cat(weights)  # [3D,D]
    filled = [
        weight.new_zeros(len(weight)) if b is None else b for weight, b in zip(weights, biases, strict=True)
    ]
    match kind:
        case "all":
            state[f"{attention}qkv.bias"] = torch.cat(filled)
        case "query_value":
            state[f"{attention}q_bias"], _, state[f"{attention}v_bias"] = filled


def give_their_shapes(
    state: dict[str, Tensor], kind: Kind, config: Mapping[str, Any], *, key_bias: bool
) -> None:
    """Our names with our shapes -> our names with their shapes, tokens with their names, in place."""
    backbone = config["backbone"]
    axes = dict(zip("hw", backbone["patch_size"], strict=True))
    stem = "backbone.stem.proj.weight"
    state[stem] = rearrange(state[stem], "d (h w c) -> d c h w", **axes)
    tokens = state.pop("backbone.prefix_tokens")  # [R,D]
    for name, token in zip(TOKENS, tokens, strict=False):
        state[kind.trunk + name] = token[None, None].clone()
    table = "backbone.positions.table"
    if table in state:
        state[table] = torch.cat([torch.zeros_like(tokens), state[table]])[None]  # [1,R+N,D]
    elif kind.model_type != "beit":
        N = (config["image_size"][0] // axes["h"]) * (config["image_size"][1] // axes["w"])
        state[table] = tokens.new_zeros(1, len(tokens) + N, backbone["dim"])
    for token in ("predictor.mask_token", "predictor.encoder_mask_token"):
        if token in state:
            state[token] = state[token][None, None]
    if (decoder_table := state.get("predictor.positions.table")) is not None:
        slot = torch.zeros_like(decoder_table[:1])
        state["predictor.positions.table"] = torch.cat([slot, decoder_table])[None]
    head = "predictor.head.weight"
    if "decoder.0" in kind.reader:
        back = "(h w c) ... -> (c h w) ..."
        state[head] = rearrange(state[head], back, **axes)[:, :, None, None]
        state["predictor.head.bias"] = rearrange(state["predictor.head.bias"], back, **axes)
    for name in [name for name in state if name.endswith(".attn.qkv.weight")]:
        _split(state, name.removesuffix("qkv.weight"), is_beit=kind.model_type == "beit", biased=key_bias)


def _split(state: dict[str, Tensor], attention: str, *, is_beit: bool, biased: bool) -> None:
    """One map to queries, keys and values, in place. BEiT has no bias of keys, which softmax cancels."""
    weight = state.pop(f"{attention}qkv.weight")
    zeros = weight.new_zeros(len(weight) // 3)
    fused = state.pop(f"{attention}qkv.bias", None)
    q_bias, v_bias = (state.pop(f"{attention}{part}_bias", zeros) for part in "qv")
    biases = (q_bias, zeros, v_bias) if fused is None else fused.chunk(3)
    for part, part_weight, bias in zip("qkv", weight.chunk(3), biases, strict=True):
        state[f"{attention}{part}.weight"] = part_weight
        if part != "k" if is_beit else biased:
            state[f"{attention}{part}.bias"] = bias.clone()
