import pytest

from mpm.evaluation.classes import class_difference, match_classes

NUMBERED = tuple(map(str, range(12)))
AS_TEXT = tuple(sorted(NUMBERED))  # 0, 1, 10, 11, 2, ...: how folders are listed
WORDS = tuple("abcdefghijkl")


def test_same_names_in_the_same_order_need_no_word() -> None:
    assert match_classes(WORDS, WORDS, is_foreign=False) == (tuple(range(12)), WORDS, "")
    assert match_classes(AS_TEXT, AS_TEXT, is_foreign=False).told == ""


@pytest.mark.parametrize(
    ("network", "is_foreign"), [(WORDS, False), (WORDS, True), (NUMBERED, True), (NUMBERED, False)]
)
def test_folders_that_are_numbers_are_the_classes_of_these_numbers(network, is_foreign) -> None:
    """ImageNet-V2; against a loop over the folders as they are listed."""
    found = match_classes(AS_TEXT, network, is_foreign=is_foreign)
    for label, folder in enumerate(AS_TEXT):
        assert found.number[label] == int(folder)
    assert found.number != tuple(range(12))
    assert found.names == network
    assert "0 to 11" in found.told


def test_a_network_trained_on_numbered_folders_knows_them_by_name() -> None:
    """Its own class 2 is called 10."""
    found = match_classes(NUMBERED, AS_TEXT, is_foreign=False)
    assert [AS_TEXT[number] for number in found.number] == list(NUMBERED)
    assert "by name" in found.told


def test_any_order_of_the_same_names_is_matched_by_name() -> None:
    found = match_classes(WORDS[::-1], WORDS, is_foreign=False)
    assert found.number == tuple(range(12))[::-1]


def test_foreign_names_are_matched_in_order_unless_some_are_the_same() -> None:
    others = tuple(f"n{name}" for name in WORDS)
    found = match_classes(others, WORDS, is_foreign=True)
    assert (found.number, found.names) == (tuple(range(12)), others)
    with pytest.raises(
        ValueError, match="nb, nc, nd and 8 more unknown to the network; b, c, d and 8 more without"
    ):
        match_classes(("a", *others[1:]), WORDS, is_foreign=True)
    with pytest.raises(ValueError, match="exactly the network's classes"):
        match_classes(others, WORDS, is_foreign=False)


def test_a_missing_number_is_no_numbering() -> None:
    with pytest.raises(ValueError, match="the network 12 without names"):
        match_classes((*NUMBERED[:-1], "12"), NUMBERED, is_foreign=True)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ("abz", "3 classes, data.train 3 (z unknown to data.train; c without images)"),
        ("ab", "2 classes, data.train 3 (c without images)"),
        ("abcdefgh", "8 classes, data.train 3 (d, e, f and 2 more unknown to data.train)"),
        ("acb", "3 classes, data.train 3 (of the same names, in another order)"),
    ],
)
def test_the_first_classes_that_differ_are_named(found: str, told: str) -> None:
    assert class_difference(found, "abc", name="data.val", other="data.train") == f"data.val has {told}"
