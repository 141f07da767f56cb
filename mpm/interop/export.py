"""Networks for other programs, each measured against the one it came from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mpm.interop.folders import write_timm, write_transformers
from mpm.interop.inference import Inference, Subject, Written, inference_of
from mpm.interop.model_card import card
from mpm.interop.programs import write_onnx, write_program

__all__ = ["FORMATS", "Exported", "export", "load_network"]

Writer = Callable[[Inference, Subject, Path], Written]
_IMAGES = 3  # of the measurement
_LIMIT = 1e-3  # of the difference, by the largest output: more is no rounding


class Exported(NamedTuple):
    """What was written.

    Attributes:
        path: file or folder.
        card: the text beside it.
        difference: largest of its outputs' from mpm's, on a fixed random batch in float32.
        relative: the same by the largest output.
    """

    path: Path
    card: Path
    difference: float
    relative: float


def export(subject: Subject, output: str | Path, *, to: str) -> Exported:
    """Write a network for another program, load it again, compare, and write a model card.

    It is never masked. A network without classes gives features.

    Args:
        subject: the network.
        output: a folder, new or empty, for timm and transformers; else a file, which is replaced.
        to: one of `FORMATS`.

    Raises:
        ValueError: if the format has no such network, a package is missing, or what was loaded again differs.
        FileExistsError: if the folder is not empty.
        FileNotFoundError: if the folder above does not exist.
    """
    output = Path(output).expanduser()
    write, suffix = FORMATS[to]
    if suffix and output.suffix != suffix:
        raise ValueError(
            f"--to {to} writes a file that ends in {suffix}, not {output.name}; use {output.stem}{suffix}"
        )
    if not suffix and output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; choose another folder")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"folder {output.parent} does not exist; make it first")
    network = inference_of(subject)
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        written = write(network, subject, partial / output.name if suffix else partial)
        difference, relative = _compare(network, written, subject)
        if not relative <= _LIMIT:
            raise ValueError(
                f"what --to {to} wrote differs by {relative:.1e} of the largest output from this network; "
                "please report it"
            )
        name = f"{output.name}.md" if suffix else "README.md"
        text = card(
            subject, network, written, name=output.name, to=to, difference=difference, relative=relative
        )
        (partial / name).write_text(text, encoding="utf-8")
        for file in partial.iterdir():  # safetensors writes for its owner alone
            shutil.copymode(partial / name, file)
        if suffix:
            for file in partial.iterdir():  # weights beyond 2 GiB lie beside an ONNX file
                file.replace(output.parent / file.name)
        else:
            if output.exists():
                output.rmdir()
            partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(output, (output.parent if suffix else output) / name, difference, relative)


@torch.no_grad()
def _compare(network: Inference, written: Written, subject: Subject) -> tuple[float, float]:
    """The largest difference of outputs on fixed random images, and the same by the largest output."""
    shape = (_IMAGES, subject.config["channels"], *subject.config["image_size"])
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    expected = network(images)
    difference = (written.run(images) - expected).abs().max()
    return float(difference), float(difference / expected.abs().max())


def _write_safetensors(network: Inference, subject: Subject, path: Path) -> Written:
    """Weights under mpm's names; in the metadata, everything that `load_network` needs."""
    parts = (
        ("backbone.", "readout.", "heads.")
        if subject.is_classifier
        else ("backbone.", "readout.", "predictor.norm.")
    )
    state = {name: tensor.contiguous() for name, tensor in subject.state.items() if name.startswith(parts)}
    facts = {"config": subject.config, "classes": list(subject.classes), "source": subject.source}
    save_file(state, path, metadata={"format": "pt", "mpm": json.dumps(facts, default=dict)})
    loading = f"""\
from mpm.interop.export import load_network
network = load_network("{path.name}")
{subject.output} = network(images)  # in [0,1]; the network normalises them"""
    return Written(load_network(path), loading)


def load_network(path: str | Path) -> Inference:
    """The network of a file of `mpm export --to safetensors`.

    Raises:
        ValueError: if it is another kind of file.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if "mpm" not in metadata:
        raise ValueError(f"{path} was not written by mpm export --to safetensors; use mpm import")
    facts = json.loads(metadata["mpm"])
    config = facts["config"]
    config["image_size"] = tuple(config["image_size"])
    config["backbone"]["patch_size"] = tuple(config["backbone"]["patch_size"])
    return inference_of(Subject(config, load_file(path), facts["classes"], facts["source"]))


# how a network is written, and the end of the file's name; "": it is a folder
FORMATS: dict[str, tuple[Writer, str]] = {
    "timm": (write_timm, ""),
    "safetensors": (_write_safetensors, ".safetensors"),
    "onnx": (write_onnx, ".onnx"),
    "torch-export": (write_program, ".pt2"),
    "transformers": (write_transformers, ""),
}
