"""Configuration files: what is misspelt is found, what is written comes back, every value has an origin."""

import random
import re
import string
from pathlib import Path

import pytest

from mpm.config import FinetuneConfig, HeldOut, PretrainConfig
from mpm.config.yaml import parse
from mpm.configfile import ConfigError, dump, explain, load, same_run
from tests.test_configs import FILES, ROOT, model_of, name_of

MAE = ROOT / "vitb_mae.yaml"
KEY = re.compile(r"(?:(?<=^)|(?<=[{ ,]))([a-z_]+)(?=:(?: |$))", re.MULTILINE)


def keys_of(text: str) -> list[tuple[int, str]]:
    """Position and name of every key, comments left out."""
    body = text.index("\nseed:")
    return [(match.start(), match[0]) for match in KEY.finditer(text) if match.start() > body]


LIKE_OTHERS = (
    "vitl_",
    "vith_",
    "cait_",
    "vitb_18x2",
    "vitb_beit",
    "quickstart/",
    "tokenizers/",
    "finetune/",
)
UNLIKE_OTHERS = ("finetune/vitb_in1k", "finetune/cifar10.", "finetune/inat18")
SOME = [
    pytest.param(path, marks=pytest.mark.slow)
    if name_of(path).startswith(LIKE_OTHERS) and not name_of(path).startswith(UNLIKE_OTHERS)
    else path
    for path in FILES
]


