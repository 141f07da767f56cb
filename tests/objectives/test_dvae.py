"""Training of the discrete autoencoder against plain arithmetic."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mpm.objectives.dvae import DVAETraining, anneal, divergence_from_uniform, gumbel_softmax
from mpm.objectives.tokenizer_inputs import TokenizerInputs
from mpm.patchify.pixels import Normalize
from mpm.tokenizers.dvae import DiscreteVAE

CODES = 16
PROGRESS = torch.tensor(0.0)


def constant(value: float) -> partial[Tensor]:
    return partial(torch.full_like, fill_value=value)


def make_training(
    *,
    channels: int = 3,
    loss: str = "l2",
    temperature: float = 0.7,
    kl_weight: float = 0.1,
    straight_through: bool = False,
) -> DVAETraining:
    normalize = Normalize((0.4,) * channels, (0.25,) * channels)
    dvae = DiscreteVAE(CODES, code_dim=6, hidden=8, layers=2, channels=channels, normalize=normalize)
    return DVAETraining(
        dvae,
        loss=loss,  # type: ignore[arg-type]
        temperature=constant(temperature),
        kl_weight=constant(kl_weight),
        straight_through=straight_through,
    )


def noise_of(logits: Tensor) -> np.ndarray:
    """What the generator as it stands gives next: of the Gumbel distribution."""
    state = torch.get_rng_state()
    noise = -torch.empty_like(logits).exponential_().log()
    torch.set_rng_state(state)
    return noise.detach().numpy()


def naive_samples(logits: Tensor, temperature: float) -> np.ndarray:
    scores = np.exp((logits.detach().numpy() + noise_of(logits)) / temperature)
    return scores / scores.sum(1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_samples_are_the_softmax_of_logits_with_gumbel_noise(temperature: float) -> None:
    logits = torch.randn(2, CODES, 3, 2, dtype=torch.float64)
    expected = naive_samples(logits, temperature)
    soft = gumbel_softmax(logits, torch.tensor(temperature), straight_through=False)
    np.testing.assert_allclose(soft.numpy(), expected, rtol=1e-9)


def test_the_noise_makes_codes_as_frequent_as_they_are_likely() -> None:
    logits = torch.tensor([0.2, 0.3, 0.5]).log().reshape(1, 3, 1, 1).expand(20_000, 3, 1, 1)
    chosen = gumbel_softmax(logits, torch.tensor(1.0), straight_through=False).argmax(1)
    shares = torch.bincount(chosen.flatten()) / len(chosen)
    # standard error below 0.004
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.3, 0.5]), rtol=0, atol=0.015)


def test_straight_through_is_one_hot_forward_and_soft_backward() -> None:
    logits = torch.randn(2, CODES, 3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, CODES, 3, 2, dtype=torch.float64)
    state = torch.get_rng_state()
    soft = gumbel_softmax(logits, torch.tensor(0.5), straight_through=False)
    (expected,) = torch.autograd.grad((soft * weights).sum(), logits)
    torch.set_rng_state(state)
    hard = gumbel_softmax(logits, torch.tensor(0.5), straight_through=True)
    (gradient,) = torch.autograd.grad((hard * weights).sum(), logits)
    torch.testing.assert_close(hard.detach(), F.one_hot(soft.argmax(1), CODES).permute(0, 3, 1, 2).double())
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("scale", "expected"), [(0.0, 0.0), (1e4, math.log(CODES))], ids=["uniform", "one-hot"]
)
def test_divergence_of_uniform_and_of_certain_codes(scale: float, expected: float) -> None:
    logits = scale * F.one_hot(torch.randint(CODES, (2, 3, 4)), CODES).permute(0, 3, 1, 2).float()
    assert divergence_from_uniform(logits).item() == pytest.approx(expected, abs=1e-6)


def test_divergence_is_the_published_sum_divided_by_batch_and_positions() -> None:
    logits = torch.randn(3, CODES, 4, 2, dtype=torch.float64)
    log_probabilities = logits.flatten(2).mT.log_softmax(-1)  # [B,N,V]
    log_uniform = torch.tensor([1 / CODES], dtype=torch.float64).log()
    published = F.kl_div(log_uniform, log_probabilities, reduction="batchmean", log_target=True)
    torch.testing.assert_close(divergence_from_uniform(logits), published / (3 * 8))


@pytest.mark.parametrize("loss", ["l2", "smooth_l1"])
@pytest.mark.parametrize("straight_through", [False, True])
def test_the_loss_is_that_of_plain_arithmetic_with_the_same_noise(loss: str, straight_through: bool) -> None:
    training = make_training(loss=loss, straight_through=straight_through).double()
    dvae = training.tokenizer
    images = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    logits = dvae.logits(images).float()
    samples = naive_samples(logits, 0.7)  # [B,V,h,w]
    if straight_through:
        samples = np.eye(CODES)[samples.argmax(1)].transpose(0, 3, 1, 2)
    # as in training, samples are float32 until they meet the codebook
    dvae.codebook.weight.data = dvae.codebook.weight.data.float().double()
    codebook = dvae.codebook.weight.detach().numpy()
    vectors = np.zeros((2, codebook.shape[1], 2, 3))
    for b, v, row, column in np.ndindex(samples.shape):
        vectors[b, :, row, column] += samples[b, v, row, column] * codebook[v]
    told = dvae.reconstruct(torch.from_numpy(vectors)).detach().numpy()
    error = told - (images.numpy() - 0.4) / 0.25
    small = np.abs(error) < 1
    per_pixel = error**2 if loss == "l2" else np.where(small, error**2 / 2, np.abs(error) - 0.5)
    shares = logits.softmax(1).detach().double().numpy()
    kl = (shares * np.log(shares * CODES)).sum(1).mean()

    dvae.float()
    output = training(TokenizerInputs(images.float(), None), PROGRESS)
    single = {"rel": 1e-5}  # float32
    assert output.metrics["reconstruction"].item() == pytest.approx(per_pixel.mean(), **single)
    assert output.metrics["kl"].item() == pytest.approx(kl, rel=1e-4)
    assert output.loss.item() == pytest.approx(per_pixel.mean() + 0.1 * kl, **single)
    assert output.settings["temperature"].item() == pytest.approx(0.7)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("channels", [1, 4])
def test_gradients_reach_every_parameter(channels: int, straight_through: bool) -> None:
    training = make_training(channels=channels, straight_through=straight_through)
    training(TokenizerInputs(torch.rand(2, channels, 8, 12), None), PROGRESS).loss.backward()
    for name, parameter in training.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_perplexity_and_use_are_of_the_codes_of_the_batch() -> None:
    training = make_training()
    images = torch.rand(4, 3, 16, 16)
    metrics = training(TokenizerInputs(images, None), PROGRESS).metrics
    codes = training.tokenizer.encode(images).flatten().tolist()
    shares = [codes.count(code) / len(codes) for code in set(codes)]
    entropy = -sum(share * math.log(share) for share in shares)
    assert metrics["perplexity"].item() == pytest.approx(math.exp(entropy), rel=1e-5)
    assert metrics["codes_used"].item() == pytest.approx(len(shares) / CODES)
    assert not any(metric.requires_grad for metric in metrics.values())
    assert all(metric.shape == () for metric in metrics.values())


def test_autocast_leaves_probabilities_and_losses_in_float32() -> None:
    training = make_training()
    inputs = TokenizerInputs(torch.rand(2, 3, 16, 16), None)
    torch.manual_seed(1)
    expected = training(inputs, PROGRESS)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        output = training(inputs, PROGRESS)
    assert output.loss.dtype == torch.float32
    assert output.metrics["kl"].dtype == torch.float32
    # logits and pixels are rounded to 8 bits
    torch.testing.assert_close(output.loss, expected.loss, rtol=0.03, atol=0)


def test_the_schedules_follow_the_progress() -> None:
    temperature = partial(anneal, start=1.0, end=0.1, share=0.5)
    kl_weight = partial(anneal, start=0.0, end=2.0, share=1.0)
    tokenizer = make_training().tokenizer
    training = DVAETraining(
        tokenizer, loss="l2", temperature=temperature, kl_weight=kl_weight, straight_through=False
    )
    inputs = TokenizerInputs(torch.rand(1, 3, 8, 8), None)
    start, later = training(inputs, PROGRESS), training(inputs, torch.tensor(0.5))
    assert start.settings["temperature"].item() == pytest.approx(1.0)
    assert start.loss.item() == pytest.approx(start.metrics["reconstruction"].item())
    assert later.settings["temperature"].item() == pytest.approx(0.1)
    torch.testing.assert_close(later.loss, later.metrics["reconstruction"] + later.metrics["kl"])


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 1.0), (0.125, 0.5 + 0.25 * 2**0.5), (0.25, 0.5), (0.5, 0.0), (0.9, 0.0)]
)
def test_annealing_is_half_a_cosine_then_its_end(progress: float, expected: float) -> None:
    value = anneal(torch.tensor(progress, dtype=torch.float64), start=1, end=0, share=0.5)
    assert value.item() == pytest.approx(expected, abs=1e-9)
    raised = anneal(torch.tensor(progress, dtype=torch.float64), start=2, end=4, share=0.5)
    assert raised.item() == pytest.approx(4 - 2 * expected, abs=1e-9)


@pytest.mark.slow
def test_it_learns_two_kinds_of_patches() -> None:
    training = make_training(temperature=0.5, kl_weight=0.0)
    optimizer = torch.optim.AdamW(training.parameters(), lr=5e-3)
    for _ in range(300):
        bright = torch.rand(16, 1, 4, 4).round()
        images = F.interpolate(bright, scale_factor=4).expand(-1, 3, -1, -1)
        output = training(TokenizerInputs(images, None), PROGRESS)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    codes = training.tokenizer.encode(images)
    decoded = training.tokenizer.decode(codes, (4, 4))
    assert (decoded - images).square().mean() < 0.02
