"""Tables and pictures."""

import numpy as np
import pytest

from head_pruning import AttentionSite, HeadMask, HeadPruningError, UnitMap
from head_pruning.report import text_table
from head_pruning.report.tables import markdown_table


def test_text_table_lines_up():
    assert text_table(("method", "BLEU"), [("dsp", 31.5), ("ste", 7)]).splitlines() == [
        "method   BLEU",
        "------  -----",
        "dsp     31.50",
        "ste         7",
    ]


def test_markdown_table():
    assert markdown_table(("a", "b"), [(1, 2.0)]) == "| a | b |\n| --- | --- |\n| 1 | 2.00 |"


def test_pictures_are_written_whole(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from head_pruning.report.plots import plot_head_masks, plot_runs, plot_scores

    kinds = ("encoder_self", "decoder_cross", "decoder_self")
    unit_map = UnitMap(tuple(AttentionSite(k, k, k, 4, 1, k) for k in kinds))
    masks = {name: HeadMask(unit_map, np.arange(12) < count) for name, count in (("dsp", 4), ("ste", 9))}
    plot_head_masks(masks, tmp_path / "masks")
    plot_scores(
        {"dsp": [(9, 36.0), (4, 31.0)]}, tmp_path / "scores.png", dense=("dense", 38.0), score="BLEU", total=12
    )
    plot_runs({"4 of 12": {"dsp": [31.0, 32.5], "ste": [30.0]}, "9 of 12": {"dsp": [36.0]}}, tmp_path / "runs.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masks.png", "runs.png", "scores.png"]
    for path in tmp_path.iterdir():
        picture = imread(path)
        assert min(picture.shape[:2]) > 100 and picture[..., :3].std() > 0.05


def test_a_picture_is_written_where_it_is_asked_for(tmp_path):
    """Or refused; a name without an ending that says something gets one."""
    pytest.importorskip("matplotlib")
    from head_pruning.report.plots import plot_head_masks

    mask = HeadMask(UnitMap((AttentionSite("a", "encoder_self", "a", 4, 1, "a"),)), np.arange(4) < 2)
    asked = {"a": "a.png", "heads.v2": "heads.v2.png", "b.PNG": "b.PNG", "c.svg": "c.svg", "d.pdf": "d.pdf"}
    for name, written in asked.items():
        assert plot_head_masks({"dsp": mask}, tmp_path / name) == tmp_path / written
    for name in ("a.txt", "a.jpg", "a.html", "a.json", "a.svg.gz"):
        with pytest.raises(HeadPruningError, match=f"{name} is no name of a picture here; let it end in .png,"):
            plot_head_masks({"dsp": mask}, tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == set(asked.values())
    starts = {"a": b"\x89PNG", "heads.v2": b"\x89PNG", "b.PNG": b"\x89PNG", "c.svg": b"<?xml", "d.pdf": b"%PDF"}
    assert all((tmp_path / asked[name]).read_bytes().startswith(start) for name, start in starts.items())


@pytest.mark.parametrize("heads, count", [(4, 3), (12, 2)])
def test_long_titles_of_masks_do_not_run_into_each_other(tmp_path, monkeypatch, heads, count):
    pytest.importorskip("matplotlib")
    from head_pruning.report import plots

    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    unit_map = UnitMap(tuple(AttentionSite(f"l{i}", "encoder_self", f"{i}", heads, 1, f"{i}") for i in range(6)))
    mask = HeadMask(unit_map, np.ones(6 * heads, dtype=bool))
    names = [f"runs/a_folder_whose_name_is_long_and_has_no_spaces{i}" for i in range(count)]
    plots.plot_head_masks({f"{name}\nhead_sensitivity: 0.{name[-1]}": mask for name in names}, tmp_path / "x")
    drawn[0].savefig(tmp_path / "x.png")
    boxes = [panel.title.get_window_extent() for panel in drawn[0].axes]
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))
    assert all(0 <= box.x0 and box.x1 <= drawn[0].bbox.width and box.y1 <= drawn[0].bbox.height for box in boxes)
    assert names[0] in drawn[0].axes[0].get_title().replace("\n", "")
