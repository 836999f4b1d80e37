import xml.etree.ElementTree as ET

import pytest
from runs import train_records

from veneer.report.plots import decimate, loss_plot, lr_plot, smooth, speed_plot


@pytest.mark.parametrize(
    "plot, unit", [(loss_plot, "nats per token"), (lr_plot, "learning rate"), (speed_plot, "tokens")]
)
def test_plots_are_labelled_svg_for_both_colour_schemes(plot, unit):
    svg = plot(train_records(120))
    root = ET.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label") and root[0].tag.endswith("title")
    words = " ".join(part.text or "" for part in root.iter("{http://www.w3.org/2000/svg}text"))
    assert unit in words and "optimiser step" in words
    assert "currentColor" in svg and "#000000" not in svg and "#ffffff" not in svg and "#010203" not in svg
    assert root.get("width") is None and root.get("viewBox")


@pytest.mark.parametrize("plot", [loss_plot, lr_plot, speed_plot])
def test_nothing_to_plot(plot):
    assert plot([]) is None
    assert plot([{"type": "train", "step": 1, "loss": None, "loss_text": "nan"}, {"type": "eval"}, {}]) is None


def test_the_same_records_give_the_same_svg():
    assert loss_plot(train_records(60)) == loss_plot(train_records(60))


def test_one_point_and_constant_values():
    record = {"type": "train", "step": 1, "loss": 0.0, "lr": 0.0, "tokens_per_second": 0.0}
    assert all(plot([record]) for plot in (loss_plot, lr_plot, speed_plot))
    assert loss_plot([{"type": "eval", "step": 5, "loss": 1.0}])


def test_a_long_run_stays_small():
    assert len(loss_plot(train_records(30_000))) < 150_000


def test_decimate_keeps_the_ends():
    points = [(step, float(step)) for step in range(10_001)]
    kept = decimate(points, 100)
    assert len(kept) == 100 and kept[0] == points[0] and kept[-1] == points[-1]
    assert decimate(points[:50], 100) == points[:50]


def test_smooth_keeps_a_straight_line_until_its_end():
    points = [(step, 100.0 - step) for step in range(90)]
    done = smooth(points)
    assert [value for _, value in done[:80]] == pytest.approx([value for _, value in points[:80]])
    assert smooth(points[:1]) == points[:1]
    assert smooth([(1, 2.0), (2, 4.0), (3, 6.0)])[-1] == (3, 5.0)
