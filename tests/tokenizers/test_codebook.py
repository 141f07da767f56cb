"""Codebooks; `main` below is what torchrun starts."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.datasets import make_blobs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mpm import distributed
from mpm.tokenizers import clustering
from mpm.tokenizers import codebook as module
from mpm.tokenizers.codebook import Codebook, Metric, code_metrics

METRICS = ("euclidean", "cosine")


def make_codebook(
    num_codes: int = 7, dim: int = 5, *, metric: Metric = "euclidean", vectors: Tensor | None = None
) -> Codebook:
    """Started, with random vectors or these."""
    codebook = Codebook(num_codes, dim, metric=metric)
    vectors = torch.randn(num_codes, dim) if vectors is None else vectors
    codebook.vectors.copy_(F.normalize(vectors, dim=1) if metric == "cosine" else vectors)
    codebook.started.fill_(True)
    return codebook


def step_of(codebook: Codebook, *parts: Tensor, step: int = 1, decay: float | None = None, seed: int = 0):
    """Assigns micro-batches, then moves; the codes of all."""
    codes = [codebook.nearest(part) for part in parts]
    for part, own in zip(parts, codes, strict=True):
        codebook.accumulate(part, own)
    codebook.move(decay, step=step, seed=seed)
    return torch.cat(codes)


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def nearest_by_loops(codebook: Codebook, rows: Tensor) -> list[int]:
    codes = []
    for row in rows.double():
        if codebook.metric == "cosine":
            values = [-float(row @ vector.double()) for vector in codebook.vectors]
        else:
            values = [float((row - vector.double()).square().sum()) for vector in codebook.vectors]
        codes.append(values.index(min(values)))
    return codes


@pytest.mark.parametrize("metric", METRICS)
def test_the_nearest_code_is_that_of_a_loop(metric: Metric) -> None:
    codebook, x = make_codebook(metric=metric), torch.randn(3, 40, 5)
    codes = codebook.nearest(x)
    assert (codes.shape, codes.dtype) == ((3, 40), torch.int64)
    assert codes.flatten().tolist() == nearest_by_loops(codebook, x.flatten(0, 1))
    assert codebook.nearest(x[:0]).shape == (0, 40)


@pytest.mark.parametrize("metric", METRICS)
def test_of_codes_as_near_the_lowest_is_taken(metric: Metric) -> None:
    vectors = torch.tensor([[0.0, -1], [1, 0], [-1, 0], [1, 0], [-1, 0]])
    codebook = make_codebook(5, 2, metric=metric, vectors=vectors)
    x = torch.tensor([[0.0, 1], [0.5, 0.25], [-0.5, 0.25], [0, 3]])
    assert codebook.nearest(x).tolist() == [1, 1, 2, 1]


@pytest.mark.parametrize("metric", METRICS)
def test_chunks_do_not_change_the_codes(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    codebook, x = make_codebook(50, 24, metric=metric), torch.randn(301, 24)
    whole = codebook.nearest(x)
    shapes = []
    addmm = torch.addmm
    monkeypatch.setattr(clustering, "_MOST_DISTANCES", 1000)
    monkeypatch.setattr(torch, "addmm", lambda *args: shapes.append(len(args[1])) or addmm(*args))
    assert codebook.nearest(x).equal(whole)
    assert max(shapes) * 50 <= 1000


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_the_code_of_a_vector_does_not_depend_on_those_beside_it(metric: Metric) -> None:
    """Also of vectors so close to the middle of two codes that a float32 product takes either."""
    codebook = make_codebook(64, 32, metric=metric)
    x = torch.randn(1280, 32)
    middles = codebook.vectors[:20] + codebook.vectors[20:40] + 1e-7 * torch.randn(20, 32)
    x[::64] = middles / 2
    together = codebook.nearest(x)
    wide, vectors = x.double()[:, None], codebook.vectors.double()
    if metric == "cosine":
        assert together.equal((wide * vectors).sum(-1).argmax(1))
    else:
        assert together.equal((wide - vectors).square().sum(-1).argmin(1))
    for size in (1, 7, 100):
        assert torch.cat([codebook.nearest(part) for part in x.split(size)]).equal(together)


@pytest.mark.parametrize("metric", METRICS)
def test_autocast_changes_nothing(metric: Metric) -> None:
    """Far from 0, where bfloat16 takes different vectors for equal ones."""
    samples, x = 20 + torch.randn(600, 16), (20 + torch.randn(600, 16)).bfloat16()

    def life() -> tuple[Tensor, ...]:
        codebook = Codebook(40, 16, metric=metric)
        codebook.start(samples, seed=0)
        vectors, codes = codebook.quantize(x)
        assert vectors.dtype == torch.float32
        codebook.accumulate(x, codes)
        codebook.move(0.9, step=1, seed=0)
        return codes, codebook.nearest(samples), *codebook.buffers()

    expected = life()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(life(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_first_vectors_are_drawn_in_float32_under_autocast(metric: Metric) -> None:
    samples = 20 + torch.randn(600, 16)
    expected, found = (Codebook(40, 16, metric=metric) for _ in range(2))
    expected.start(samples, seed=0, iterations=0)
    with torch.autocast("cpu", torch.bfloat16):
        found.start(samples, seed=0, iterations=0)
    assert_same_state(found, expected)


def test_quantised_vectors_pass_their_gradient_on() -> None:
    codebook, x = make_codebook(), torch.randn(2, 6, 5, requires_grad=True)
    vectors, codes = codebook.quantize(x)
    assert vectors.equal(codebook.vectors[codes])
    weight = torch.randn(2, 6, 5)
    (vectors * weight).sum().backward()
    assert x.grad.equal(weight)


def test_quantised_unit_vectors_pass_their_gradient_on_through_the_norm() -> None:
    codebook, x = make_codebook(metric="cosine"), torch.randn(2, 6, 5, requires_grad=True)
    vectors, codes = codebook.quantize(x)
    assert codes.flatten().tolist() == nearest_by_loops(codebook, x.detach().flatten(0, 1))
    assert vectors.equal(codebook.vectors[codes])
    weight = torch.randn(2, 6, 5)
    (vectors * weight).sum().backward()
    length = x.detach().norm(dim=-1, keepdim=True)
    unit = x.detach() / length
    expected = (weight - unit * (unit * weight).sum(-1, keepdim=True)) / length
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-6)


def three_steps() -> list[tuple[Tensor, Tensor]]:
    """Micro-batches; in a step, some of 20 codes are left without a vector."""
    return [(torch.randn(6, 5), torch.randn(4, 5)) for _ in range(3)]


def test_without_decay_it_is_sculleys_algorithm() -> None:
    """Vector after vector, each with its own rate; the assignments of a batch are made before it."""
    codebook = make_codebook(20)
    vectors, counts = codebook.vectors.double().tolist(), [0] * 20
    for step, parts in enumerate(three_steps(), start=1):
        codes = step_of(codebook, *parts, step=step)
        for row, code in zip(torch.cat(parts).double().tolist(), codes.tolist(), strict=True):
            counts[code] += 1
            rate = 1 / counts[code]
            vectors[code] = [(1 - rate) * v + rate * x for v, x in zip(vectors[code], row, strict=True)]
        assert codebook.counts.tolist() == counts
        torch.testing.assert_close(codebook.vectors, torch.tensor(vectors), rtol=1e-5, atol=1e-6)
    assert 0 in counts


def test_with_decay_they_are_the_averages_of_vqvae() -> None:
    """With their two accumulators, N and m; arXiv:1711.00937, App. A.1."""
    codebook = make_codebook(20)
    start = codebook.vectors.clone()
    N, m = torch.zeros(20), torch.zeros(20, 5)
    for step, parts in enumerate(three_steps(), start=1):
        codes = step_of(codebook, *parts, step=step, decay=0.9)
        rows = torch.cat(parts)
        for code in range(20):
            N[code] = 0.9 * N[code] + 0.1 * (codes == code).sum()
            m[code] = 0.9 * m[code] + 0.1 * rows[codes == code].sum(0)
        torch.testing.assert_close(codebook.counts, N)
        expected = torch.where(N[:, None] > 0, m / N[:, None], start)
        torch.testing.assert_close(codebook.vectors, expected, rtol=1e-5, atol=1e-6)
    assert (N == 0).any()


def test_with_decay_unit_vectors_move_as_in_beit_v2() -> None:
    codebook = make_codebook(20, metric="cosine")
    vectors = codebook.vectors.clone()
    for step, parts in enumerate(three_steps(), start=1):
        codes = step_of(codebook, *parts, step=step, decay=0.9)
        for code in set(codes.tolist()):
            units = [row / row.norm() for row in torch.cat(parts)[codes == code]]
            mean = sum(units) / len(units)
            moved = 0.9 * vectors[code] + 0.1 * mean / mean.norm()
            vectors[code] = moved / moved.norm()
        torch.testing.assert_close(codebook.vectors, vectors, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(codebook.vectors.norm(dim=1), torch.ones(20))


def test_without_decay_unit_vectors_follow_the_mean_of_all() -> None:
    codebook, rows = make_codebook(1, 5, metric="cosine"), torch.randn(3, 40, 5) + 3
    for step in range(3):
        step_of(codebook, rows[step], step=step + 1)
    mean = F.normalize(rows, dim=-1).mean((0, 1))
    # the length that a mean had before it was made 1 is forgotten, so later vectors count a little more
    assert F.cosine_similarity(codebook.vectors[0], mean, dim=0) > 0.9999
    assert codebook.counts.tolist() == [120]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("decay", [None, 0.9])
def test_micro_batches_change_nothing(
    metric: Metric, decay: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_IDLE_PER_CODE", 1)
    monkeypatch.setattr(module, "_MOST_REVIVED", 8)
    whole = make_codebook(metric=metric)
    parts = copy.deepcopy(whole)
    for step in range(1, 5):
        rows = torch.randn(12, 5)
        step_of(whole, rows, step=step, decay=decay)
        step_of(parts, *rows.flip(0).split(5), step=step, decay=decay)
        # float64 sums differ in their last bits, which float32 drops but where they round to the other side
        torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=2e-7, atol=0)


def distance_to(x: Tensor, vectors: Any) -> float:
    return float(torch.cdist(x.double(), torch.as_tensor(vectors).double()).amin(1).square().mean())


def blobs(seed: int) -> Tensor:
    return torch.from_numpy(make_blobs(1000, 4, centers=20, cluster_std=2.0, random_state=seed)[0]).float()


@pytest.mark.parametrize("metric", METRICS)
def test_the_start_is_about_as_good_as_sklearns(metric: Metric) -> None:
    x = blobs(0) if metric == "euclidean" else F.normalize(blobs(0), dim=1)
    codebook = Codebook(32, 4, metric=metric)
    codebook.start(x, seed=0)
    theirs = KMeans(32, n_init=3, random_state=0).fit(x).cluster_centers_
    assert distance_to(x, codebook.vectors) < 1.1 * distance_to(x, theirs)  # one start against the best of 3


def test_moving_is_about_as_good_as_sklearns_mini_batches() -> None:
    x = blobs(1)
    codebook, theirs = Codebook(32, 4, metric="euclidean"), MiniBatchKMeans(32, n_init=1, random_state=0)
    codebook.start(x[:100], seed=0)
    for step in range(1, 41):
        rows = x[torch.randint(1000, (100,))]
        step_of(codebook, rows, step=step)
        theirs.partial_fit(rows)
    assert distance_to(x, codebook.vectors) < 1.1 * distance_to(x, theirs.cluster_centers_)


@pytest.mark.parametrize("metric", METRICS)
def test_the_start_does_not_depend_on_the_order_of_samples(
    metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SAMPLES_PER_CODE", 8)  # 64 of 200 are taken
    x = torch.randn(200, 5)
    ours, theirs = (Codebook(8, 5, metric=metric) for _ in range(2))
    ours.start(x.view(2, 100, 5), seed=3)
    torch.rand(3)  # the global generator is another one
    theirs.start(x[torch.randperm(200)], seed=3)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=2e-7, atol=0)
    theirs.start(x, seed=4)
    assert not ours.vectors.equal(theirs.vectors)


def test_a_start_without_iterations_is_distinct_samples_even_where_most_repeat() -> None:
    """Far from 0, where float32 takes equal vectors for somewhat different ones."""
    often = 1000 * torch.randn(1, 16)
    x = torch.cat([often.expand(5000, 16), often + 10 * torch.randn(9, 16)])
    codebook = Codebook(10, 16, metric="euclidean")
    codebook.start(x, seed=0, iterations=0)
    assert len(codebook.vectors.unique(dim=0)) == 10
    assert all((x == vector).all(1).any() for vector in codebook.vectors)


def test_fewer_samples_than_codes_leave_codes_to_later_batches() -> None:
    x = torch.randn(3, 2)
    codebook = Codebook(5, 2, metric="euclidean")
    codebook.start(x.repeat(4, 1), seed=0)
    assert sorted(codebook.nearest(x).tolist()) == [0, 1, 2]
    assert distance_to(x, codebook.vectors) == pytest.approx(0, abs=1e-12)
    step_of(codebook, torch.cat([x, x + 5]), step=1)
    assert len(codebook.vectors.unique(dim=0)) == 5
    assert len(codebook.nearest(torch.cat([x, x + 5])).unique()) == 5


def with_far_code() -> tuple[Codebook, Tensor]:
    """Code 2 is far from everything; vectors enough that it is dead after two steps."""
    codebook = make_codebook(4, 2, vectors=torch.tensor([[0.0, 0], [10, 0], [500, 500], [0, 10]]))
    return codebook, codebook.vectors[[0, 1, 3]].repeat(200, 1) + torch.randn(600, 2)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_dead_codes_come_alive(decay: float | None) -> None:
    codebook, x = with_far_code()
    codebook.counts += 7
    step_of(codebook, x, step=1, decay=decay)
    assert codebook.vectors[2].tolist() == [500, 500]
    assert codebook.idle.tolist() == [0, 0, 600, 0]
    before = codebook.vectors.clone()
    step_of(codebook, x, step=2, decay=decay)  # 1200 vectors = 300 of each code
    assert (x == codebook.vectors[2]).all(1).any()
    torch.testing.assert_close(codebook.vectors[[0, 1, 3]], before[[0, 1, 3]], rtol=0, atol=1.0)
    assert codebook.idle.tolist() == [0, 0, 0, 0]
    assert codebook.counts[2] == 0
    step_of(codebook, x, step=3, decay=decay)
    assert codebook.counts[2] > 0


def test_a_code_that_is_used_now_and_then_stays() -> None:
    codebook, x = with_far_code()
    for step in range(1, 7):
        rare = torch.full((1, 2), 500.0)[: step % 2]
        step_of(codebook, torch.cat([x, rare]), step=step)
        assert codebook.vectors[2].tolist() == [500, 500]


def test_what_dead_codes_become_is_drawn_by_seed_and_step() -> None:
    codebook, x = with_far_code()
    codebook.idle[2] = 1200

    def revived(step: int, seed: int) -> list[float]:
        one = copy.deepcopy(codebook)
        torch.rand(1)  # the global generator is another one
        step_of(one, x, step=step, seed=seed)
        return one.vectors[2].tolist()

    assert revived(3, 0) == revived(3, 0)
    assert len({tuple(revived(*key)) for key in ((3, 0), (4, 0), (3, 1), (4, 1))}) == 4


def test_dead_codes_are_drawn_by_squared_distance_and_never_twice() -> None:
    x = torch.tensor([[0.0], [1], [-2], [3], [3], [0]])
    live = make_codebook(3, 1, vectors=torch.tensor([[0.0], [90], [-90]]))
    live.idle += torch.tensor([0, 900, 900])
    firsts = []
    for seed in range(300):
        codebook = copy.deepcopy(live)
        codebook._revive(x, step=1, seed=seed)
        zero, first, second = codebook.vectors.abs().flatten().tolist()
        assert zero == 0
        assert first != second
        firsts.append(first)
    shares = torch.tensor([firsts.count(distance) / 300 for distance in (0, 1, 2, 3)])
    expected = torch.tensor([0, 1, 4, 9]) / 14
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.09)  # three deviations


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_resumed_codebook_is_equal_to_the_last_bit(
    metric: Metric, decay: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_IDLE_PER_CODE", 2)  # codes die and come alive all the time
    batches = torch.randn(8, 20, 5)

    def go_on(codebook: Codebook, steps: range) -> Codebook:
        for step in steps:
            if not codebook.is_started:
                codebook.start(batches[step], seed=0)
            step_of(codebook, batches[step], step=step + 1, decay=decay)
        return codebook

    half = go_on(Codebook(12, 5, metric=metric), range(4))
    state = copy.deepcopy(half.state_dict())
    whole = go_on(half, range(4, 8))
    resumed = Codebook(12, 5, metric=metric)
    assert not resumed.is_started
    resumed.load_state_dict(state)
    assert resumed.is_started
    assert_same_state(go_on(resumed, range(4, 8)), whole)


def test_a_codebook_knows_by_its_state_whether_it_is_started() -> None:
    codebook, fresh = make_codebook(), Codebook(7, 5, metric="euclidean").state_dict()
    assert codebook.is_started
    codebook.load_state_dict(fresh)
    assert not codebook.is_started
    codebook.start(torch.randn(20, 5), seed=0)
    codebook.reset_parameters()
    assert not codebook.is_started
    assert_same_state(codebook, Codebook(7, 5, metric="euclidean"))


def test_metrics_tell_how_evenly_codes_are_used() -> None:
    even = code_metrics(torch.tensor([[0, 1], [2, 3]]), 8)
    assert {name: round(float(value), 5) for name, value in even.items()} == {
        "perplexity": 4.0,
        "codes_used": 0.5,
    }
    assert float(code_metrics(torch.zeros(9, dtype=torch.int64), 8)["perplexity"]) == pytest.approx(1)
    uneven = code_metrics(torch.tensor([0, 0, 0, 1]), 2)["perplexity"]
    assert float(uneven) == pytest.approx(4 / 27**0.25)  # exp(-3/4 log 3/4 - 1/4 log 1/4)


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
def test_a_started_codebook_never_waits_for_the_device(metric: Metric) -> None:
    codebook = Codebook(64, 16, metric=metric).cuda()
    x = torch.randn(8, 49, 16, device="cuda", requires_grad=True)
    codebook.start(x, seed=0)
    step_of(codebook, x, decay=0.9)  # lazy initialisation may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        vectors, codes = codebook.quantize(x)
        code_metrics(codes, 64)
        vectors.sum().backward()
        step_of(codebook, x, step=2, decay=0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Learner(nn.Module):
    """What DDP wraps: a codebook beside something with gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.codebook = Codebook(12, 5, metric="cosine")

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        if not self.codebook.is_started:
            self.codebook.start(z, seed=5)
        vectors, codes = self.codebook.quantize(z)
        self.codebook.accumulate(z, codes)
        return (vectors - x).square().mean()


