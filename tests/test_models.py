"""`mpm models` against the published integers, counted on the official classes of each paper's code."""

import json

import pytest

from mpm import cli
from mpm.commands.models import rows, table

# (pattern, words, network): parameters by resolution, 1000 classes
DEIT = {
    "deit_ti": {224: 5_717_416},
    "deit_s": {224: 22_050_664},
    "deit_b": {224: 86_567_656, 384: 86_859_496},
    "deit_ti_distilled": {224: 5_910_800},
    "deit_s_distilled": {224: 22_436_432},
    "deit_b_distilled": {224: 87_338_192, 384: 87_630_032},
}
CAIT = {
    "cait_xxs24": {224: 11_956_264, 384: 12_029_224, 448: 12_069_160},
    "cait_xxs36": {224: 17_299_720, 384: 17_372_680, 448: 17_412_616},
    "cait_xs24": {224: 26_560_648, 384: 26_670_088, 448: 26_729_992},
    "cait_xs36": {224: 38_557_432, 384: 38_666_872, 448: 38_726_776},
    "cait_s24": {224: 46_916_200, 384: 47_062_120, 448: 47_141_992},
    "cait_s36": {224: 68_220_712, 384: 68_366_632, 448: 68_446_504},
    "cait_s48": {224: 89_525_224, 384: 89_671_144, 448: 89_751_016},
    "cait_m24": {224: 185_850_088, 384: 186_141_928, 448: 186_301_672},
    "cait_m36": {224: 270_929_512, 384: 271_221_352, 448: 271_381_096},
    "cait_m48": {224: 356_008_936, 384: 356_300_776, 448: 356_460_520},
}
# without and with LayerScale
BLOCKS = {
    ("ti", 12, (1, 2, 3, 4)): (5_717_224, 5_721_832),
    ("ti", 24, (1, 2)): (11_055_592, 11_064_808),
    ("s", 12, (1,)): (22_050_280, 22_059_496),
    ("s", 24, (1, 2)): (43_343_848, 43_362_280),
    ("s", 36, (1, 2, 3, 4)): (64_637_416, 64_665_064),
    ("s", 48, (1, 2)): (85_930_984, 85_967_848),
    ("s", 60, (1, 2, 3, 4)): (107_224_552, 107_270_632),
    ("b", 12, (1,)): (86_566_888, 86_585_320),
    ("b", 13, (1,)): (93_654_760, 93_674_728),
    ("b", 24, (1, 2)): (171_621_352, 171_658_216),
    ("b", 36, (1, 2, 3, 4)): (256_675_816, 256_731_112),
    ("l", 24, (1, 2)): (304_325_608, 304_374_760),
}
HMLP = {
    ("vit_ti_12x1", 224): 5_618_824,
    ("vit_s_12x1", 224): 21_945_640,
    ("vit_b_12x1", 224): 86_726_248,
    ("vit_b_12x1", 384): 87_018_088,
    ("vit_l_24x1", 224): 304_865_768,
}
MASKED = {
    ("beit_b", "classifier", 224): 86_530_984,
    ("beit_b", "classifier", 384): 86_744_104,
    ("beit_l", "classifier", 224): 304_430_568,
    ("beit_l", "classifier", 384): 304_998_888,
    ("beit_l", "classifier", 512): 305_674_728,
    ("beit_b", "pretraining", 224): 91_965_776,
    ("beit_l", "pretraining", 224): 311_534_016,
    ("beitv2_b", "pretraining", 224): 106_143_056,  # with the two blocks of class pretraining
    ("beitv2_l", "pretraining", 224): 336_728_512,
    ("mae_b", "encoder", 224): 85_798_656,
    ("mae_l", "encoder", 224): 303_301_632,
    ("mae_h", "encoder", 224): 630_764_800,
    ("mae_b", "pretraining", 224): 111_907_840,
    ("mae_l", "pretraining", 224): 329_541_888,
    ("mae_h", "pretraining", 224): 657_074_508,
    ("simmim_b", "encoder", 224): 85_666_128,
    ("simmim_b", "pretraining", 224): 86_256_720,
}


SMALL = 13  # blocks and more take their time to build; those are slow tests


