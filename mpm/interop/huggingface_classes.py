"""The classes of transformers that mpm knows, and the names of their parameters.

Files have the classic names of version 4 (`vit.encoder.layer.0.attention.attention.query.weight`), which
every version reads. The modules of version 5 have others (`vit.layers.0.attention.q_proj.weight`).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

__all__ = ["KINDS", "Kind", "classic", "head_of", "kind_for", "kind_of", "names_of", "rename"]

_MODERN = (
    (r"^(\w+\.)?layers\.", r"\1encoder.layer."),
    (r"^(\w+\.)?shared_position_bias\.", r"\1encoder.relative_position_bias."),
    (r"(encoder\.layer\.\d+)\.relative_position_bias\.", r"\1.attention.attention.relative_position_bias."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),  # 5.x writes its decoder so
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_BLOCK = {
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "lambda_1": "ls1.gamma",
    "lambda_2": "ls2.gamma",
}
_TABLE = "relative_position_bias.relative_position_bias_table"


class Kind(NamedTuple):
    """A class of transformers.

    Attributes:
        name: of the class.
        model_type: in its config.json.
        trunk: what stands before the names of its trunk.
        norm: which norm comes after the trunk: theirs, ours.
        reader: names of all else after the trunk: theirs, ours.
    """

    name: str
    model_type: str
    trunk: str
    norm: tuple[str, str]
    reader: Mapping[str, str] = {}


_CLASSES = {"classifier": "heads.0"}
_TWICE = {"cls_classifier": "heads.0", "distillation_classifier": "heads.1"}
_DECODER = {
    "decoder.mask_token": "predictor.mask_token",
    "decoder.decoder_pos_embed": "predictor.positions.table",
    "decoder.decoder_embed": "predictor.embed",
    "decoder.decoder_norm": "predictor.decoder_norm",
    "decoder.decoder_pred": "predictor.head",
}


def _pixels(trunk: str) -> dict[str, str]:
    return {f"{trunk}embeddings.mask_token": "predictor.encoder_mask_token", "decoder.0": "predictor.head"}


_CODES = {"beit.embeddings.mask_token": "predictor.encoder_mask_token", "lm_head": "predictor.head"}
_READS, _PREDICTS = "readout.norm", "predictor.norm"
KINDS = {
    kind.name: kind
    for kind in (
        Kind("ViTModel", "vit", "", ("layernorm", _READS)),
        Kind("ViTForImageClassification", "vit", "vit.", ("vit.layernorm", _READS), _CLASSES),
        Kind("ViTForMaskedImageModeling", "vit", "vit.", ("vit.layernorm", _PREDICTS), _pixels("vit.")),
        Kind("DeiTModel", "deit", "", ("layernorm", _READS)),
        Kind("DeiTForImageClassification", "deit", "deit.", ("deit.layernorm", _READS), _CLASSES),
        Kind("DeiTForImageClassificationWithTeacher", "deit", "deit.", ("deit.layernorm", _READS), _TWICE),
        Kind("DeiTForMaskedImageModeling", "deit", "deit.", ("deit.layernorm", _PREDICTS), _pixels("deit.")),
        Kind("BeitModel", "beit", "", ("layernorm", _READS)),
        Kind("BeitForImageClassification", "beit", "beit.", ("beit.layernorm", _READS), _CLASSES),
        Kind("BeitForMaskedImageModeling", "beit", "beit.", ("layernorm", _PREDICTS), _CODES),
        Kind("ViTMAEModel", "vit_mae", "", ("layernorm", _PREDICTS)),
        Kind("ViTMAEForPreTraining", "vit_mae", "vit.", ("vit.layernorm", _PREDICTS), _DECODER),
    )
}


def classic(name: str) -> str:
    """A name as files have it, of either version's."""
    for pattern, replacement in _MODERN:
        name = re.sub(pattern, replacement, name)
    return name


def kind_of(model_type: str, names: Iterable[str]) -> Kind:
    """The class whose weights have these classic names: of which most is there beside the trunk."""
    modules = {part for name in names for part in (name, name.rpartition(".")[0])}
    of_type = [kind for kind in KINDS.values() if kind.model_type == model_type]
    return max(of_type, key=lambda kind: len(kind.reader.keys() & modules))  # the first: the trunk alone


def head_of(
    state: Mapping[str, Tensor], config: Mapping[str, Any], *, target: str | None = None
) -> Literal["decoder", "pixels", "codes"] | None:
    """Which of transformers' heads for masked modelling a predictor is; None: none of them, or there is none.

    Args:
        state: the network's weights.
        config: facts as `load_official` gives them.
        target: what is predicted: "pixels", "codes" or another; None: what the head's width says.
    """
    predictor, backbone = config["predictor"], config["backbone"]
    if predictor is None or "predictor.head.weight" not in state:
        return None
    is_plain = backbone["positions"]["bias"] == "none" and config["readout"] != {"kind": "mean"}  # no BEiT
    if target is None:
        pixels = backbone["patch_size"][0] * backbone["patch_size"][1] * config["channels"]
        fits = is_plain and len(state["predictor.head.weight"]) == pixels
        known = predictor["kind"] == "decoder" or config.get("family") == "simmim"
        target = "pixels" if fits or known else "codes"
    match predictor["kind"], target:
        case "decoder", "pixels":
            return "decoder"
        case "linear", "codes":
            return "codes"
        case "linear", "pixels" if is_plain:
            return "pixels"
    return None


