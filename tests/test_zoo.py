"""The README's table of toy models, generated from run logs."""

import pytest

from tools.zoo import row


def test_table_row_summarises_a_log():
    line = {"n_parameters": 1_230_000, "train_images_per_second": 30.0, "epoch_time": "0:01:30"}
    first = {**line, "test_coco_eval_bbox": [0.1, 0.2, 0.3]}
    last = {**line, "train_images_per_second": 40.0, "epoch_time": "1:00:00"}
    last["test_coco_eval_bbox"] = [0.4567, 0.7, 0.3]
    name, config, *values = row("dino", [first, last]).strip("| \n").split(" | ")
    assert (name, config) == ("`dino`", "`configs/toy/dino.py`")
    assert [float(value) for value in values] == pytest.approx([1.2, 0.457, 0.7, 61.5, 35])
