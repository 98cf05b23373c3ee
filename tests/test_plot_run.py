"""Plots of runs: reading a log, choosing panels, and rendering curves in the right panel."""

import json
import math

import pytest
from PIL import Image
from running import load_tool

from pixel_sail.evaluation.curves import COLORS, Curve, Panel, render_panels, running_mean, size_panel
from pixel_sail.types import DataError


@pytest.fixture(scope="module")
def tool():
    return load_tool("plot_run")


def step_line(step, **values):
    line = {"step": step, "optim/lr": 1e-3, "loss/total": 3.0 / step, "loss/bce": 0.2, "seconds": 1.0 * step}
    return line | {"shapes/bce": 0.3, "groups/bce": 0.4} | values


def write_log(folder, lines, end="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + end)
    return folder


def test_an_unfinished_last_line_is_skipped(tool, tmp_path):
    run = write_log(tmp_path / "run", [step_line(1), step_line(2), step_line(3)])
    whole = (run / "log.jsonl").read_text()
    for cut in (1, 20):
        (run / "log.jsonl").write_text(whole[:-cut])
        assert list(tool.read_run(run, "run").series["loss/total"]) == [1, 2]


def test_a_run_that_began_again_counts_once(tool, tmp_path):
    first = [
        step_line(10, **{"loss/total": 9.0}),
        step_line(20, **{"loss/total": 8.0}),
        {"step": 20, "val/ciou": 0.1},
        step_line(30, **{"loss/total": 7.0}),
    ]
    again = [step_line(20, **{"loss/total": 5.0}), {"step": 20, "val/ciou": 0.2}]
    run = tool.read_run(write_log(tmp_path / "run", [*first, *again]), "run")
    assert run.series["loss/total"] == {10: 9.0, 20: 5.0}
    assert run.series["val/ciou"] == {20: 0.2}
    assert run.scores == {"val/ciou"}


def test_a_log_of_an_earlier_version_has_todays_keys(tool, tmp_path):
    old = {"step": 2, "total": 4.0, "lr/head": 1e-2, "distill/sam2": 0.5, "distill/sam2_images": 3, "shapes/bce": 0.2}
    run = tool.read_run(write_log(tmp_path / "run", [old, {"step": 2, "corridor": {"early": "total is 4"}}]), "run")
    names = ("loss/total", "optim/lr/head", "loss/distill/sam2", "data/distill/sam2_images", "shapes/bce")
    assert set(run.series) == set(names) and not run.scores
    out = ["--out", str(tmp_path / "out.png")]
    assert tool.main([str(tmp_path / "run"), "--keys", "total,distill/*,*/bce", *out]) == 0


def test_a_message_of_the_metric_bounds_does_not_stop_a_plot(tool, tmp_path):
    lines = [step_line(1), {"step": 1, "metric_bounds": {"early": "total is 3, expected 0 .. 2"}}, step_line(2)]
    run = tool.read_run(write_log(tmp_path / "run", lines), "run")
    assert list(run.series["loss/total"]) == [1, 2] and "metric_bounds" not in run.series and not run.scores


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"step": 1, "total": 2}\nnot json\n{"step": 2}\n', r"log\.jsonl:2: found no JSON"),
        ('{"total": 2}\n', r"log\.jsonl:1: .*'step'"),
        ("[1]\n", r"log\.jsonl:1: .*'step'"),
        ('{"step": 1, "total": "low"}\n', r"log\.jsonl:1: loss/total is 'low', expected a number"),
        ("", r"log\.jsonl: no finished line"),
        ('{"step": 1, "to', r"log\.jsonl: no finished line"),
    ],
)
def test_a_log_that_is_none_is_rejected_by_file_and_line(tool, tmp_path, text, named):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(DataError, match=named):
        tool.read_run(tmp_path, "run")


def test_sources_of_one_run_share_a_panel_and_keep_their_colours(tool, tmp_path):
    lines = [step_line(1, **{"words/text": 0.1, "shapes/text": 0.2}), {"step": 1, "val/ciou": 0.5}, step_line(2)]
    run = tool.read_run(write_log(tmp_path / "run", lines), "run")
    panels = tool.make_panels([run], ["loss/total", "*/bce", "*/text", "*/ciou"], smooth=3, must_exist=True)
    assert [panel.title for panel in panels] == [
        "total loss",
        "mask BCE by source",
        "text loss by source",
        "validation cIoU, val",
    ]
    total, bce, text, score = (panel.curves for panel in panels)
    assert total == (Curve(label="", xs=(1, 2), ys=(3.0, 1.5), smooth=3),)
    colors = {curve.label: curve.color for curve in (*bce, *text)}
    assert colors == {"shapes": 0, "groups": 1, "words": 2}
    assert [curve.color for curve in text if curve.label == "shapes"] == [0]
    assert score == (Curve(label="", xs=(1,), ys=(0.5,), smooth=1),)


