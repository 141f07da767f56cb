"""Published tokenizers: DALL-E's encoder, BEiT's discrete autoencoder, BEiT v2's VQ-KD."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpm.backbones.create import create_backbone
from mpm.interop.files import Weights, read_weights, some
from mpm.interop.keys import outputs_of, shape_of
from mpm.interop.official import official_of
from mpm.patchify.pixels import IMAGENET, Normalize
from mpm.tokenizers.dalle import DalleEncoder
from mpm.tokenizers.dvae import DiscreteVAE
from mpm.tokenizers.vqkd import VQKD
from mpm.variants import Architecture

__all__ = ["load_tokenizer"]

# of VQ-KD's training: what is told, how codes were used, and what it was held to
_UNUSED = ("decoder.", "decode_task_layer.", "quantize.", "teacher", "scaling", "loss")
_VECTORS = "quantize.embedding.weight"


def load_tokenizer(path: str | Path, *, heads: int | None = None) -> nn.Module:
    """A published tokenizer, frozen and in eval mode; see `mpm.tokenizers.base.Tokenizer`.

    | file | is |
    |---|---|
    | a plain state dict of DALL-E's encoder, as mmpretrain's `dalle_encoder.pth` | `DalleEncoder` |
    | `pytorch_model.bin` of BEiT's discrete autoencoder, {"weights": ...} | `DiscreteVAE` |
    | `vqkd_encoder_base_decoder_*.pth` of BEiT v2, {"model": ...} | `VQKD`, without its decoder |

    Args:
        path: of a file of torch or safetensors. It holds tensors; nothing in it is run.
        heads: of VQ-KD's attention, where its width is not published.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is broken, would run code, or is none of these.
    """
    path = Path(path).expanduser()
    try:
        weights = read_weights(path)
    except ValueError as error:
        if "dall_e." in str(error):
            raise ValueError(_pickled(path)) from None
        raise
    try:
        tokenizer = _tokenizer_of(weights, heads=heads)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tokenizer.requires_grad_(False).eval()


def _pickled(path: Path) -> str:
    plain = path.with_suffix(".pth")
    return (
        f"{path} is DALL-E's network as pickled, which runs code when it is read, and mpm reads plain "
        'tensors only; if you trust it, convert it once, where dall_e is installed: python -c "import torch; '
        f"torch.save(torch.load('{path}', map_location='cpu', weights_only=False).state_dict(), '{plain}')\""
    )


def _tokenizer_of(weights: Weights, *, heads: int | None) -> nn.Module:
    state = {
        key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in weights.state.items()
    }
    if broken := [key for key, tensor in state.items() if not tensor.isfinite().all()]:
        raise ValueError(f"weights that are not finite: {some(broken)}; use another file")
    if _VECTORS in state:
        return _vqkd(state, weights.facts, heads=heads)
    if "blocks.input.w" in state:
        return _dalle(state)
    if "codebook.weight" in state:
        return _dvae(state)
    raise ValueError(
        f"no tokenizer that mpm knows has the keys {some(state)}; give DALL-E's encoder, a discrete "
        "autoencoder of BEiT, or a VQ-KD of BEiT v2"
    )


def _vqkd(state: Mapping[str, Tensor], facts: Mapping[str, Any], *, heads: int | None) -> VQKD:
    encoder, task = (
        {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
        for prefix in ("encoder.", "encode_task_layer.")
    )
    known = ("encoder.", "encode_task_layer.", *_UNUSED)
    if unknown := [key for key in state if not key.startswith(known)]:
        raise ValueError(f"keys that mean nothing in a VQ-KD: {some(unknown)}")
    official = official_of(Weights(encoder, {}), heads=heads)
    config, channels = official.config, official.config["channels"]
    vectors = state[_VECTORS]
    lengths = vectors.norm(dim=1)
    if (lengths - 1).abs().max() > 1e-3:
        raise ValueError(
            f"{_VECTORS} has rows {lengths.min():.3g} to {lengths.max():.3g} long, where 1 is expected; its "
            "training had not begun"
        )
    tokenizer = VQKD(
        create_backbone(
            Architecture(**config["backbone"]), image_size=config["image_size"], channels=channels
        ),
        num_codes=vectors.shape[0],
        code_dim=vectors.shape[1],
        normalize=_vqkd_pixels(facts, channels),
        channels=channels,
    )
    state = {
        **{name: t for name, t in official.state.items() if name.startswith("backbone.")},
        **{f"norm.{leaf}": official.state[f"readout.norm.{leaf}"] for leaf in ("weight", "bias")},
        **{f"task_layer.{key}": t for key, t in task.items()},
        "codebook.vectors": vectors,
        "codebook.started": torch.tensor(True),
    }
    _load(tokenizer, state, kept=("normalize.", "codebook."))
    return tokenizer


def _vqkd_pixels(facts: Mapping[str, Any], channels: int) -> Normalize:
    """As the training script's `process_type` says, where the file has it; the published is "default"."""
    kind = facts.get("args", {}).get("process_type", "default")
    if kind == "default":
        return _from_minus_one(channels)
    if kind == "imagenet_norm" and channels == 3:
        return Normalize(*IMAGENET)
    raise ValueError(f"process_type {kind} of {channels} channels is unknown; use default")


def _dvae(state: Mapping[str, Tensor]) -> DiscreteVAE:
    num_codes, code_dim = shape_of(state, "codebook.weight")
    hidden, channels = shape_of(state, "encoder.0.0.weight")[:2]
    layers = _matches(state, r"encoder\.\d+\.0\.weight")
    tokenizer = DiscreteVAE(
        num_codes,
        code_dim=code_dim,
        hidden=hidden,
        layers=layers,
        blocks=_matches(state, r"encoder\.\d+\.net\.0\.weight") // layers,
        channels=channels,
        normalize=_from_minus_one(channels),
        interpolation="lanczos",
    )
    _load(tokenizer, state, kept=("normalize.",))
    return tokenizer


def _dalle(state: Mapping[str, Tensor]) -> DalleEncoder:
    hidden, channels = shape_of(state, "blocks.input.w")[:2]
    tokenizer = DalleEncoder(
        outputs_of(state, "blocks.output.conv.w"),
        hidden=hidden,
        blocks=_matches(state, r"blocks\.group_1\.block_\d+\.res_path\.conv_1\.w"),
        channels=channels,
    )
    _load(tokenizer, state)
    return tokenizer


def _matches(state: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in state)


def _from_minus_one(channels: int) -> Normalize:
    """Pixels in [-1,1]."""
    return Normalize((0.5,) * channels, (0.5,) * channels)


def _load(tokenizer: nn.Module, state: Mapping[str, Tensor], *, kept: tuple[str, ...] = ()) -> None:
    """Load a state; names that begin with one of `kept` may be missing.

    Raises:
        ValueError: if it is of another network.
    """
    own = tokenizer.state_dict()
    missing = [name for name in own if name not in state and not name.startswith(kept)]
    unknown = [name for name in state if name not in own]
    if missing or unknown:
        raise ValueError(
            f"{type(tokenizer).__name__} has not {some(unknown)}, and the file lacks {some(missing)}; "
            "it is another network"
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, where {list(own[name].shape)} is expected")
    tokenizer.load_state_dict({**own, **state})
