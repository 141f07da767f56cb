from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor, nn

from mpm.evaluation import attentive_probe
from mpm.evaluation.attentive_probe import RATES, AttentiveProbe, attentive_scores
from mpm.evaluation.features import Features
from mpm.evaluation.probes import held_out_folds, linear_score


def test_it_is_multi_head_attention_of_one_query() -> None:
    probe = AttentiveProbe(12, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    for parameter in probe.parameters():
        nn.init.normal_(parameter)
    oracle = nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        oracle.in_proj_weight.copy_(
            torch.cat([torch.eye(12), probe.key.flatten(0, 1), probe.value.flatten(0, 1)])
        )
        oracle.in_proj_bias.zero_()
        oracle.out_proj.weight.copy_(torch.eye(12))
        oracle.out_proj.bias.zero_()
    tokens = torch.randn(4, 7, 12, dtype=torch.double)
    query = probe.query.flatten().expand(4, 1, 12)
    expected = oracle(query, tokens, tokens)[0][:, 0] @ probe.weight.T + probe.bias
    torch.testing.assert_close(probe(tokens), expected)


class _Tokens:
    def __init__(self, tokens: Tensor, labels: Tensor):
        self.tokens, self.labels = tokens, labels

    def batches(self, orders: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in orders:
            yield self.tokens[rows], self.labels[rows]


def _marked(count: int) -> _Tokens:
    """Every token shows a class; that of the image is shown by the marked one. A second layer: noise."""
    labels = torch.randint(3, (count,))
    shown = torch.randint(3, (count, 8))
    places = torch.randint(8, (count,))
    shown[torch.arange(count), places] = labels
    tokens = 0.1 * torch.randn(count, 8, 6)
    tokens[..., :3] += nn.functional.one_hot(shown, 3)
    tokens[torch.arange(count), places, 5] += 1
    return _Tokens(torch.stack([tokens, torch.randn_like(tokens)], 1), labels)


@pytest.mark.slow
def test_it_finds_the_patch_that_tells() -> None:
    train, test = _marked(1200), _marked(300)
    folds = held_out_folds(train.labels, seed=0)
    rows = torch.arange(1200)
    settings = {"num_heads": 1, "num_classes": 3, "seed": 0}
    told, noise = attentive_scores(train, test, rows, folds, **settings)
    assert min(told.test, told.held_out or 0) > 0.97
    assert told.setting in RATES
    assert noise.test < 0.5
    means = (Features(data.tokens[:, 0].mean(1), data.labels) for data in (train, test))
    assert linear_score(*means, folds, num_classes=3).test < 0.7
    assert attentive_scores(train, test, rows, folds, **settings) == [told, noise]


def test_every_row_is_seen_before_one_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attentive_probe, "_BATCH", 4)
    rows = torch.tensor([3, 5, 6, 8, 11, 12, 13, 17, 20])
    orders = list(attentive_probe._orders(rows, 4, seed=0))
    assert [len(order) for order in orders] == [4] * 4
    for epoch in (orders[:2], orders[2:]):
        seen = torch.cat(epoch)
        assert len(set(seen.tolist()) & set(rows.tolist())) == 8
    assert not torch.equal(torch.cat(orders[:2]), torch.cat(orders[2:]))


def test_every_fit_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(attentive_probe, "_LEAST_STEPS", 1)
    train, rows = _marked(10), torch.arange(10)
    folds = [rows % 2 == half for half in range(2)]
    with caplog.at_level("INFO", logger="mpm"):
        attentive_scores(train, train, rows, folds, num_heads=1, num_classes=3, seed=0)
    assert [message.split(" from ")[1] for message in caplog.messages] == [
        "5 images: to choose the rate, 1 of 2",
        "5 images: to choose the rate, 2 of 2",
        "10 images: to be tested",
    ]