def test_runs_differ_in_colour_and_their_sources_in_dashes(tool, tmp_path):
    runs = [
        tool.read_run(write_log(tmp_path / name, [step_line(1), step_line(2, **extra)]), name)
        for name, extra in (("a", {"perf/mfu": 0.4}), ("b", {}))
    ]
    total, mfu, bce = tool.make_panels(runs, ["loss/total", "perf/mfu", "*/bce"], smooth=1, must_exist=True)
    assert [(curve.label, curve.color, curve.pattern) for curve in total.curves] == [("a", 0, 0), ("b", 1, 0)]
    assert [(curve.label, curve.ys) for curve in mfu.curves] == [("a", (0.4,))]
    assert [(curve.label, curve.color, curve.pattern) for curve in bce.curves] == [
        ("shapes, a", 0, 0),
        ("groups, a", 1, 0),
        ("shapes, b", 0, 1),
        ("groups, b", 1, 1),
    ]
    apart = tool.make_panels(runs * 3, ["*/bce"], smooth=1, must_exist=True)
    assert [panel.title for panel in apart] == ["mask BCE, shapes", "mask BCE, groups"]


def test_a_star_matches_one_part_of_a_name(tool):
    assert tool.fits("shapes/bce", "*/bce") and tool.fits("loss/distill/sam2", "loss/distill/*")
    assert not tool.fits("shapes/distill/bce", "*/bce") and not tool.fits("loss/bce", "*/bce")
    assert tool.split_name("loss/distill/sam2") == ("", "loss/distill/sam2")
    assert tool.split_name("shapes/distill/sam2") == ("shapes", "distill/sam2")


def test_the_command_renders_and_reports_errors(tool, tmp_path, capsys):
    runs = [str(write_log(tmp_path / name, [step_line(1), step_line(2)])) for name in ("a", "b/a")]
    assert tool.main([*runs, "--keys", "total,*/bce", "--out", str(tmp_path / "new" / "both.png")]) == 0
    with Image.open(tmp_path / "new" / "both.png") as figure:
        assert figure.format == "PNG" and figure.width == 2 * 560
    assert tool.main([runs[0] + "/log.jsonl", "--smooth", "3"]) == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["curves.png", "log.jsonl"]
    assert "4 panels of 1 run(s)" in capsys.readouterr().out.splitlines()[-1]
    wrong = {
        ("--keys", "totl"): "no run logged 'totl', expected some of optim/lr, loss/total, loss/bce",
        ("--smooth", "4"): "--smooth is 4",
        (str(tmp_path / "none"),): "none: no such file",
    }
    for arguments, named in wrong.items():
        assert tool.main([runs[0], *arguments]) == 2
        assert named in capsys.readouterr().err
    assert tool.labels_of([tmp_path / "a", tmp_path / "b" / "a"]) == [str(tmp_path / "a"), str(tmp_path / "b" / "a")]


def test_running_means_are_those_counted_by_hand():
    assert running_mean([1.0, 2.0, 6.0, 4.0], 3) == [1.0, 3.0, 4.0, 4.0]
    assert running_mean([1.0, 2.0, 6.0], 1) == [1.0, 2.0, 6.0]
    gap = running_mean([1.0, math.nan, 5.0, 7.0, 0.0], 3)
    assert math.isnan(gap[1]) and gap[2] == 6.0


def lines_of(panel):
    figure = render_panels([panel], "title")
    return figure.axes[0].get_lines()


def test_curves_have_their_values_colours_and_patterns():
    rising = Curve(label="up", xs=(0, 50, 100), ys=(0.0, 1.0, 5.0), color=0, smooth=3)
    level = Curve(label="flat", xs=tuple(range(0, 101, 2)), ys=(2.0,) * 51, color=1, pattern=1)
    faint, up, flat = lines_of(Panel(title="two", curves=(rising, level)))
    assert [line.get_color() for line in (faint, up, flat)] == [COLORS[0], COLORS[0], COLORS[1]]
    assert faint.get_alpha() < 0.5 and list(faint.get_ydata()) == [0.0, 1.0, 5.0]
    assert list(up.get_ydata()) == [0.0, 2.0, 5.0] and list(up.get_xdata()) == [0, 50, 100]
    assert (up.get_linestyle(), flat.get_linestyle()) == ("-", "--")
    assert (up.get_marker(), flat.get_marker()) == ("o", "None"), "dots where there are few points"


def test_values_that_are_not_finite_leave_gaps():
    gap = Curve(label="", xs=(1, 2, 3, 4), ys=(1.0, math.nan, math.inf, 1.0))
    (line,) = lines_of(Panel(title="gap", curves=(gap,)))
    assert [math.isfinite(y) for y in line.get_ydata()] == [True, False, False, True]


def test_heights_start_at_zero_where_that_wastes_little():
    def bottom(*ys):
        panel = Panel(title="", curves=(Curve(label="", xs=tuple(range(len(ys))), ys=ys),))
        return render_panels([panel], "").axes[0].get_ylim()[0]

    assert bottom(0.5, 1.0) == 0.0
    assert bottom(0.9, 1.0) > 0.8
    assert bottom(-1.0, 1.0) < -1.0


def test_things_have_names_on_the_axis_and_no_lines_between_them():
    curve = Curve(label="seed 1", xs=(1.0, 2.0), ys=(0.3, 0.4))
    axes = render_panels([Panel(title="", curves=(curve,), x_names=("plain", "other"))], "").axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["plain", "other"]
    (line,) = axes.get_lines()
    assert line.get_linestyle() == "None" and line.get_marker() == "o"


def test_costs_over_sizes_have_the_sizes_as_ticks():
    panel = size_panel("", [1332, 2664], {"dense": [0.1, 0.4], "ours": [0.1, 0.2]}, x_label="tokens", y_label="s")
    axes = render_panels([panel], "").axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1332", "2664"]
    assert axes.get_yscale() == axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dense", "ours"]