def lives(share: slice) -> dict[str, dict[str, Tensor]]:
    """States of codebooks of both metrics after their start and after each step, on a share of 40 vectors."""
    states = {}
    batches = torch.randn(6, 40, 5, generator=torch.Generator().manual_seed(0))
    for metric in METRICS:
        codebook = Codebook(12, 5, metric=metric)
        codebook.start(batches[0, share], seed=5)
        states[f"{metric} start"] = copy.deepcopy(codebook.state_dict())
        for step, rows in enumerate(batches, start=1):
            step_of(codebook, *rows[share].split(8), step=step, decay=0.9)
            states[f"{metric} {step}"] = copy.deepcopy(codebook.state_dict())
    return states


def life_under_ddp(share: slice) -> dict[str, Tensor]:
    """The state of a learner after three steps of two micro-batches each."""
    torch.manual_seed(0)
    learner = Learner()
    trained = DistributedDataParallel(learner)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    for step, rows in enumerate(torch.randn(3, 40, 5), start=1):
        first, second = rows[share].tensor_split(2)
        with trained.no_sync():
            trained(first).backward()
        trained(second).backward()  # after a broadcast of the buffers
        optimizer.step()
        optimizer.zero_grad()
        learner.codebook.move(None, step=step, seed=5)
    return learner.state_dict()


