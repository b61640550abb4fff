"""docs/denoising.md: its examples run, its table is that of the sources."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

PAGE = Path("docs/denoising.md").read_text()
EXAMPLE, CHECK = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
ROWS = re.findall(r"^\| [\w -]+ \| `(models/\w+)\.py` \| `(\w+)` \| (\d+) \|", PAGE, re.MULTILINE)


def test_examples(capsys: pytest.CaptureFixture):
    torch.manual_seed(0)
    names: dict = {}
    exec(EXAMPLE.replace("from dn_dino", "from models"), names)
    assert capsys.readouterr().out == "torch.Size([1, 1, 20, 3])\n"
    assert all(p.grad is not None for n, p in names["detector"].named_parameters())
    exec(CHECK, names)


def test_the_check_finds_a_missing_mask():
    names: dict = {}
    unmasked = EXAMPLE.replace("tgt_mask=blocked", "tgt_mask=None")
    exec(unmasked.replace("from dn_dino", "from models"), names)
    with pytest.raises(AssertionError):
        exec(CHECK, names)


def test_table_of_what_detectors_added():
    assert len(ROWS) == 7
    for file, name, lines in ROWS:
        detector = getattr(importlib.import_module(file.replace("/", ".")), name)
        source = inspect.getsource(detector)
        assert len([line for line in source.splitlines() if line.strip()]) == int(lines), name
