"""Histograms that were filled apart and merged."""

import pytest
import torch

from ptq.observers.histogram import Histogram


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("scales", [(1.0, 1000.0), (1000.0, 1.0), (0.0, 1.0)])
def test_merging_is_as_if_all_had_been_seen_at_once(
    channels: int | None, scales: tuple[float, float]
) -> None:
    parts = [torch.randn(50, 3) * scale for scale in scales]
    whole, first, second, empty = (Histogram(channels) for _ in range(4))
    whole.update(torch.cat(parts))
    first.update(parts[0])
    second.update(parts[1])
    merged = Histogram(channels)
    for part in (first, empty, second):
        merged.merge(part)
    assert torch.equal(merged.counts, whole.counts)
    assert torch.equal(merged.width, whole.width)
    assert merged.seen == whole.seen
    for a, b in zip(merged.extremes, whole.extremes, strict=True):
        assert torch.equal(a, b)


def test_counts_against_numpy() -> None:
    x = torch.randn(1000, 2) * torch.tensor([1.0, 30.0])
    histogram = Histogram(2)
    for part in x.split(77):
        histogram.update(part)
    for channel, width in enumerate(histogram.width.tolist()):
        edges = torch.arange(-256, 257, dtype=torch.float64) * width
        expected = torch.histogram(x[:, channel].double().contiguous(), edges).hist
        assert torch.equal(histogram.counts[channel].double(), expected)
        assert width <= x[:, channel].abs().max().item() / 128
