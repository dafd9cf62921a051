"""Figures show the numbers of the records: positions, heights and bars are read back from the artists."""

from __future__ import annotations

import io
import math

import matplotlib.colors
import pytest
import torch

from lightning_lcnn import plots
from lightning_lcnn.plots.style import COLOURS


def record(name: str, accuracy: float = 0.9, curvature: float | None = 20.0, **more) -> dict:
    return {
        "name": name,
        "accuracy": accuracy,
        "curvature": {"margin": curvature, "loss": curvature},
        "gradient_change": {"0.05": 0.1, "0.15": 0.3, "0.1": 0.2},
        "adversarial_accuracy": {"0.05": 0.8, "0.25": 0.5},
        "adversarial_standard_error": {"0.05": 0.01, "0.25": 0.02},
        "layers": [
            {"name": "conv", "kind": "Conv2d", "slope": 4.0, "curvature": 0.0, "share": 0.0},
            {"name": "act", "kind": "CenteredSoftplus", "slope": 1.0, "curvature": 3.0, "share": 0.25},
            {"name": "act", "kind": "CenteredSoftplus", "slope": 1.0, "curvature": 9.0, "share": 0.75},
            {"name": "pool", "kind": "AvgPool2d", "slope": 0.5, "curvature": 0.0, "share": 0.0},
        ],
        "curvature_values": [0.0, 1.0, 10.0, 100.0, None],
        **more,
    }


SEEDS = [record("standard", 0.90, 10.0), record("LCNN", 0.7, 1.0), record("standard", 0.94, 30.0)]


def test_accuracy_against_curvature_shows_mean_seeds_and_spread():
    axes = plots.accuracy_against_curvature(SEEDS).axes[0]
    labelled = {line.get_label(): line.get_xydata()[0].tolist() for line in axes.lines if len(line.get_xdata()) == 1}
    assert labelled["standard"] == pytest.approx([20, 92])
    assert labelled["LCNN"] == pytest.approx([1, 70])
    seeds = next(line for line in axes.lines if len(line.get_xdata()) == 2)
    assert seeds.get_xydata().tolist() == [pytest.approx([10, 90]), pytest.approx([30, 94])]
    horizontal, vertical = (bars.get_segments()[0] for bars in axes.collections)
    assert horizontal[:, 0].tolist() == pytest.approx([20 - math.sqrt(200), 20 + math.sqrt(200)])
    assert vertical[:, 1].tolist() == pytest.approx([92 - math.sqrt(8), 92 + math.sqrt(8)])


def test_a_wide_spread_stays_on_the_logarithmic_axis():
    wide = [record("a", 0.9, value) for value in (1.0, 1.0, 100.0)]
    axes = plots.accuracy_against_curvature(wide).axes[0]
    assert axes.collections[0].get_segments()[0][0, 0] == pytest.approx(0.5)
    assert axes.get_xlim()[0] > 0


def test_methods_without_curvature_are_left_out():
    axes = plots.accuracy_against_curvature([record("a", curvature=None), record("b")]).axes[0]
    assert axes.get_legend_handles_labels()[1] == ["b"]


def test_stability_curve_starts_at_zero_and_is_sorted():
    line = plots.stability_curves([record("a")]).axes[0].lines[0]
    assert line.get_xdata().tolist() == [0, 0.05, 0.1, 0.15]
    assert line.get_ydata().tolist() == pytest.approx([0, 10, 20, 30])


def test_adversarial_curve_has_the_standard_error_of_one_seed_and_the_spread_of_several():
    one = plots.adversarial_curves([record("a")]).axes[0]
    assert one.lines[0].get_ydata().tolist() == pytest.approx([90, 80, 50])
    ends = [bar[:, 1].tolist() for bar in one.collections[0].get_segments()]
    assert ends[1:] == [pytest.approx([79, 81]), pytest.approx([48, 52])]
    other = record("a", adversarial_accuracy={"0.05": 0.6, "0.25": 0.5})
    two = plots.adversarial_curves([record("a"), other]).axes[0]
    bar = two.collections[0].get_segments()[1][:, 1]
    assert bar.tolist() == pytest.approx([70 - math.sqrt(200), 70 + math.sqrt(200)])


def test_colours_follow_the_order_of_names_in_every_figure():
    records = [record(f"method {i}") for i in range(9)]
    for draw in (plots.stability_curves, plots.adversarial_curves, plots.accuracy_against_curvature):
        lines = [line for line in draw(records).axes[0].lines if line.get_label().startswith("method")]
        assert [line.get_color() for line in lines] == [COLOURS[i % 7] for i in range(9)]
        assert len({(line.get_color(), line.get_marker()) for line in lines}) == 9


def test_layer_bars_start_at_one_and_uses_of_one_layer_are_two_bars():
    slopes = plots.layer_bars([record("a")], "slope").axes[0]
    assert [(bar.get_y(), bar.get_height()) for bar in slopes.patches] == [(1, 3), (1, -0.5)]
    shares = plots.layer_bars([record("a")], "share").axes[0]
    assert [bar.get_height() for bar in shares.patches] == [25, 75]
    assert [label.get_text() for label in shares.get_xticklabels()] == ["act", "act (2)"]