@pytest.mark.parametrize("path", SOME, ids=lambda path: name_of(path))
def test_flipped_letter_in_any_key_is_found_and_the_key_named(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    lines = parse(text).lines
    assert len(keys_of(text)) == len(lines)
    draw = random.Random(name_of(path))
    file = tmp_path / "flipped.yaml"
    for (start, key), dotted in zip(keys_of(text), lines, strict=True):
        place = draw.randrange(len(key))
        letter = draw.choice([c for c in string.ascii_lowercase if c != key[place]])
        flipped = key[:place] + letter + key[place + 1 :]
        file.write_text(text[:start] + flipped + text[start + len(key) :])
        with pytest.raises(ConfigError) as caught:
            load(file, [], model_of(path))
        wrong = dotted[: len(dotted) - len(key)] + flipped
        line = text.count("\n", 0, start) + 1
        assert str(caught.value) == f"unknown key {wrong} in {file}:{line}; did you mean {dotted}?"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("optim.larning_rate=1", "did you mean optim.lr?"),
        ("optim.wd=1", "did you mean optim.weight_decay?"),
        ("lr=1", "did you mean optim.lr?"),
        ("batch_size=1", "did you mean optim.batch_size?"),
        ("optimizer.lr=1", "did you mean optim?"),
        ("mask.min_area=4", "kind random does not have it, only block"),
        ("mask.zzzzz=4", "the keys there are kind, ratio, count, unit"),
    ],
)
def test_unknown_override_names_the_nearest_key(word: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(MAE, [word], PretrainConfig)
    assert hint in str(caught.value)


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.e-4", ".1e-3", "1.0e-4", "0.0001"])
def test_numbers_with_an_exponent_need_no_point(number: str) -> None:
    assert load(MAE, [f"optim.lr={number}"], PretrainConfig).config.optim.lr == 1e-4


@pytest.mark.parametrize("text", ["e-4", "1e", "1e-4x", "vit-1e-4"])
def test_text_with_an_e_stays_text(text: str) -> None:
    assert parse(text).value == text


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["optim.steps=5"], "optim.epochs", None),
        (["optim.steps=5"], "optim.steps", 5),
        (["optim.steps=5", "optim.epochs=50"], "optim.steps", None),
        (["optim.warmup_steps=5"], "optim.warmup_epochs", 0.0),
        (["mask.count=75"], "mask.ratio", None),
        (["data.mean=[0.1, 0.2, 0.3]"], "data.mean", (0.1, 0.2, 0.3)),
        (["run.micro_batch=null"], "run.micro_batch", None),
        (["init.checkpoint=null"], "init", None),
        (["init.checkpoint=runs/a=b"], "init.checkpoint", "runs/a=b"),
        (["mask={kind: block, count: 75}"], "mask.count", 75),
        (["mask.kind=block"], "mask.ratio", 0.75),
        (["data.image_size=[224, 448]"], "data.image_size", (224, 448)),
        (["backbone.variant=vit_s"], "backbone.variant", "vit_s"),
        (["objective.predictor.kind=linear"], "objective.predictor.kind", "linear"),
        (["monitor.train.kind=synthetic", "monitor.test.kind=synthetic"], "monitor.train.count", 256),
    ],
)
def test_override_replaces_and_makes_room(words: list[str], key: str, value: object) -> None:
    found: object = load(MAE, words, PretrainConfig).config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_override_of_kind_does_not_hide_a_misspelt_key(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(MAE.read_text().replace("ratio:", "ratoi:"))
    with pytest.raises(ConfigError, match=r"mask\.ratoi"):
        load(file, ["mask.kind=block"], PretrainConfig)


@pytest.mark.parametrize(
    ("name", "word", "hint"),
    [
        ("tokenizers/debug", "mask.ratio=0.5", "a tokenizer has no mask, pretraining has; remove it"),
        ("tokenizers/debug", "monitor.k=3", "a tokenizer has no monitor.k, pretraining has; remove it"),
        ("debug", "objective.codes=8", "pretraining has no objective.codes, a tokenizer has; remove it"),
        (
            "finetune/debug",
            "data.root=x",
            "fine-tuning has no data.root, pretraining and a tokenizer have; did you mean data.train.root?",
        ),
    ],
)
def test_key_of_another_configuration_is_told(name: str, word: str, hint: str) -> None:
    file = ROOT / f"{name}.yaml"
    with pytest.raises(ConfigError) as caught:
        load(file, [word], model_of(file))
    assert str(caught.value).endswith(f" in override {word}; {hint}")


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("optim.lr", '"optim.lr" is no key=value'),
        ("=3", '"=3" is no key=value'),
        ("optim..lr=3", '"optim..lr=3" is no key=value'),
        ("seed.x=3", "override seed.x=3: seed is 0 and holds no keys"),
        ("optim.lr=[1", "the value of override optim.lr=[1 cannot be read"),
        ("run.output_dir=caf\udce9", "run.output_dir=caf\udce9 is not UTF-8; use another name, or a link"),
        ("optim.lr=fast", 'override optim.lr=fast: optim.lr is "fast", expected a number'),
    ],
)
def test_bad_override_is_one_line(word: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(MAE, [word], PretrainConfig)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "holds no keys"),
        (b"- 1\n", "holds no keys"),
        (b"seed: [1\n", "is no readable YAML"),
        (b"seed: 1\n# caf\xe9\n", ":2 is not UTF-8; save the file as UTF-8"),
        (b"seed: 1\nseed: 2\n", "line 2: seed is given twice; keep one"),
        (b"run: {keep: 1, keep: 2}\n", "line 1: run.keep is given twice; keep one"),
        (b"1: 2\n", "line 1: the key 1 is no name"),
        (b"run: &a {x: *a}\n", "an anchor contains itself"),
        (b"seed: !!python/name:os.system\n", "is no readable YAML"),
    ],
)
def test_unreadable_file_is_one_line(content: bytes, text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(file, [], PretrainConfig)
    assert str(file) in str(caught.value)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_file_that_cannot_be_opened_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load(tmp_path / name, [], PretrainConfig)


def test_several_mistakes_are_a_line_each() -> None:
    with pytest.raises(ConfigError) as caught:
        load(MAE, ["optim.lr=fast", "seed=-1"], PretrainConfig)
    assert len(str(caught.value).splitlines()) == 2


def test_anchors_and_merges_are_resolved() -> None:
    document = parse("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\nc: *a\n")
    assert document.value == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}
    assert document.lines["b.y"] == 4
    assert document.lines["b.x"] == 1


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_dumped_configuration_loads_again_to_an_equal_one(path: Path, tmp_path: Path) -> None:
    config = load(path, [], model_of(path)).config
    file = tmp_path / "dumped.yaml"
    file.write_text(dump(config))
    again = load(file, [], model_of(path)).config
    assert again == config
    assert same_run(again, config) == []
    if isinstance(config, FinetuneConfig):
        assert again.inherited == config.inherited


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_value_has_an_origin_and_the_line_is_right(path: Path) -> None:
    config, origins = load(path, [], model_of(path))
    lines = path.read_text().splitlines()
    assert {origin.partition(":")[0] for origin in origins.values()} <= {
        str(path),
        "default",
        "variant",
        "checkpoint",
    }
    for key, origin in origins.items():
        if origin.startswith(str(path)):
            assert f"{key.rpartition('.')[2]}:" in lines[int(origin.rpartition(":")[2]) - 1]
    assert len(explain(config, origins).splitlines()) == len(origins)


