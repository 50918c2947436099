"""Tables and pictures."""

import numpy as np
import pytest

from head_pruning import AttentionSite, HeadMask, UnitMap
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

    from head_pruning.report.plots import plot_head_masks, plot_scores

    kinds = ("encoder_self", "decoder_cross", "decoder_self")
    unit_map = UnitMap(tuple(AttentionSite(k, k, k, 4, 1, k) for k in kinds))
    masks = {name: HeadMask(unit_map, np.arange(12) < count) for name, count in (("dsp", 4), ("ste", 9))}
    plot_head_masks(masks, tmp_path / "masks")
    plot_scores(
        {"dsp": [(9, 36.0), (4, 31.0)]}, tmp_path / "scores.png", dense=("dense", 38.0), score="BLEU", total=12
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masks.png", "scores.png"]
    for path in tmp_path.iterdir():
        picture = imread(path)
        assert min(picture.shape[:2]) > 100 and picture[..., :3].std() > 0.05
