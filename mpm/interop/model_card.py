"""The text beside an exported network: what it is, what it eats, how to load it, how exact it is."""

from collections.abc import Mapping
from typing import Any

from mpm.interop.inference import Inference, Subject, Written

__all__ = ["card"]

_LISTED = 50  # classes; of more, only the number is told


def card(
    subject: Subject,
    network: Inference,
    written: Written,
    *,
    name: str,
    to: str,
    difference: float,
    relative: float,
) -> str:
    """A model card in Markdown.

    Args:
        subject: what was exported.
        network: as mpm runs it.
        written: what the format made of it.
        name: of the file or folder.
        to: the format.
        difference: largest of the outputs of what was written, loaded again, from the network's.
        relative: the same by the largest output.
    """
    config = subject.config
    height, width = config["image_size"]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    facts = {
        "architecture": _architecture(config["backbone"])
        + _reader(config, is_classifier=subject.is_classifier),
        "parameters": f"{parameters:,}",
        "from": subject.source,
        "images": f"{config['channels']} x {height} x {width}, never masked",
        "preprocessing": _preprocessing(config),
        "output": _output(subject),
        "parity": f"loaded again, it differs by at most {difference:.1g} ({relative:.1g} of the largest "
        "output) from the network that was exported: measured on random images, in float32 on the CPU",
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    notes = "".join(f"{note}\n\n" for note in written.notes)
    classes = ""
    if 0 < len(subject.classes) <= _LISTED:
        classes = (
            "\n## Classes\n\n" + "\n".join(f"{i}. {name}" for i, name in enumerate(subject.classes)) + "\n"
        )
    return f"""\
{_front_matter(to, is_classifier=subject.is_classifier)}# {name}

| | |
|---|---|
{rows}

{notes}## Load it

```python
{written.loading.replace("FOLDER", name)}
```
{classes}"""


def _front_matter(to: str, *, is_classifier: bool) -> str:
    """What the Hugging Face hub reads."""
    if to not in ("timm", "transformers"):
        return ""
    task = "image-classification" if is_classifier else "image-feature-extraction"
    return f"---\nlibrary_name: {to}\npipeline_tag: {task}\n---\n\n"


def _architecture(trunk: Mapping[str, Any]) -> str:
    rows, columns = trunk["patch_size"]
    parts = [
        f"vision transformer, {trunk['depth']} blocks"
        + f" of {trunk['branches']} branches" * (trunk["branches"] > 1),
        f"width {trunk['dim']}",
        f"{trunk['heads']} heads",
        f"patches of {rows}x{columns}, {trunk['stem']['kind']} stem",
        f"positions: {_positions(trunk['positions'])}",
    ]
    if trunk["attention"] != "softmax":
        parts.append("talking heads")
    if trunk["layer_scale"] is not None:
        parts.append("LayerScale")
    tokens = [
        "class token" * bool(trunk["class_token"]),
        "distillation token" * bool(trunk["distillation_token"]),
        f"{trunk['registers']} registers" * bool(trunk["registers"]),
    ]
    return ", ".join([*parts, *filter(None, tokens)])


def _positions(positions: Mapping[str, str]) -> str:
    table = positions["table"] + " table"
    bias = positions["bias"].replace("_", " ") + " relative bias"
    parts = [text for key, text in (("table", table), ("bias", bias)) if positions[key] != "none"]
    return " and ".join(parts) or "none"


def _reader(config: Mapping[str, Any], *, is_classifier: bool) -> str:
    return f"; reads: {config['readout']['kind'].replace('_', ' ')}" if is_classifier else ""


def _preprocessing(config: Mapping[str, Any]) -> str:
    height, width = config["image_size"]
    mean, std = (", ".join(f"{value:g}" for value in config[key]) for key in ("mean", "std"))
    return (
        f"resize to cover {round(height / config['crop'])} x {round(width / config['crop'])} "
        f"({config['interpolation']}), crop the centre; mean {mean} and std {std} of pixels in [0,1]"
    )


def _output(subject: Subject) -> str:
    if subject.is_classifier:
        return f"logits of {subject.config['num_classes']} classes"
    return f"features of width {subject.config['backbone']['dim']}: the mean of the normalised patch tokens"
