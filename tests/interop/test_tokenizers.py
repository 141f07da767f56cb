"""Published tokenizers: files with their keys and shapes give the codes of code written out here."""

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.beit import Beit
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.interop.tokenizers import load_tokenizer
from tests.networks import randomize

State = dict[str, Tensor]


def random_state(shapes: dict[str, tuple[int, ...]]) -> State:
    """Weights whose outputs neither vanish nor explode."""
    return {
        name: torch.randn(shape) * (2 / torch.Size(shape[1:]).numel()) ** 0.5
        if len(shape) > 1
        else torch.randn(shape) / 4
        for name, shape in shapes.items()
    }


def images_of(side: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, side, side)


# VQ-KD


def vit(*, side: int, patch: int, dim: int, depth: int, heads: int, channels: int = 3) -> Beit:
    return Beit(
        img_size=side,
        patch_size=patch,
        in_chans=channels,
        num_classes=0,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        qkv_bias=True,
        use_abs_pos_emb=True,
        global_pool="avg",
    ).eval()


def linear_tanh_linear(name: str, dim: int, out_dim: int) -> State:
    return random_state(
        {f"{name}.0.weight": (dim, dim), f"{name}.0.bias": (dim,)}
        | {f"{name}.2.weight": (out_dim, dim), f"{name}.2.bias": (out_dim,)}
    )


