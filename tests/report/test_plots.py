"""Coordinates of the page's plots, measured on their paths."""

import re

import numpy as np
import pytest

from ptq.report.page.plots import HEIGHT, WIDTH, curve, magnitude_histogram, weight_histogram


def outline(path: str) -> list[tuple[float, float, float]]:
    """Left, right and height over the axis of each bar of adjoining ones."""
    found, x = [], 0.0
    for y, right in re.findall(r"V([\d.]+)H([\d.]+)", path):
        found.append((x, float(right), HEIGHT - float(y)))
        x = float(right)
    return found


def bars(path: str) -> list[tuple[float, float, float]]:
    parts = re.findall(rf"M(-?[\d.]+) {HEIGHT}V([\d.]+)h([\d.]+)V{HEIGHT}Z", path)
    return [(float(x), float(x) + float(w), HEIGHT - float(y)) for x, y, w in parts]


def test_bars_stand_on_the_grid_with_the_heights_of_densities() -> None:
    generator = np.random.default_rng(0)
    before, after = generator.integers(1, 900, 64).tolist(), generator.integers(1, 900, 16).tolist()
    plot = weight_histogram(before, after, -8.5, 7.5)
    assert len(plot.grid) == 16
    for (left, right, _), x in zip(bars(plot.after), plot.grid, strict=True):
        assert (left + right) / 2 == pytest.approx(x, abs=0.02)
    # A density: counts by the width of a bin, on one scale for both.
    one = np.array([height for *_, height in outline(plot.before)]) / (64 * np.array(before))
    two = np.array([height for *_, height in bars(plot.after)]) / (16 * np.array(after))
    everything = np.concatenate([one, two])
    assert everything == pytest.approx(np.full(80, everything.mean()), rel=0.1)
    assert max(h for *_, h in outline(plot.before) + bars(plot.after)) <= HEIGHT
    assert plot.ticks == ((10.0, "-8"), (WIDTH * 8.5 / 16, "0"), (310.0, "7"))


def test_many_codes_are_an_outline_without_a_grid() -> None:
    plot = weight_histogram([1] * 64, [1] * 64, -128.5, 127.5)
    assert plot.grid == () and len(outline(plot.after)) == 64
    assert {tick for _, tick in plot.ticks} == {"-128", "0", "127"}


def test_magnitudes_are_placed_by_their_power_of_two() -> None:
    plot = magnitude_histogram((-2.0, [10, 100, 1000, 10]), (-1.0, [99, 9]), 2, step=1.0)
    before, after = outline(plot.before), outline(plot.after)
    assert len(before) == len(after) == 4  # half octaves from 2^-2 to 2^0
    heights = [height for *_, height in before]
    assert heights == pytest.approx(
        np.log10([11, 101, 1001, 11]) * heights[2] / np.log10(1001), abs=0.02
    )
    assert [height for *_, height in after][:2] == [0, 0]
    assert after[2][2] == pytest.approx(2 / np.log10(1001) * heights[2], abs=0.02)
    ((x, label),) = plot.lines
    assert label == "half a step" and x == pytest.approx(WIDTH / 2)  # 2^-1
    assert dict((label, x) for x, label in plot.ticks)["0.5"] == pytest.approx(WIDTH / 2)


def test_a_step_outside_of_the_plot_is_not_drawn() -> None:
    assert magnitude_histogram((-2.0, [1, 1]), None, 2, step=64.0).lines == ()
    assert magnitude_histogram((-2.0, [1, 1]), None, 2, step=None).after == ""


def test_the_curve_goes_down_to_the_right() -> None:
    points = [(120e6, 0.01), (60e6, 1.0), (90e6, 0.1)]
    plot = curve(points, (90e6, 0.1), [(60e6, 1.0)])
    (x0, y0), (x1, y1), (x2, y2) = plot.points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x0 < x1
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2) and y0 < y1  # equal factors, and down
    assert plot.chosen == (x1, y1) and plot.measured == ((x0, y0),)
    assert min(x0, y0) > 0 and x2 < plot.width and y2 < plot.height
    ticks = [(x, float(label.removesuffix(" MB"))) for x, label in plot.x_ticks]
    for x, megabytes in ticks:
        assert megabytes == pytest.approx(60 + 30 * (x - x0) / (x1 - x0), abs=0.1)


def test_a_curve_of_one_point_and_one_with_nothing_lost() -> None:
    one = curve([(5e6, 0.5)], (5e6, 0.5), [])
    assert one.chosen == (one.width / 2, one.height / 2)
    assert curve([(5e6, 0.0), (9e6, 0.5)], (5e6, 0.0), []).points[0][1] > 0