def kind_for(state: Mapping[str, Tensor], config: Mapping[str, Any], *, head: str | None) -> Kind:
    """The class that expresses a network of mpm.

    Args:
        state: its weights.
        config: facts as `load_official` gives them.
        head: see `head_of`.

    Raises:
        ValueError: if there is none.
    """
    backbone, readout = config["backbone"], config["readout"]
    _refuse(backbone, readout)
    bias = backbone["positions"]["bias"]
    is_classifier = "heads.0.weight" in state
    mean = readout is not None and readout["kind"] == "mean"
    has_two_tokens = backbone["distillation_token"] or backbone["registers"]
    is_square = config["image_size"][0] == config["image_size"][1] and len(set(backbone["patch_size"])) == 1
    beit = bias != "none" or mean or head == "codes"
    mae = head == "decoder" or (config.get("family") == "transformers-vit_mae" and not is_classifier)
    if (beit or mae) and has_two_tokens:
        raise ValueError(
            "transformers' BEiT and ViTMAE have no second prefix token; use --to timm or safetensors"
        )
    if beit and head == "decoder":
        raise ValueError("transformers' ViTMAE has no relative position bias; use --to safetensors")
    if (beit or mae or head) and not is_square:
        name = "BEiT" if beit else "ViTMAE" if mae else "ViT for masked modelling"
        raise ValueError(
            f"transformers' {name} is right for square images and patches only, not {config['image_size']} "
            f"of {backbone['patch_size']}; use --to timm or safetensors"
        )
    if mae:
        return KINDS["ViTMAEForPreTraining" if head else "ViTMAEModel"]
    prefix = "Beit" if beit else "DeiT" if has_two_tokens else "ViT"
    if head:
        return KINDS[f"{prefix}ForMaskedImageModeling"]
    if not is_classifier:
        return KINDS[f"{prefix}Model"]
    return KINDS[f"{prefix}ForImageClassification" + "WithTeacher" * ("heads.1.weight" in state)]


def _refuse(backbone: Mapping[str, Any], readout: Mapping[str, Any] | None) -> None:
    """Complain of what no network of transformers has."""
    stem = backbone["stem"]
    plain = stem["kind"] == "linear" and all(
        stem.get(key, "none") == "none" for key in ("norm", "activation")
    )
    wrong = {
        f"parallel blocks (branches {backbone['branches']})": backbone["branches"] > 1,
        f"{backbone['attention']} attention": backbone["attention"] != "softmax",
        "class attention": readout is not None and readout["kind"] == "class_attention",
        f"stem {stem['kind']}"
        + (" with a norm or activation" if stem["kind"] == "linear" else ""): not plain,
        "a trunk without class token": not backbone["class_token"],
        "registers": backbone["registers"] > (not backbone["distillation_token"]),
    }
    for reason, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"transformers has no such network with {reason}; use --to safetensors or onnx")


def names_of(
    kind: Kind, *, depth: int, decoder_depth: int = 0, bias: str = "none", mean: bool = False
) -> dict[str, str]:
    """Modules and lone parameters of a network: theirs (classic), ours.

    Args:
        kind: of network.
        depth: blocks of the trunk.
        decoder_depth: blocks of the decoder.
        bias: relative position bias: "none", "shared" or "per_block".
        mean: BEiT's reader pools patches before its norm.
    """
    trunk = kind.trunk
    norm, our_norm = kind.norm
    if mean and our_norm == _READS:
        norm = f"{trunk}pooler.layernorm"
    names = {
        f"{trunk}embeddings.patch_embeddings.projection": "backbone.stem.proj",
        f"{trunk}embeddings.position_embeddings": "backbone.positions.table",
        norm: our_norm,
        **kind.reader,
    }
    if bias == "shared":
        names[f"{trunk}encoder.{_TABLE}"] = "backbone.relative_biases.0.bias_table"
    stacks = [(f"{trunk}encoder.layer", "backbone.blocks", depth)]
    for theirs, ours, count in (*stacks, ("decoder.decoder_layers", "predictor.blocks", decoder_depth)):
        for index in range(count):
            names |= {f"{theirs}.{index}.{part}": f"{ours}.{index}.{our}" for part, our in _BLOCK.items()}
            if bias == "per_block":
                table = f"{theirs}.{index}.attention.attention.{_TABLE}"
                names[table] = f"backbone.relative_biases.{index}.bias_table"
    return names


def rename(name: str, names: Mapping[str, str]) -> str | None:
    """The other name of a parameter, itself or its module in `names`; None: it is not there."""
    module, _, parameter = name.rpartition(".")
    if name in names:
        return names[name]
    return f"{names[module]}.{parameter}" if module in names else None
