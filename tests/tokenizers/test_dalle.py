"""DALL-E's encoder against the published sizes, names and arithmetic."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mpm.tokenizers.base import Tokenizer
from mpm.tokenizers.dalle import DalleEncoder

GROUPS, BLOCKS = 4, 2
SMALL = {"num_codes": 64, "hidden": 8}


def published_shapes(codes: int, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, before: int, after: int, kernel: int) -> None:
        shapes[f"blocks.{name}.w"] = (after, before, kernel, kernel)
        shapes[f"blocks.{name}.b"] = (after,)

    add("input", 3, hidden, 7)
    before = hidden
    for group in range(1, GROUPS + 1):
        after = hidden * 2 ** (group - 1)
        for block in range(1, BLOCKS + 1):
            name = f"group_{group}.block_{block}"
            if before != after:
                add(f"{name}.id_path", before, after, 1)
            add(f"{name}.res_path.conv_1", before, after // 4, 3)
            add(f"{name}.res_path.conv_2", after // 4, after // 4, 3)
            add(f"{name}.res_path.conv_3", after // 4, after // 4, 3)
            add(f"{name}.res_path.conv_4", after // 4, after, 1)
            before = after
    add("output.conv", before, codes, 1)
    return shapes


def random_state(codes: int, hidden: int) -> dict[str, Tensor]:
    """Under the published names; scaled so that no part drowns in the others."""
    state = {}
    for name, shape in published_shapes(codes, hidden).items():
        fan_in = math.prod(shape[1:]) if name.endswith(".w") else 100
        gain = 8.0 if "res_path.conv_4" in name else 1.5
        state[name] = torch.randn(shape, dtype=torch.float64) * gain * fan_in**-0.5
    return state


def naive_logits(state: dict[str, Tensor], images: Tensor) -> Tensor:
    def convolved(name: str, x: Tensor) -> Tensor:
        weight = state[f"blocks.{name}.w"]
        return F.conv2d(x, weight, state[f"blocks.{name}.b"], padding=weight.shape[2] // 2)

    x = convolved("input", 0.8 * images + 0.1)
    for group in range(1, GROUPS + 1):
        for block in range(1, BLOCKS + 1):
            name = f"group_{group}.block_{block}"
            inner = x
            for number in range(1, 5):
                inner = convolved(f"{name}.res_path.conv_{number}", inner.relu())
            kept = convolved(f"{name}.id_path", x) if f"blocks.{name}.id_path.w" in state else x
            x = kept + inner / 64  # (groups * blocks)^2
        if group < GROUPS:
            x = F.max_pool2d(x, 2)
    return convolved("output.conv", x.relu())


def test_the_defaults_have_the_published_parameters_and_names() -> None:
    with torch.device("meta"):
        encoder = DalleEncoder()
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert shapes == published_shapes(8192, 256)
    assert sum(p.numel() for p in encoder.parameters()) == 53_786_240


def test_a_state_under_the_published_names_gives_the_published_arithmetic() -> None:
    encoder = DalleEncoder(**SMALL).double()
    state = random_state(64, 8)
    encoder.load_state_dict(state, strict=True)
    images = torch.rand(2, 3, 16, 24, dtype=torch.float64)
    expected = naive_logits(state, images)
    assert expected.shape == (2, 64, 2, 3)
    torch.testing.assert_close(encoder.logits(images), expected, rtol=1e-9, atol=1e-9)  # float64
    assert torch.equal(encoder.encode(images), expected.argmax(1).flatten(1))


def test_codes_of_an_image_do_not_depend_on_its_batch() -> None:
    encoder = DalleEncoder(**SMALL)
    encoder.load_state_dict(random_state(64, 8))
    images = torch.rand(4, 3, 16, 16)
    together = encoder.encode(images)
    assert together.dtype == torch.int64
    assert together.shape == (4, 4)
    assert len(together.unique()) > 2
    assert torch.equal(together, torch.cat([encoder.encode(image[None]) for image in images]))


def test_every_parameter_has_a_start_value() -> None:
    encoder = DalleEncoder(**SMALL)
    for parameter in encoder.parameters():
        parameter.data.fill_(torch.nan)
    for part in encoder.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in encoder.parameters())


def test_it_is_a_tokenizer_without_a_decoder() -> None:
    tokenizer: Tokenizer = DalleEncoder(**SMALL)
    assert tokenizer.vocab_size == 64
    assert tokenizer.stride == (8, 8)
    assert tokenizer.channels == 3
    assert tokenizer.interpolation == "lanczos"
    assert tokenizer.decode(torch.zeros(1, 4, dtype=torch.int64), (2, 2)) is None
