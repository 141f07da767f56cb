"""A network as a folder that timm or transformers loads."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mpm.interop.folding import fold_stem_norm
from mpm.interop.huggingface import to_transformers
from mpm.interop.huggingface_classes import KINDS
from mpm.interop.inference import Inference, Subject, Written
from mpm.interop.layouts import layout_for
from mpm.interop.official import to_official

__all__ = ["write_timm", "write_transformers"]

_WEIGHTS = "model.safetensors"
_CAIT_SIZES = {192: "xxs", 288: "xs", 384: "s", 768: "m"}
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}


def write_timm(network: Inference, subject: Subject, folder: Path) -> Written:
    """A folder in the format of timm on the Hugging Face hub, for `timm.create_model("local-dir:FOLDER")`.

    Raises:
        ValueError: if timm has no such network.
    """
    import timm

    subject, notes = _folded(subject)
    config, state = _as_timm_reads(subject)
    layout = layout_for("timm", config)
    save_file(
        {name: tensor.contiguous() for name, tensor in to_official(state, config, layout="timm").items()},
        folder / _WEIGHTS,
        metadata={"format": "pt"},
    )
    arguments = _arguments(config, layout)
    facts: dict[str, Any] = {
        "architecture": _architecture(config, layout, timm.is_model),
        "num_classes": config["num_classes"] or 0,
        "num_features": config["backbone"]["dim"],
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [config["channels"], *config["image_size"]],
            "fixed_input_size": True,
            "crop_pct": config["crop"],
            "crop_mode": "center",
            "interpolation": config["interpolation"],
            "mean": list(config["mean"]),
            "std": list(config["std"]),
            "num_classes": config["num_classes"] or 0,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if layout == "timm distilled" else "head",
            "custom_load": False,
        },
    }
    if subject.classes:
        facts["label_names"] = list(subject.classes)
    _write_json(folder / "config.json", facts)
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def run(images: Tensor) -> Tensor:
        images = network.normalize(images)
        if subject.is_classifier:
            return model(images)
        return model.forward_features(images)[:, network.backbone.num_prefix :].mean(1)

    answer = "model(batch)"
    if not subject.is_classifier:
        answer = f"model.forward_features(batch)[:, {network.backbone.num_prefix}:].mean(1)"
    loading = f"""\
import timm
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
batch = transform(image).unsqueeze(0)
{subject.output} = {answer}"""
    return Written(run, loading, notes)


def _folded(subject: Subject) -> tuple[Subject, tuple[str, ...]]:
    """Without the batch norm of a linear stem, and what a reader should know of it."""
    state, config, notes = fold_stem_norm(subject.state, subject.config)
    return subject._replace(state=state, config=config), notes


def _as_timm_reads(subject: Subject) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and weights of the classifier, or of the trunk and its norm."""
    config = dict(subject.config)
    parts = ("backbone.", "readout.", "heads.") if subject.is_classifier else ("backbone.", "readout.norm.")
    state = {name: tensor for name, tensor in subject.state.items() if name.startswith(parts)}
    if not subject.is_classifier:
        is_mean = config["readout"] == {"kind": "mean"}
        config |= {
            "readout": {"kind": "mean" if is_mean else "token"},
            "num_classes": None,
            "predictor": None,
        }
        norms = {f"readout.norm.{leaf}": f"predictor.norm.{leaf}" for leaf in ("weight", "bias")}
        state |= {ours: subject.state[name] for ours, name in norms.items() if name in subject.state}
    return config, state


def _architecture(config: Mapping[str, Any], layout: str, is_known: Callable[[str], bool]) -> str:
    """A model of timm of the right class, of the same size where there is one; arguments state the sizes."""
    trunk, side = config["backbone"], config["image_size"][0]
    dim, depth, patch = trunk["dim"], trunk["depth"], trunk["patch_size"][0]
    if trunk["branches"] > 1:
        return "vit_small_patch16_18x2_224"  # the only one of parallel blocks
    if layout == "timm Cait":
        named = f"cait_{_CAIT_SIZES.get(dim)}{depth}_"
        return next(filter(is_known, (f"{named}{side}", f"{named}384")), "cait_s24_224")
    kind = {"timm distilled": "deit_{}_distilled", "timm Beit": "beit_{}"}.get(layout, "vit_{}")
    named = kind.format(_SIZES.get(dim, "base"))
    names = (f"{named}_patch{patch}_{side}", f"{named}_patch16_224")
    return next(filter(is_known, names), f"{kind.format('base')}_patch16_224")