def settle(patch: Any) -> None:
    """Few samples at the start, and codes that die and come alive all the time."""
    patch(module, "_SAMPLES_PER_CODE", 3)
    patch(module, "_IDLE_PER_CODE", 1)
    patch(module, "_MOST_REVIVED", 16)


def main(folder: Path) -> None:
    """Uneven shares of one batch, in several micro-batches each."""
    distributed.start("cpu")
    share = (slice(0, 13), slice(13, 40))[distributed.rank()]
    ddp = life_under_ddp(share)
    settle(setattr)
    torch.manual_seed(distributed.rank())  # as in a run; codebooks draw from their own generators
    torch.save({"ddp": ddp, **lives(share)}, folder / f"{distributed.rank()}.pt")
    distributed.stop()


@pytest.mark.torchrun
def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launcher, "-m", "tests.tokenizers.test_codebook", str(tmp_path)],
        check=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    main_process, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(other, main_process, rtol=0, atol=0)
    # DDP's broadcast of buffers between micro-batches took nothing away
    assert main_process.pop("ddp")["codebook.counts"].sum() == 3 * 40
    settle(monkeypatch.setattr)
    # float64 sums differ in their last bits, which float32 drops but where they round to the other side
    torch.testing.assert_close(lives(slice(0, 40)), main_process, rtol=2e-7, atol=0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
