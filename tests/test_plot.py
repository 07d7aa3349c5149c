"""Figures from a metrics.jsonl, of one run and of several."""

import json
import math

import pytest

import plot
from configurator import UserError

COUNT, PUBLISHED = ("on_slope", "entered"), ("lambda1", "lambda2")


def write_run(folder, domains=("x", "y"), masks=("head",), of_masks=PUBLISHED):
    sparsity = {key: dict.fromkeys(masks, 0.5) for key in ("sparsity", "target_sparsity", *of_masks)}
    records = [{"kind": "run", "domains": domains}]
    for step in range(4):
        evaluation = (sparsity if masks else {}) | {
            "val_loss": [2.0, None],
            "ratio": [0.5, 0.5],
            "reference_ratio": [0.5, 0.5],
        }
        records.append({"kind": "eval", "step": step, "reference_loss": None if step < 2 else [1.0, None]} | evaluation)
        train = {"domain_loss": [2.5, None], "step_s": 0.1} | (sparsity if masks else {})
        records.append({"kind": "train", "step": step + 1} | train)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(folder)


def names(paths):
    return [path.name for path in paths]


def test_every_figure_is_drawn_that_the_runs_have_data_for(tmp_path):
    one, other = write_run(tmp_path / "a/prune"), write_run(tmp_path / "b/prune", ("y", "z"), ())
    assert names(plot.plot([one], tmp_path)) == ["loss.png", "mix.png", "sparsity.png", "step_time.png"]
    assert names(plot.plot([other], tmp_path)) == ["loss.png", "mix.png", "step_time.png"]
    paths = plot.plot([one, other], tmp_path / "both")
    assert len(paths) == 4 and all(path.stat().st_size > 10_000 for path in paths)


def test_several_runs_are_named_by_what_tells_them_apart(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "finish", lambda figure, axes, path: drawn.append(axes) or path)
    plot.plot([write_run(tmp_path / "a/prune"), write_run(tmp_path / "b/prune")], tmp_path)
    lines = {line.get_label(): line.get_ydata() for line in drawn[0]["x"].get_lines()}
    assert lines.keys() == {f"{run}/prune: {what}" for run in "ab" for what in ("validation", "reference")}
    assert list(lines["a/prune: validation"]) == [2.0] * 4
    assert [math.isnan(y) for y in lines["a/prune: reference"]] == [True, True, False, False]


def test_the_sparsity_figure_shows_what_the_kinds_of_masks_record(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "finish", lambda figure, axes, path: drawn.append(axes) or path)
    count = write_run(tmp_path / "count", of_masks=COUNT)
    for runs, keys in (([count], COUNT), ([count, write_run(tmp_path / "published")], COUNT + PUBLISHED)):
        drawn.clear()
        plot.plot(runs, tmp_path)
        axes = drawn[2]
        assert list(axes) == ["head", *(plot.OF_MASKS[key][0] for key in keys)]
        for key in keys:
            (line,) = axes[plot.OF_MASKS[key][0]].get_lines()
            assert list(line.get_xdata()) == ([0, 1, 2, 3] if key == "entered" else [1, 2, 3, 4])
            assert list(line.get_ydata()) == [0.5] * 4


def test_a_moving_average_keeps_the_last_value_over_a_gap():
    assert plot.smoothed([math.nan, 1.0, math.nan, 2.0])[1:] == [1.0, 1.0, 1.1]


def test_a_run_that_has_not_evaluated_is_refused(tmp_path):
    with pytest.raises(UserError, match="with an evaluation"):
        plot.plot([str(tmp_path)], tmp_path)
