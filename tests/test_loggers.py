"""--logger with the services' own packages, offline: a run, its continuation, and what is read."""

import csv
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from main import main
from tests.conftest import SMALL
from tests.test_main import fails_with, read_log
from util.loggers import PROJECT, SERVICES

ARGS = [*SMALL, "--backbone", "timm/test_resnet", "--onecyclelr", "FALSE"]
AP = "test_coco_eval_bbox/AP"


@pytest.fixture(scope="module")
def run(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The output directory of a run that was continued after its first epoch."""
    home = tmp_path_factory.mktemp("loggers")
    out = home / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_PROJECT", "mine")
        patch.setenv("MLFLOW_TRACKING_URI", f"file:{home / 'mlflow'}")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a data base takes 20 s to make
        patch.setenv("TRACKIO_DIR", str(home / "trackio"))
        args = [*ARGS, "--coco_path", str(toy), "--output_dir", str(out), "--logger", *SERVICES]
        assert main(args) == 0
        ids = (out / "loggers.json").read_text()
        assert main([*args, "--epochs", "2"]) == 0
        assert (out / "loggers.json").read_text() == ids
        yield out


def run_ids(run: Path) -> dict[str, str]:
    return json.loads((run / "loggers.json").read_text())


@pytest.fixture
def expected(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard has: {name: [(epoch, value)]}."""
    events = EventAccumulator(str(run)).Reload()
    names = events.Tags()["scalars"]
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}
    losses = [(line["epoch"], pytest.approx(line["train_loss"])) for line in read_log(run)]
    assert found["train_loss"] == losses and len(losses) == 2 and AP in found
    return {k: [(s, pytest.approx(v)) for s, v in rows] for k, rows in found.items()}


def test_csv(run: Path, expected: dict):
    with open(run / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == set(expected)
    for name, values in expected.items():
        assert [(int(row["epoch"]), float(row[name])) for row in rows] == values


def test_mlflow(run: Path, expected: dict):
    import mlflow

    client = mlflow.MlflowClient()
    (found,) = client.search_runs(["0"])
    assert found.info.run_id == run_ids(run)["mlflow"] and found.info.run_name == "out"
    assert found.info.status == "FINISHED" and found.data.params["hidden_dim"] == "32"
    for name, values in expected.items():
        history = client.get_metric_history(found.info.run_id, name)
        assert [(m.step, m.value) for m in history] == values


def test_trackio(run: Path, expected: dict):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (found,) = trackio.Api().runs(PROJECT)
    assert found.name == run_ids(run)["trackio"] and found.name.startswith("out-")
    assert found.config["hidden_dim"] == 32
    rows = SQLiteStorage.get_logs(PROJECT, found.name, run_id=found.id)
    for name, values in expected.items():
        assert [(row["step"], row[name]) for row in rows] == values


def test_wandb(run: Path, expected: dict):
    """Each part is a file to be sent with `wandb sync`, which puts those of one id together."""
    config, rows = {}, []
    for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb"), key=os.path.getmtime):
        for record in wandb_records(path):
            if record.HasField("run"):
                assert (record.run.run_id, record.run.project) == (run_ids(run)["wandb"], "mine")
                config = {
                    item.key: json.loads(item.value_json) for item in record.run.config.update
                }
            if record.HasField("history"):
                items = record.history.item
                values = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}
                rows.append((record.history.step.num, values))
    assert config["hidden_dim"] == 32 and config["epochs"] == 2
    for name, values in expected.items():
        assert [(step, row[name]) for step, row in rows] == values


def wandb_records(path: Path) -> Iterator:
    """The messages in wandb's log: 7 bytes, then blocks of 32 KB, each of records with a checksum,
    a length and whether they begin and end a message."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, message = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := -place % 2**15) and left < 7:  # the rest of a block, too short for a record
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(message)
            message = b""


def test_errors(toy: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    args = [*ARGS, "--coco_path", str(toy)]
    fails_with(capsys, [*args, "--logger", "csv"], "logger: needs --output_dir")
    args += ["--output_dir", str(tmp_path), "--logger"]
    fails_with(capsys, [*args, "csv", "wandbb"], "logger: 'wandbb'", "did you mean wandb?")
    monkeypatch.setitem(sys.modules, "wandb", None)
    fails_with(capsys, [*args, "wandb"], "logger: wandb is not installed; pip install wandb")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")
    fails_with(capsys, [*args, "mlflow"], "logger: mlflow does not start: ", "nowhere")
    assert not (tmp_path / "log.txt").exists()


def test_a_service_that_fails_does_not_end_the_training(toy: Path, tmp_path: Path, capsys):
    (tmp_path / "log.csv").mkdir()
    args = [*ARGS, "--coco_path", str(toy), "--output_dir", str(tmp_path), "--logger", "csv"]
    assert main([*args, "--debug"]) == 0
    assert "logger: csv lacks epoch 0: " in capsys.readouterr().out
    assert len(read_log(tmp_path)) == 1


def test_overwriting_forgets_the_ids(toy: Path, tmp_path: Path):
    (tmp_path / "loggers.json").write_text('{"wandb": "old"}')
    (tmp_path / "log.csv").write_text("epoch\n-5\n")
    args = [*ARGS, "--coco_path", str(toy), "--output_dir", str(tmp_path), "--logger", "csv"]
    assert main([*args, "--debug", "--overwrite"]) == 0
    assert run_ids(tmp_path) == {"csv": "log.csv"}
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 2
