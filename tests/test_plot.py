"""Figures from a metrics.jsonl, of one run and of several."""

import json
import math

import pytest

import plot
from configurator import UserError


def write_run(folder, domains=("x", "y"), masks=("head",)):
    sparsity = {key: dict.fromkeys(masks, 0.5) for key in ("sparsity", "target_sparsity", "lambda1", "lambda2")}
    records = [{"kind": "run", "domains": domains}]
    for step in range(4):
        evaluation = {"val_loss": [2.0, None], "ratio": [0.5, 0.5], "reference_ratio": [0.5, 0.5]}
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


def test_a_moving_average_keeps_the_last_value_over_a_gap():
    assert plot.smoothed([math.nan, 1.0, math.nan, 2.0])[1:] == [1.0, 1.0, 1.1]


def test_a_run_that_has_not_evaluated_is_refused(tmp_path):
    with pytest.raises(UserError, match="with an evaluation"):
        plot.plot([str(tmp_path)], tmp_path)
