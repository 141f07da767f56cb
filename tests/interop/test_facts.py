"""What stands beside weights is of the right type, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mpm.interop import load_official
from mpm.interop.facts import check_facts, class_names, known_interpolation

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"pretrained_cfg": "x"}, "has pretrained_cfg 'x', where an object is expected"),
    ({"pretrained_cfg": {"mean": None}}, r"pretrained_cfg\.mean None, where a list of numbers"),
    ({"pretrained_cfg": {"mean": [0.5, "a"]}}, r"pretrained_cfg\.mean \[0\.5, 'a'\], where"),
    ({"pretrained_cfg": {"std": [0.5, 0]}}, r"pretrained_cfg\.std .* positive numbers"),
    ({"pretrained_cfg": {"input_size": [3, 16]}}, r"pretrained_cfg\.input_size .* three positive integers"),
    ({"model_args": [1]}, "model_args"),
    ({"model_args": {"num_heads": 0}}, r"model_args\.num_heads 0, where a positive integer"),
    ({"architecture": 3}, "architecture 3, where a string"),
    ({"label_names": 3}, "label_names 3, where a list of strings"),
    ({"label_names": [3]}, "label_names"),
    ({"id2label": ["ape"]}, r"id2label \['ape'\], where an object of strings"),
    ({"id2label": {"0": 1}}, "id2label"),
    ({"args": "x"}, "args"),
    ({"model_type": "vit", "hidden_size": "a"}, "hidden_size 'a', where a positive integer"),
    ({"model_type": "vit", "hidden_size": True}, "hidden_size True"),
    ({"model_type": "vit", "image_size": [224]}, "image_size .* a positive integer or two"),
    ({"model_type": "vit", "layer_norm_eps": float("nan")}, "layer_norm_eps nan, where a number"),
    ({"model_type": "vit", "qkv_bias": 1}, "qkv_bias 1, where true or false"),
    ({"preprocessor_config": {"size": {"height": "a"}}}, r"preprocessor_config\.size .* a size in pixels"),
]


@pytest.mark.parametrize(("facts", "message"), WRONG)
def test_a_badly_typed_fact_is_named_in_one_line(facts: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_file({"cls_token": torch.zeros(1, 1, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=message) as error:
        load_official(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_not_read_may_be_anything() -> None:
    check_facts({"label2id": 3, "id2label": None, "pretrained_cfg": {"url": 3, "label_names": None}})


@pytest.mark.parametrize(
    ("facts", "names"),
    [
        ({"id2label": {"0": "ape", "1": "bee"}}, ("ape", "bee")),
        ({"id2label": {0: "ape", 1: "bee"}}, ("ape", "bee")),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, ()),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label_names": ["ape", "bee"]}, ("ape", "bee")),
        ({"pretrained_cfg": {"label_names": ["ape", "bee"]}}, ("ape", "bee")),
        ({"label_names": ["ape"]}, ()),
        ({}, ()),
    ],
)
def test_classes_have_the_names_of_config_json_where_all_are_there(
    facts: dict[str, Any], names: tuple[str, ...]
) -> None:
    check_facts(facts)
    assert class_names(facts, 2) == names


def test_an_interpolation_that_mpm_has_not_becomes_bicubic_with_a_note() -> None:
    assert known_interpolation("bilinear") == ("bilinear", ())
    name, (note,) = known_interpolation("lanczos")
    assert name == "bicubic"
    assert "lanczos" in note