def test_explain_names_file_line_override_variant_and_default() -> None:
    config, origins = load(MAE, ["optim.lr=1e-3"], PretrainConfig)
    rows = {row.split()[0]: row for row in explain(config, origins).splitlines()}
    line = MAE.read_text().splitlines().index("  batch_size: 4096") + 1
    assert re.fullmatch(rf"optim\.batch_size +4096 +{MAE}:{line}", rows["optim.batch_size"])
    assert re.fullmatch(r"optim\.lr +0\.001 +override", rows["optim.lr"])
    assert re.fullmatch(r"backbone\.dim +768 +variant", rows["backbone.dim"])
    assert re.fullmatch(r"optim\.eps +1e-08 +default", rows["optim.eps"])


def test_explain_names_what_is_the_checkpoints() -> None:
    config, origins = load(ROOT / "finetune/vitb_in1k.yaml", [], FinetuneConfig)
    assert origins["backbone.stem.kind"] == "checkpoint"
    assert origins["data.mean"] == "checkpoint"
    assert re.search(r"data\.mean +- +checkpoint", explain(config, origins))


def test_same_run_compares_what_a_variant_stands_for() -> None:
    """A run goes on whether its configuration says null, as its file, or every value, as its checkpoint."""
    config = load(ROOT / "debug.yaml", [], PretrainConfig).config
    full = config.model_copy(update={"backbone": config.backbone.in_full(classifier=False)})
    assert same_run(config.model_copy(update={"backbone": full.backbone}), full) == []
    words = ["backbone.class_token=true", "backbone.qkv_bias=all", "backbone.drop_path=0.0"]
    spelled_out = load(ROOT / "debug.yaml", words, PretrainConfig).config
    assert same_run(config, spelled_out) == []
    other = load(ROOT / "debug.yaml", ["backbone.drop_path=0.1"], PretrainConfig).config
    assert same_run(config, other) == ["backbone.drop_path"]


def test_same_run_ignores_the_run_section_alone() -> None:
    a = load(MAE, [], PretrainConfig).config
    b = load(MAE, ["run.workers=1", "run.output_dir=elsewhere"], PretrainConfig).config
    c = load(MAE, ["optim.lr=1e-3", "mask={kind: block, count: 75}"], PretrainConfig).config
    assert same_run(a, b) == []
    assert same_run(a, c) == [
        "mask.kind",
        "mask.ratio",
        "mask.count",
        "mask.unit",
        "optim.lr",
        "mask.min_area",
    ]


def test_held_out_share_needs_no_kind() -> None:
    config = load(ROOT / "finetune/debug.yaml", [], FinetuneConfig).config
    assert config.data.val == HeldOut(fraction=0.25)


def test_home_folder_is_expanded() -> None:
    config = load(MAE, ["run.output_dir=~/runs"], PretrainConfig).config
    assert config.run.output_dir == Path.home() / "runs"