def by_depth(name: str, blocks: int, *values) -> object:
    return pytest.param(name, *values, marks=[pytest.mark.slow] * (blocks > SMALL))


@pytest.mark.parametrize("name", [*DEIT, *(by_depth(name, int(name[-2:])) for name in CAIT)])
def test_parameters_of_deit_and_cait(name: str) -> None:
    found = {row.image_size: row.parameters for row in rows(name)}
    expected = (DEIT | CAIT)[name]
    assert {size: found[size] for size in expected} == expected


@pytest.mark.parametrize(
    ("size", "blocks", "branches"),
    [by_depth(size, blocks, blocks, P) for size, blocks, branches in BLOCKS for P in branches],
)
def test_parameters_of_stages_by_branches_are_those_of_the_sequence(
    size: str, blocks: int, branches: int
) -> None:
    name = f"vit_{size}_{blocks // branches}x{branches}"
    (expected,) = (value for key, value in BLOCKS.items() if key[:2] == (size, blocks))
    found = [next(rows(name, words)).parameters for words in ([], ["layer_scale=1e-4"])]
    assert found == list(expected)


@pytest.mark.parametrize(("name", "image_size"), HMLP)
def test_parameters_with_the_hmlp_stem(name: str, image_size: int) -> None:
    found = {row.image_size: row.parameters for row in rows(name, ["stem.kind=hmlp"])}
    assert found[image_size] == HMLP[name, image_size]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({key[0] for key in MASKED}))
def test_parameters_of_masked_models(name: str) -> None:
    found = {(row.name, row.network, row.image_size): row.parameters for row in rows(name)}
    expected = {key: value for key, value in MASKED.items() if key[0] == name}
    assert {key: found[key] for key in expected} == expected


def test_gmacs_of_pretraining_are_the_published_networks() -> None:
    """Encoder of the visible quarter and decoder (MAE); all tokens and the head on 75 of them (BEiT).

    BEiT v2: 2 blocks more than 12, and the head once more.
    """
    found = {row.name: row.gmacs for row in rows("*_b") if row.network == "pretraining"}
    assert found["mae_b"] == pytest.approx(4.41 + 5.37, rel=0.005)
    assert found["beit_b"] == pytest.approx(17.56 + 0.47, rel=0.005)
    assert found["beitv2_b"] == pytest.approx(17.56 * 14 / 12 + 2 * 0.47, rel=0.005)


def test_table_is_aligned_and_json_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    listed = list(rows("deit_ti*"))
    lines = table(listed).splitlines()
    assert lines[0].split() == ["name", "network", "px", "patch", "parameters", "GMACs", "paper"]
    assert "deit_ti_distilled  classifier  224     16   5,910,800   1.26  DeiT" in lines
    assert cli.main(["models", "deit_ti*", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [row._asdict() for row in listed]


def test_patterns_and_parts_of_names_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "deit_ti", "mae_b", "distilled"]) == 0
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]}
    assert names == {"deit_ti", "mae_b", "deit_ti_distilled", "deit_s_distilled", "deit_b_distilled"}


def test_words_alone_change_all_of_a_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "deit_ti", "layer_scale=1e-4", "depth=1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "layout", "more"),
    [
        (["layer_scale=1e-4"], "timm", 2 * 12 * 192),
        (["registers=4"], "timm", 4 * 192 - 192),  # timm then has no class slot, either
        (["attention=talking_heads"], "mpm", 12 * 2 * (3 * 3 + 3) - 192),  # and no class slot
    ],
    ids=str,
)
def test_what_the_family_does_not_have_is_counted_elsewhere(words, layout, more) -> None:
    row = next(rows("deit_ti", words))
    assert (row.layout, row.parameters) == (layout, 5_717_416 + more)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resnet50"], 'variant "resnet50" is unknown'),
        (
            ["deit_b", "layerscale=1"],
            "unknown key layerscale in override layerscale=1; did you mean layer_scale?",
        ),
        (["deit_b", "dim=100"], "dim 100 is not a multiple of heads 12; use 96 or 108"),
    ],
    ids=str,
)
def test_a_mistake_is_told_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["models", *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
