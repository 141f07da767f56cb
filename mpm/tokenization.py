"""Tokenizers out of checkpoints and published files."""

import hashlib
from pathlib import Path
from typing import cast

import torch
from torch import nn

from mpm import build, checkpoint, configfile
from mpm.config import TokenizerConfig
from mpm.patchify.pixels import Normalize
from mpm.tokenizers.base import Tokenizer

__all__ = ["digest", "read_tokenizer"]


def read_tokenizer(source: str | Path) -> Tokenizer:
    """A frozen tokenizer, in eval mode.

    Args:
        source: a run of `pretrain.py --config configs/tokenizers/...`, a step in it, or a published file: the
            encoder of DALL-E as a state dict, a dVAE of DALLE-pytorch, BEiT v2's VQ-KD.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is broken, or no tokenizer.
    """
    path = Path(source).expanduser()
    if path.is_file():
        from mpm.interop.files import NotWeights
        from mpm.interop.tokenizers import load_tokenizer

        try:
            built = load_tokenizer(path)
        except NotWeights as error:
            raise ValueError(
                f"{error}, so it is no tokenizer; give a run of configs/tokenizers, or a file with the "
                "weights of DALL-E's encoder, a dVAE of DALLE-pytorch, or BEiT v2's VQ-KD"
            ) from error
    else:
        built = _of_run(path)
    frozen = cast(nn.Module, built).eval().requires_grad_(False)
    return cast(Tokenizer, frozen)


def digest(module: nn.Module) -> str:
    """SHA-256 of a module's state: what it was trained to be."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(name.encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _of_run(path: Path) -> nn.Module:
    try:
        saved = checkpoint.load(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} holds no tokenizer; train one: mpm pretrain --config configs/tokenizers/NAME.yaml "
            f"run.output_dir={path}"
        ) from None
    kind = saved.metadata["kind"]
    if kind != "tokenizer":
        raise ValueError(f"{path} is a run of kind {kind}, not a tokenizer; see configs/tokenizers")
    config = configfile.validate(saved.config, TokenizerConfig, name=str(saved.path))
    assert config.data.mean is not None and config.data.std is not None
    normalize = Normalize(*build.statistics(config.data.mean, config.data.std))
    built = build.tokenizer(config, normalize)
    prefix = "tokenizer."
    state = {name[len(prefix) :]: t for name, t in saved.model.items() if name.startswith(prefix)}
    built.load_state_dict(state)
    return built
