"""Models of timm and their weights, by name."""

import argparse
import contextlib
import difflib
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mpm.interop.facts import check_facts
from mpm.interop.files import Weights, read_json
from mpm.interop.official import Official, official_of
from mpm.interop.timm_twins import check_timm_architecture, check_timm_arguments, check_timm_model

__all__ = ["OutOfReach", "create_timm", "load_timm"]

_WEIGHTS = (".safetensors", ".bin", ".pth", ".npz")
# unknown names, missing or broken files, no connection, a file that would run code
_NOT_HAD = (
    RuntimeError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    AssertionError,
    SafetensorError,
    pickle.UnpicklingError,
)


class OutOfReach(ValueError):
    """Weights are not on this disk, and the hub does not answer."""


def load_timm(name: str, *, image_size: tuple[int, int] | None = None) -> Official:
    """A pretrained model of timm, in mpm's form. No code of a file is run.

    Args:
        name: see `create_timm`. It may download.
        image_size: height and width in pixels, where positions are to be resampled.

    Raises:
        ValueError: if timm has no such weights, they cannot be had, or would run code, or mpm does not know
            the architecture.
    """
    model = create_timm(name, check=check_timm_architecture)
    check_timm_model(model, name)
    first = model.blocks[0]
    attention = first.attn if hasattr(first, "attn") else first.attns[0].attn  # of the first parallel branch
    facts = model.pretrained_cfg | {
        "input_size": (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    }
    weights = Weights(model.state_dict(), {"pretrained_cfg": facts})
    return official_of(weights, heads=attention.num_heads, image_size=image_size)


def create_timm(
    name: str,
    *,
    check: Callable[[Mapping[str, Any]], None] = check_timm_arguments,
    pretrained: bool = True,
    **arguments: Any,
) -> Any:
    """A model of timm, as timm makes it, with its published weights. No code of a file is run.

    `input_size` of its `pretrained_cfg` has the channels that it was made for; mean and std may be of others.

    Args:
        name: as `timm.create_model` takes it: `deit3_small_patch16_224.fb_in1k`, `hf-hub:owner/name` or
            `local-dir:FOLDER`. It may download.
        check: of the config.json of a folder or of the hub, which may be anyone's; raises ValueError.
        pretrained: false: with random weights.
        arguments: others of `timm.create_model`.

    Raises:
        OutOfReach: if they would have to be downloaded, and cannot be.
        ValueError: if timm has no such model or weights, they cannot be had, or would run code, or
            config.json asks for more than an architecture.
    """
    import timm

    try:
        if pretrained and "pretrained_cfg_overlay" not in arguments:  # which names a file of this disk
            _check_reach(name)
        facts = _facts(name)
        check(facts)
        with _plain_tensors_only():
            model: Any = timm.create_model(name, pretrained=pretrained, **arguments)
    except OutOfReach:
        raise
    except _NOT_HAD as error:
        reason = " ".join(str(error).split())
        if "weights_only" in reason:  # torch's words, which advise to run it
            reason = "their file would run code, and mpm reads plain tensors only"
        what = "weights for" if pretrained else "model"
        raise ValueError(f"timm gives no {what} {name}: {reason}{_near(name)}") from error
    if channels := (facts.get("model_args") or {}).get("in_chans"):
        published = model.pretrained_cfg
        published["input_size"] = (channels, *published["input_size"][1:])
    return model


def _check_reach(name: str) -> None:
    """Ask the hub once for what is not on this disk; its own download asks for most of a minute.

    Raises:
        OutOfReach: if it does not answer.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download
    from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, LocalEntryNotFoundError
    from timm.models import get_pretrained_cfg, parse_model_name

    source, place = parse_model_name(name)
    if not source:  # timm's own
        place = getattr(get_pretrained_cfg(place), "hf_hub_id", None) or ""
    if source == "local-dir" or not place:
        return
    repository, _, tag = place.partition("@")
    revision = tag or None
    with contextlib.suppress(LocalEntryNotFoundError):
        kept = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        if any(file.suffix in _WEIGHTS for file in kept.rglob("*")):
            return
    try:
        get_hf_file_metadata(hf_hub_url(repository, "config.json", revision=revision))
    except (HfHubHTTPError, FileMetadataError):
        return  # it answers, and timm says what
    except Exception as error:  # of the HTTP client, which is another one in each major version of the hub's
        reason = " ".join(str(error).split())
        raise OutOfReach(
            f"timm gives no weights for {name}: they are not on this disk, and the Hugging Face hub cannot "
            f"be reached ({reason}); connect once, and they stay here"
        ) from error


def _facts(name: str) -> Mapping[str, Any]:
    """The config.json of a folder or of the hub; of a model that timm knows, nothing.

    Raises:
        ValueError: if it says something else than mpm expects.
    """
    from timm.models import load_model_config_from_hf, parse_model_name

    source, place = parse_model_name(name)
    if source == "local-dir":
        facts = read_json(Path(place) / "config.json")
    elif source == "hf-hub":
        pretrained_cfg, architecture, model_args = load_model_config_from_hf(place)
        facts = {"architecture": architecture, "model_args": model_args, "pretrained_cfg": pretrained_cfg}
    else:
        return {}
    check_facts(facts)
    return {"pretrained_cfg": {}} | facts  # of old ones, the whole is it


def _near(name: str) -> str:
    """What may have been meant, where timm has no weights of that name."""
    import timm

    tagged = timm.list_models(pretrained=True)
    known = list(dict.fromkeys([*(model.partition(".")[0] for model in tagged), *tagged]))
    if ":" in name or name in known:
        return ""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(near)}?" if near else ""


@contextlib.contextmanager
def _plain_tensors_only() -> Iterator[None]:
    """`torch.load` unpickles no code, whatever its caller asks for; timm 1.0.22 asks for everything."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