def vqkd_file(encoder: Beit, decoder: Beit, *, codes: int, code_dim: int, features: int = 6) -> State:
    """All that a checkpoint of its training has."""
    dim = encoder.embed_dim
    vectors = F.normalize(torch.randn(codes, code_dim), dim=1)
    return (
        {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
        | {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
        | {"quantize.cluster_size": torch.rand(codes), "quantize.embedding.cluster_size": torch.rand(codes)}
        | {"quantize.embedding.weight": vectors, "quantize.embedding.embed_avg": torch.randn(codes, code_dim)}
        | {"quantize.embedding.initted": torch.ones(1)}
        | linear_tanh_linear("encode_task_layer", dim, code_dim)
        | linear_tanh_linear("decode_task_layer", dim, features)
        | {
            "teacher_model.visual.proj": torch.randn(3, 4).half(),
            "scaling_layer.shift": torch.randn(1, 3, 1, 1),
        }
    )


@torch.no_grad()
def vqkd_vectors(encoder: Beit, state: State, pixels: Tensor) -> Tensor:
    """Of pixels as its encoder gets them, before they are normalised."""
    x = encoder.fc_norm(encoder.forward_features(pixels)[:, 1:])
    weights = [state[f"encode_task_layer.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
    return torch.tanh(x @ weights[0].T + weights[1]) @ weights[2].T + weights[3]


def vqkd_codes(encoder: Beit, state: State, pixels: Tensor) -> Tensor:
    x = vqkd_vectors(encoder, state, pixels)
    x = x / x.norm(dim=-1, keepdim=True)
    v = state["quantize.embedding.weight"]
    return ((x**2).sum(-1, keepdim=True) + (v**2).sum(-1) - 2 * x @ v.T).argmin(-1)


def tiny_vqkd() -> tuple[Beit, State]:
    encoder = randomize(vit(side=16, patch=4, dim=24, depth=2, heads=3))
    decoder = vit(side=4, patch=1, dim=24, depth=1, heads=3, channels=5)
    state = vqkd_file(encoder, decoder, codes=19, code_dim=5)
    # around 0, or all would have one code
    state["encode_task_layer.2.bias"] -= vqkd_vectors(encoder, state, 2 * images_of(16, 8) - 1).mean((0, 1))
    return encoder, state


def test_vqkd_gives_the_codes_of_the_released_network(tmp_path: Path) -> None:
    encoder, state = tiny_vqkd()
    torch.save({"model": state, "epoch": 99}, tmp_path / "vqkd.pth")
    tokenizer = load_tokenizer(tmp_path / "vqkd.pth", heads=3)
    images = images_of(16, 4)
    codes = tokenizer.encode(images)
    assert torch.equal(codes, vqkd_codes(encoder, state, images * 255 / 127.5 - 1))
    assert codes.unique().numel() > 5
    assert (tokenizer.vocab_size, tokenizer.stride, tokenizer.grid) == (19, (4, 4), (4, 4))
    assert (tokenizer.channels, tokenizer.interpolation) == (3, "bicubic")
    assert not tokenizer.training
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    assert tokenizer.codebook.is_started


def test_vqkd_normalises_as_its_training_did(tmp_path: Path) -> None:
    encoder, state = tiny_vqkd()
    arguments = argparse.Namespace(process_type="imagenet_norm")
    torch.save({"model": state, "args": arguments}, tmp_path / "vqkd.pth")
    images = images_of(16)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = vqkd_codes(encoder, state, (images - mean[:, None, None]) / std[:, None, None])
    assert torch.equal(load_tokenizer(tmp_path / "vqkd.pth", heads=3).encode(images), expected)
    arguments.process_type = "dall-e"
    torch.save({"model": state, "args": arguments}, tmp_path / "vqkd.pth")
    with pytest.raises(ValueError, match="process_type dall-e of 3 channels is unknown"):
        load_tokenizer(tmp_path / "vqkd.pth", heads=3)


def test_a_tokenizer_needs_no_decoder(tmp_path: Path) -> None:
    encoder, state = tiny_vqkd()
    needed = ("encoder.", "encode_task_layer.", "quantize.embedding.weight")
    save_file(
        {k: t.contiguous() for k, t in state.items() if k.startswith(needed)}, tmp_path / "x.safetensors"
    )
    images = images_of(16)
    codes = load_tokenizer(tmp_path / "x.safetensors", heads=3).encode(images)
    assert torch.equal(codes, vqkd_codes(encoder, state, images * 2 - 1))


# DALL-E and the discrete autoencoder


def dalle_file(*, codes: int, hidden: int) -> State:
    shapes: dict[str, tuple[int, ...]] = {"blocks.input": (hidden, 3, 7, 7)}
    before = hidden
    for group in range(1, 5):
        width = hidden * 2 ** (group - 1)
        for block in (1, 2):
            name, inner = f"blocks.group_{group}.block_{block}", width // 4
            if before != width:
                shapes[f"{name}.id_path"] = (width, before, 1, 1)
            shapes[f"{name}.res_path.conv_1"] = (inner, before, 3, 3)
            shapes[f"{name}.res_path.conv_2"] = (inner, inner, 3, 3)
            shapes[f"{name}.res_path.conv_3"] = (inner, inner, 3, 3)
            shapes[f"{name}.res_path.conv_4"] = (width, inner, 1, 1)
            before = width
    shapes["blocks.output.conv"] = (codes, before, 1, 1)
    state = random_state({f"{name}.w": shape for name, shape in shapes.items()})
    return state | random_state({f"{name}.b": shape[:1] for name, shape in shapes.items()})


def dalle_logits(state: State, images: Tensor) -> Tensor:
    def convolved(x: Tensor, name: str) -> Tensor:
        weight = state[f"{name}.w"]
        return F.conv2d(x, weight, state[f"{name}.b"], padding=weight.shape[-1] // 2)

    x = convolved(images * 0.8 + 0.1, "blocks.input")
    for group in range(1, 5):
        for block in (1, 2):
            name = f"blocks.group_{group}.block_{block}"
            path = x
            for layer in range(1, 5):
                path = convolved(path.relu(), f"{name}.res_path.conv_{layer}")
            x = (convolved(x, f"{name}.id_path") if f"{name}.id_path.w" in state else x) + path / 64
        x = F.max_pool2d(x, 2) if group < 4 else x
    return convolved(x.relu(), "blocks.output.conv")


def dvae_file(*, codes: int, hidden: int, code_dim: int, layers: int = 3) -> State:
    shapes: dict[str, tuple[int, ...]] = {}
    for coder, before in (("encoder", 3), ("decoder", code_dim)):
        for layer in range(layers):
            first = f"{coder}.{2 * layer}.0"
            shapes[first] = (hidden, before, 4, 4) if coder == "encoder" else (before, hidden, 4, 4)
            shapes |= {f"{coder}.{2 * layer + 1}.net.{i}": (hidden, hidden, 3, 3) for i in (0, 2)}
            shapes[f"{coder}.{2 * layer + 1}.net.4"] = (hidden, hidden, 1, 1)
            before = hidden
        shapes[f"{coder}.{2 * layers}"] = (codes if coder == "encoder" else 3, hidden, 1, 1)
    state = random_state({f"{name}.weight": shape for name, shape in shapes.items()})
    is_transposed = {name: shape[2] == 4 and name.startswith("decoder") for name, shape in shapes.items()}
    biases = {f"{name}.bias": (shape[1 if is_transposed[name] else 0],) for name, shape in shapes.items()}
    return state | random_state(biases) | {"codebook.weight": torch.randn(codes, code_dim)}


def dvae_logits(state: State, images: Tensor, *, layers: int = 3) -> Tensor:
    def convolved(x: Tensor, name: str, **options: int) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    x = images * 2 - 1
    for layer in range(layers):
        x = convolved(x, f"encoder.{2 * layer}.0", stride=2, padding=1).relu()
        block = f"encoder.{2 * layer + 1}.net"
        path = convolved(convolved(x, f"{block}.0", padding=1).relu(), f"{block}.2", padding=1).relu()
        x = x + convolved(path, f"{block}.4")
    return convolved(x, f"encoder.{2 * layers}")


def likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(1).flatten(1)


def test_dalle_gives_the_codes_of_the_released_network(tmp_path: Path) -> None:
    state, images = dalle_file(codes=23, hidden=8), torch.rand(2, 3, 32, 48)
    state["blocks.output.conv.b"] -= dalle_logits(state, images).mean((0, 2, 3))  # else all have one code
    torch.save(state, tmp_path / "dalle_encoder.pth")
    tokenizer = load_tokenizer(tmp_path / "dalle_encoder.pth")
    codes = tokenizer.encode(images)
    assert torch.equal(codes, likeliest(dalle_logits(state, images)))
    assert codes.unique().numel() > 5
    assert (tokenizer.vocab_size, tokenizer.stride, tokenizer.grid) == (23, (8, 8), None)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_discrete_autoencoder_gives_the_codes_of_the_released_network(tmp_path: Path, layers: int) -> None:
    state, images = dvae_file(codes=17, hidden=8, code_dim=6, layers=layers), torch.rand(2, 3, 32, 48)
    state[f"encoder.{2 * layers}.bias"] -= dvae_logits(state, images, layers=layers).mean((0, 2, 3))
    torch.save({"weights": state, "hparams": {"num_layers": layers}}, tmp_path / "pytorch_model.bin")
    tokenizer = load_tokenizer(tmp_path / "pytorch_model.bin")
    codes = tokenizer.encode(images)
    assert torch.equal(codes, likeliest(dvae_logits(state, images, layers=layers)))
    assert codes.unique().numel() > 5
    assert tokenizer.vocab_size == 17
    assert tokenizer.stride == (2**layers, 2**layers)
    assert tokenizer.decode(codes, (32 // 2**layers, 48 // 2**layers)).shape == images.shape


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in dvae_file(codes=5, hidden=4, code_dim=3).items()}
    torch.save(state, tmp_path / "x.pth")
    tokenizer = load_tokenizer(tmp_path / "x.pth")
    assert {parameter.dtype for parameter in tokenizer.parameters()} == {torch.float32}


# Refusals


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ValueError, match=path.name) as error:
        load_tokenizer(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_pickled_network_of_dalle_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = type("Encoder", (nn.Linear,), {"__module__": "dall_e.encoder"})
    module = types.ModuleType("dall_e.encoder")
    module.Encoder = encoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
    monkeypatch.setitem(sys.modules, "dall_e.encoder", module)
    path = tmp_path / "encoder.pkl"
    torch.save(encoder(2, 2), path)
    said = refusal(path)
    assert "dall_e is installed" in said
    command = said[said.index('"') + 1 : -1]  # what python -c runs
    exec(command)
    assert torch.load(tmp_path / "encoder.pth").keys() == {"weight", "bias"}


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "x.pth")
    said = refusal(tmp_path / "x.pth")
    assert "has the keys bias, weight; give DALL-E's encoder" in said
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "y.pth")


def _without(state: State, key: str) -> State:
    return {name: tensor for name, tensor in state.items() if name != key}


BROKEN = {
    "a part is missing": (
        lambda s: _without(s, "encode_task_layer.2.bias"),
        "the file lacks task_layer.2.bias",
    ),
    "the encoder lacks a part": (
        lambda s: _without(s, "encoder.blocks.1.mlp.fc2.bias"),
        "lacks weights of its beit network",
    ),
    "something is unknown": (lambda s: s | {"head.weight": torch.ones(1)}, "nothing in a VQ-KD: head.weight"),
    "of another width": (
        lambda s: s | {"encode_task_layer.2.weight": torch.ones(6, 24)},
        r"task_layer.2.weight is \[6, 24\], where \[5, 24\] is expected",
    ),
    "not trained": (
        lambda s: s | {"quantize.embedding.weight": torch.zeros(19, 5)},
        "rows 0 to 0 long, where 1 is expected; its training had not begun",
    ),
    "not finite": (
        lambda s: s | {"encode_task_layer.0.bias": torch.full((24,), torch.nan)},
        "not finite: encode_task_layer.0.bias",
    ),
}


@pytest.mark.parametrize(("change", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_vqkd_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    torch.save({"model": change(tiny_vqkd()[1])}, tmp_path / "vqkd.pth")
    with pytest.raises(ValueError, match=said):
        load_tokenizer(tmp_path / "vqkd.pth", heads=3)


def test_heads_that_nothing_tells_are_asked_for(tmp_path: Path) -> None:
    torch.save({"model": tiny_vqkd()[1]}, tmp_path / "vqkd.pth")
    assert "heads" in refusal(tmp_path / "vqkd.pth")


def test_another_order_of_residual_blocks_is_refused(tmp_path: Path) -> None:
    """DALLE-pytorch's own have them all after the strided convolutions."""
    state = dvae_file(codes=5, hidden=4, code_dim=3, layers=2)
    order = {"encoder.1.": "encoder.2.", "encoder.2.": "encoder.1."}
    swapped = {order.get(name[:10], name[:10]) + name[10:]: tensor for name, tensor in state.items()}
    torch.save({"weights": swapped}, tmp_path / "x.bin")
    assert "it is another network" in refusal(tmp_path / "x.bin")


# Published sizes


@pytest.mark.slow
def test_published_sizes_of_vqkd(tmp_path: Path) -> None:
    encoder = vit(side=224, patch=16, dim=768, depth=12, heads=12)
    decoder = vit(side=14, patch=1, dim=768, depth=3, heads=12, channels=32)
    state = vqkd_file(encoder, decoder, codes=8192, code_dim=32, features=512)
    published = [name for name in state if not name.startswith(("teacher", "scaling"))]
    buffers = ("quantize.cluster_size", "quantize.embedding.initted")
    assert sum(state[name].numel() for name in published if name not in buffers) == 109_361_696
    torch.save({"model": state}, tmp_path / "vqkd.pth")
    tokenizer = load_tokenizer(tmp_path / "vqkd.pth")
    images = images_of(224, 1)
    assert torch.equal(tokenizer.encode(images), vqkd_codes(encoder, state, images * 2 - 1))


@pytest.mark.slow
def test_published_sizes_of_dalle_and_the_discrete_autoencoder(tmp_path: Path) -> None:
    images = images_of(112, 1)
    for state, logits, parameters in (
        (dalle_file(codes=8192, hidden=256), dalle_logits, 53_786_240),
        (dvae_file(codes=8192, hidden=256, code_dim=512), dvae_logits, 20_081_411),
    ):
        assert sum(tensor.numel() for tensor in state.values()) == parameters
        torch.save(state, tmp_path / "x.pth")
        found = load_tokenizer(tmp_path / "x.pth").encode(images)
        assert found.shape == (1, 196)
        assert torch.equal(found, likeliest(logits(state, images)))