def test_an_infinite_bound_has_no_shares():
    layers = [{"name": "relu", "kind": "ReLU", "slope": 1.0, "curvature": None, "share": 1.0}]
    axes = plots.layer_bars([record("a", layers=layers), record("b")], "share").axes
    assert [ax.get_title("left") for ax in axes] == ["b"]
    assert axes[0].patches[0].get_facecolor() == matplotlib.colors.to_rgba(COLOURS[1])
    (nothing,) = plots.layer_bars([record("a", layers=layers)], "share").axes
    assert not nothing.patches
    assert nothing.texts[0].get_text() == "no finite bound"


def test_values_over_layers_names_each_method_once():
    axes = plots.values_over_layers([("a", {"x": 1.0, "y": 2.0}), ("a", {"y": 4.0}), ("b", {})], "β").axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0, 1], [1, 2]], [[1, 4]]]
    assert axes.get_legend_handles_labels()[1] == ["a"]
    with pytest.raises(ValueError, match="`values` must hold at least one value"):
        plots.values_over_layers([("a", {})], "β")


def test_training_curves_prefer_epochs_and_skip_empty_cells():
    nan = math.nan
    logged = {"step": [9, 19, 29], "epoch": [nan, 0, nan], "loss": [3.0, nan, 1.0], "val": [nan, 0.5, nan]}
    axes = plots.training_curves([("a", logged)], "loss").axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[9, 3], [29, 1]]
    assert axes.get_xlabel() == "step"
    assert plots.training_curves([("a", logged)], "val").axes[0].get_xlabel() == "epoch"
    twice = {"step": [9, 9, 19], "epoch": [0, 0, 1], "loss": [3.0, 2.0, 1.0]}
    assert plots.training_curves([("a", twice)], "loss").axes[0].get_xlabel() == "step"
    with pytest.raises(ValueError, match="`column` 'other' has no numbers in any of the 1 histories"):
        plots.training_curves([("a", logged)], "other")


def test_histogram_counts_every_finite_value():
    axes = plots.curvature_histograms([record("a"), record("b")]).axes[0]
    filled = axes.patches[:40]
    assert sum(bar.get_height() for bar in filled) == pytest.approx(100)
    assert filled[0].get_height() == pytest.approx(50)  # the zero and the smallest value
    with pytest.raises(ValueError, match="positive curvature_values, got none"):
        plots.curvature_histograms([record("a", curvature_values=[])])


def test_gradient_grid_shows_both_gradients_on_one_scale_with_their_change():
    clean = torch.zeros(2, 3, 4, 4)
    clean[:, 0, 0, 0] = 3
    noisy = clean.clone()
    noisy[1, 0, 0, 0] = 1.5
    figure = plots.gradient_grid(torch.rand(2, 3, 4, 4), {"a": (clean, noisy), "b": (clean, None)})
    grid = [axes.images[0] for axes in figure.axes]
    assert len(grid) == 8
    assert grid[4].get_array()[0, 0] == 3
    assert grid[5].get_array()[0, 0] == 1.5
    assert grid[3].get_clim() == grid[5].get_clim()
    assert [axes.get_xlabel() for axes in figure.axes[4:6]] == ["0 %", "50 %"]
    with_noise = plots.gradient_grid(torch.zeros(2, 3, 4, 4), {"a": (clean, None)}, torch.ones(2, 3, 4, 4))
    assert [axes.images[0].get_array().max() for axes in with_noise.axes] == [0, 0, 1, 1, 3, 3]
    with pytest.raises(ValueError, match="must have one shape"):
        plots.gradient_grid(torch.rand(2, 3, 4, 4), {"a": (clean[:1], None)})


def test_figures_are_drawn_and_leave_matplotlib_as_it_was():
    before = {key: matplotlib.rcParams[key] for key in ("font.size", "axes.grid", "backend", "lines.markersize")}
    for draw in (plots.accuracy_against_curvature, plots.layer_bars, plots.curvature_histograms):
        file = io.BytesIO()
        draw(SEEDS).savefig(file, format="svg")
        assert b"</svg>" in file.getvalue()
    assert {key: matplotlib.rcParams[key] for key in before} == before


@pytest.mark.parametrize("draw", [plots.stability_curves, plots.layer_bars, plots.curvature_histograms])
def test_no_records(draw):
    with pytest.raises(ValueError, match="`records` must hold at least one evaluation record"):
        draw([])
    with pytest.raises(TypeError, match="must be a list of evaluation records"):
        draw(record("a"))


def test_unknown_choices():
    with pytest.raises(ValueError, match=r"`quantity` must be one of \['share', 'slope'\], got 'beta'"):
        plots.layer_bars(SEEDS, "beta")
    with pytest.raises(ValueError, match="`output` must be one of"):
        plots.accuracy_against_curvature(SEEDS, output="logit")
