"""Which class of a network the classes of a data set are."""

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Matching", "are_numbers", "class_difference", "match_classes"]


class Matching(NamedTuple):
    """Classes of images and of a network.

    Attributes:
        number: the network's class for each class of the images.
        names: of the network's classes, as a person knows them.
        told: how they were matched; "" where they are the same.
    """

    number: tuple[int, ...]
    names: tuple[str, ...]
    told: str


def match_classes(images: Sequence[str], network: Sequence[str], *, is_foreign: bool) -> Matching:
    """Match by name; else by the numbers that folders are named with; else by order.

    ImageNet-V2 (Recht et al., arXiv:1902.10811) comes in folders "0" to "999", each the number of a class.
    Sorted as text they are 0, 1, 10, 100, 101, ..., so that their order says nothing.

    Args:
        images: names in the order of the images' labels.
        network: names in the order of its scores; 0, 1, 2, ... where it has none.
        is_foreign: others trained it and named its classes as they like: where no name is the same, the order
            is taken.

    Raises:
        ValueError: if they do not match.
    """
    images, network = tuple(images), tuple(network)
    if images == network:
        return Matching(tuple(range(len(network))), network, "")
    same_number = len(images) == len(network)
    if same_number and set(images) == set(network):
        told = "classes are matched by name; the order of the folders is another"
        if are_numbers(images):
            told = f"classes are matched by name, 0 to {len(images) - 1}, not by the order of the folders"
        return Matching(tuple(network.index(name) for name in images), network, told)
    if same_number and are_numbers(images):
        told = (
            f"the folders are the numbers 0 to {len(images) - 1}: each is taken for the class of that number"
        )
        return Matching(tuple(map(int, images)), network, told)
    if same_number and is_foreign and not set(images) & set(network):
        told = "classes are matched by number: the folders in the order of their names"
        return Matching(tuple(range(len(images))), images, told)
    raise ValueError(_difference(images, network))


def are_numbers(names: Sequence[str]) -> bool:
    """Whether the names are exactly the numbers from 0 on, in any order."""
    return set(names) == set(map(str, range(len(names))))


def class_difference(found: Sequence[str], known: Sequence[str], *, name: str, other: str) -> str:
    """How the classes of two sides differ, as the start of a complaint.

    Args:
        found: names of the one side, in its order.
        known: likewise of the other.
        name: what the one side is called, such as data.test.
        other: likewise.
    """
    sides = {
        f"unknown to {other}": sorted(set(found) - set(known)),
        "without images": sorted(set(known) - set(found)),
    }
    listed = [f"{_first(names)} {side}" for side, names in sides.items() if names]
    told = "; ".join(listed) or "of the same names, in another order"
    return f"{name} has {len(found)} classes, {other} {len(known)} ({told})"


def _first(names: Sequence[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{', '.join(names[:count])}{more}"


def _difference(found: tuple[str, ...], known: tuple[str, ...]) -> str:
    if known == tuple(map(str, range(len(known)))):
        return (
            f"data.test has {len(found)} classes, the network {len(known)} without names; "
            f"give {len(known)} folders, whose names are in the order of the classes"
        )
    difference = class_difference(found, known, name="data.test", other="the network")
    return f"{difference}; give a folder with exactly the network's classes"