def _arguments(config: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """Arguments of timm's class.

    Raises:
        ValueError: if it has none for what the network is.
    """
    trunk, readout = config["backbone"], config["readout"]
    if trunk["branches"] > 2 or (trunk["branches"] == 2 and layout == "timm distilled"):
        wanted = "a distillation token" if trunk["branches"] == 2 else f"{trunk['branches']} branches"
        raise ValueError(
            f"timm's networks of parallel blocks have 2 branches and one head, so {wanted} has no place; "
            "use --to onnx, torch-export or safetensors"
        )
    arguments = {
        "img_size": list(config["image_size"]),
        "patch_size": list(trunk["patch_size"]),
        "in_chans": config["channels"],
        "embed_dim": trunk["dim"],
        "depth": trunk["depth"],
        "num_heads": trunk["heads"],
        "mlp_ratio": trunk["mlp_ratio"],
        "qkv_bias": trunk["qkv_bias"] != "none",
        "init_values": trunk["layer_scale"] or 0.0,
        "global_pool": "token" if readout["kind"] != "mean" else "avg",
    }
    match layout:
        case "timm Cait":
            depth = readout["depth"]
            return arguments | {"depth_token_only": depth, "mlp_ratio_token_only": readout["mlp_ratio"]}
        case "timm Beit":
            bias = trunk["positions"]["bias"]
            return arguments | {
                "use_abs_pos_emb": trunk["positions"]["table"] != "none",
                "use_rel_pos_bias": bias == "per_block",
                "use_shared_rel_pos_bias": bias == "shared",
            }
        case "timm distilled":
            return arguments
    arguments |= {
        "class_token": trunk["class_token"],
        "reg_tokens": trunk["registers"],
        "no_embed_class": layout == "timm without slots",
        "pos_embed": "none" if trunk["positions"]["table"] == "none" else "learn",
    }
    if trunk["stem"].get("norm", "none") == "layer":
        arguments["embed_norm_layer"] = "layernorm"
    if not config["num_classes"] and readout["kind"] == "token":
        arguments |= {"global_pool": "avg", "fc_norm": False}  # as `mpm features`: the norm, then the mean
    return arguments


def write_transformers(network: Inference, subject: Subject, folder: Path) -> Written:
    """A folder for transformers' `from_pretrained`, of a classifier or of what was pretrained.

    Raises:
        ValueError: if transformers has no such network, or is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"--to transformers needs {error.name}: pip install 'masked-patch-modeling[export]'"
        ) from None
    subject, notes = _folded(subject)
    files = to_transformers(
        subject.state,
        subject.config,
        classes=subject.classes,
        settings=subject.training,
        target=subject.target,
    )
    save_file(files.state, folder / _WEIGHTS, metadata={"format": "pt"})
    _write_json(folder / "config.json", files.config)
    _write_json(folder / "preprocessor_config.json", files.preprocessor)
    (name,) = files.config["architectures"]
    kind, prefix = KINDS[name], network.backbone.num_prefix
    arguments: dict[str, Any] = {}
    if kind.model_type == "vit_mae":
        arguments["mask_ratio"] = 0.0  # else it hides patches whenever it is called
    elif not kind.trunk:
        arguments["add_pooling_layer"] = False
    with _quiet(transformers):
        model = getattr(transformers, name).from_pretrained(folder, **arguments).eval()
    norm_is_apart = kind.trunk and kind.norm[0] == "layernorm"

    def run(images: Tensor) -> Tensor:
        images = network.normalize(images)
        if subject.is_classifier:
            return model(images).logits
        tokens = model.get_submodule(kind.trunk.rstrip("."))(images).last_hidden_state
        return (model.layernorm(tokens) if norm_is_apart else tokens)[:, prefix:].mean(1)

    answer = f"model{'.' * bool(kind.trunk)}{kind.trunk.rstrip('.')}(**inputs).last_hidden_state"
    if norm_is_apart:
        answer = f"model.layernorm({answer})"
    answer = "model(**inputs).logits" if subject.is_classifier else f"{answer}[:, {prefix}:].mean(1)"
    options = "".join(f", {key}={value}" for key, value in arguments.items())
    loading = f"""\
from transformers import AutoImageProcessor, {name}
processor = AutoImageProcessor.from_pretrained("FOLDER")
model = {name}.from_pretrained("FOLDER"{options}).eval()
inputs = processor(image, return_tensors="pt")
{subject.output} = {answer}"""
    return Written(run, loading, (*notes, *files.notes))


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' progress bar and hints."""
    logging = transformers.utils.logging
    level, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bar:
            logging.enable_progress_bar()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
