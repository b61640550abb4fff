import argparse
import collections
import copy
import logging
import os
import pickle
import random
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.errors import UserError
from models.weights import LoadReport
from util.checkpoint import (
    latest_checkpoint,
    load_weights,
    read_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Net(nn.Module):
    """Like the detectors: box heads shared under several names, and frozen norms."""

    def __init__(self, classes=5):
        super().__init__()
        self.label_enc = nn.Embedding(classes + 1, 4)
        self.class_embed = nn.Linear(4, classes)
        box_head = nn.Linear(4, 4)
        self.bbox_embed = nn.ModuleList([box_head, box_head])
        self.decoder = nn.Module()
        self.decoder.bbox_embed = self.bbox_embed
        self.norm = nn.Module()
        self.norm.register_buffer("running_mean", torch.randn(4))


@pytest.fixture
def model():
    return Net()


def write(path, obj, zipped=True, **options):
    torch.save(obj, path, _use_new_zipfile_serialization=zipped, **options)
    return path


def released(model):
    """Every entry of a released checkpoint."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [11])
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 11,
        "args": argparse.Namespace(
            lr=1e-4, masks=False, scales=[480, 800], nested={"a": (1, None)}
        ),
    }


def snapshot(model):
    return copy.deepcopy(model.state_dict())


def same(state, other):
    return list(state) == list(other) and all(torch.equal(state[k], other[k]) for k in state)


def error_of(function, *args, **options):
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    return str(caught.value)


@FORMATS
def test_released_format(tmp_path, model, zipped):
    state = released(model)
    path = write(tmp_path / "released.pth", state, zipped)
    read = read_checkpoint(path)
    assert same(read["model"], state["model"])
    assert read["args"] == state["args"] and isinstance(read["args"], argparse.Namespace)
    assert read["lr_scheduler"] == state["lr_scheduler"] and read["epoch"] == 11
    other = Net()
    torch.optim.AdamW(other.parameters()).load_state_dict(read["optimizer"])
    load_weights(other, path)
    assert same(other.state_dict(), state["model"])


def test_round_trip_and_default_permissions(tmp_path, model):
    path, state = tmp_path / "checkpoint.pth", released(model)
    save_checkpoint(path, state)
    assert same(read_checkpoint(path)["model"], state["model"])
    (tmp_path / "ordinary").touch()
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pth", "ordinary"]


def test_loaded_state_survives_overwriting_the_file(tmp_path):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, {"model": {"w": torch.ones(10_000)}})
    read = read_checkpoint(path)
    save_checkpoint(path, {"model": {"w": torch.zeros(10)}})
    assert read["model"]["w"].sum() == 10_000
    read["model"]["w"].zero_()  # a private copy: the file is unchanged
    assert read_checkpoint(path)["model"]["w"].shape == (10,)


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@FORMATS
@pytest.mark.parametrize("place", ["whole", "entry", "args", "model"])
@pytest.mark.parametrize(
    "name, attack",
    [
        ("io.open", lambda marker: Evil(open, marker, "w")),
        ("posix.system", lambda marker: Evil(os.system, f"touch '{marker}'")),
        ("exec", lambda marker: Evil(exec, f"open({marker!r}, 'w')")),
        ("getattr", lambda marker: Evil(getattr, Path(marker), "touch")),
    ],
)
def test_code_in_a_file_is_rejected(tmp_path, zipped, place, name, attack):
    marker = tmp_path / "executed"
    evil = attack(str(marker))
    state = {
        "whole": evil,
        "entry": {"model": {"w": torch.ones(2)}, "extra": [evil]},
        "args": {"model": {"w": torch.ones(2)}, "args": argparse.Namespace(device=evil)},
        "model": {"model": {"w": evil}},
    }[place]
    path = write(tmp_path / "evil.pth", state, zipped)
    for function in (read_checkpoint, lambda path: load_weights(nn.Linear(2, 2), path)):
        message = error_of(function, path)
        assert message.startswith(f"{path}: refused, nothing of it was executed: it wants {name};")
        assert "\n" not in message
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_other_pickles_is_not_executed(tmp_path, protocol):
    marker, path = tmp_path / "executed", tmp_path / "evil.pth"
    evil = Evil(os.system, f"touch '{marker}'")
    path.write_bytes(pickle.dumps(evil, protocol))
    error_of(read_checkpoint, path)
    write(path, {"model": evil}, pickle_protocol=protocol)
    assert "refused" in error_of(read_checkpoint, path)
    assert not marker.exists()


def test_namespace_is_allowed_only_while_reading(tmp_path):
    path = write(tmp_path / "a.pth", {"args": argparse.Namespace(a=1)})
    read_checkpoint(path)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_numpy_scalars_are_rejected_by_name(tmp_path):
    path = write(tmp_path / "a.pth", {"model": {}, "best": np.float64(0.5)})
    assert "multiarray.scalar" in error_of(read_checkpoint, path)


@FORMATS
def test_truncation_at_any_length(tmp_path, model, zipped):
    data = write(tmp_path / "whole.pth", released(model), zipped).read_bytes()
    path = tmp_path / "cut.pth"
    for length in [len(data) * tenth // 10 for tenth in range(10)] + [1, 2, 3, 5, len(data) - 1]:
        path.write_bytes(data[:length])
        message = error_of(read_checkpoint, path)
        assert str(path) in message and "\n" not in message


@FORMATS
def test_corrupt_bytes_raise_only_user_errors(tmp_path, model, zipped):
    data = write(tmp_path / "whole.pth", released(model), zipped).read_bytes()
    path, generator = tmp_path / "flipped.pth", random.Random(0)
    for _ in range(200):
        flipped = bytearray(data)
        for _ in range(generator.choice([1, 3])):
            flipped[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(flipped)
        try:
            read_checkpoint(path)
        except UserError as error:
            assert "\n" not in str(error)


def test_zeroed_block_in_the_weights(tmp_path):
    """As after an interrupted download: the right length, but a block of zeros."""
    path = write(tmp_path / "a.pth", {"model": {"w": torch.ones(100_000)}})
    data = bytearray(path.read_bytes())
    data[200_000:210_000] = bytes(10_000)
    path.write_bytes(data)
    assert "wrong checksum of a/data/0" in error_of(read_checkpoint, path)


def test_file_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = write(tmp_path / "a.pth", {"model": {"w": torch.ones(3)}})
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(path)["model"]["w"].sum() == 3


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "is empty"),
        (b"hello, this is text\n", "not a checkpoint"),
        (b"coco\nfoo\n.", "not a checkpoint"),
        (b"<!DOCTYPE html><html>not found</html>", "not a checkpoint"),
        (b"PK", "not a checkpoint"),
        (b"PK\x03\x04 and no more", "truncated"),
        (b"\x80\x02 and no more", "refused"),
        (pickle.dumps({"a": 1}, 2), "truncated, corrupt or not a checkpoint"),
        *((random.Random(seed).randbytes(999), ": ") for seed in range(5)),
        *((b"\x80\x02" + random.Random(seed).randbytes(999), ": ") for seed in range(5)),
        *((b"PK\x03\x04" + random.Random(seed).randbytes(999), "truncated") for seed in range(5)),
    ],
)
def test_invalid_contents(tmp_path, content, expected):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    message = error_of(read_checkpoint, path)
    assert message.startswith(f"{path}: ") and expected in message and "\n" not in message


def test_other_file_types(tmp_path):
    assert "a directory" in error_of(read_checkpoint, tmp_path)
    assert "No such file" in error_of(read_checkpoint, tmp_path / "missing.pth")
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in error_of(read_checkpoint, tmp_path / "pipe")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/readme", "hello")
    assert "not a checkpoint" in error_of(read_checkpoint, tmp_path / "a.zip")
    for obj, kind in (
        (torch.ones(2), "Tensor"),
        ([1], "list"),
        (argparse.Namespace(), "Namespace"),
    ):
        message = error_of(read_checkpoint, write(tmp_path / "a.pth", obj))
        assert f"holds a {kind}, not a dict" in message


def assert_first_intact(path):
    assert read_checkpoint(path)["epoch"] == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_disk_error_keeps_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, {"epoch": 1})

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    message = error_of(save_checkpoint, path, {"epoch": 2})
    assert message.startswith(f"{path}: checkpoint not saved: No space left on device;")
    assert_first_intact(path)


def test_partial_write_keeps_the_previous_file(tmp_path):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, {"epoch": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # acts like a full disk
    try:
        message = error_of(save_checkpoint, path, {"epoch": 2, "model": torch.ones(500_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in message and "\n" not in message
    assert_first_intact(path)


def test_unwritable_target(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    assert "No such file" in error_of(save_checkpoint, tmp_path / "gone" / "checkpoint.pth", {})
    assert "Not a directory" in error_of(save_checkpoint, tmp_path / "file" / "checkpoint.pth", {})
    assert "Is a directory" in error_of(save_checkpoint, tmp_path / "directory", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["directory", "file"]


@pytest.mark.parametrize("value", [np.float64(0.5), Path("a"), collections.defaultdict(list)])
def test_unreadable_state_is_not_saved(tmp_path, value):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises(TypeError, match=r"could not be read back: .* it wants"):
        save_checkpoint(path, {"epoch": 2, "best": value})
    assert_first_intact(path)


def test_unpicklable_state_keeps_the_previous_file(tmp_path):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_checkpoint(path, {"epoch": 2, "hook": lambda: None})
    assert_first_intact(path)


def test_temporary_file_of_a_killed_process_is_removed(tmp_path):
    (tmp_path / ".checkpoint.pth.01234567.tmp").write_bytes(b"PK\x03\x04")
    (tmp_path / ".checkpoint0001.pth.01234567.tmp").write_bytes(b"PK\x03\x04")
    assert latest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path / "checkpoint.pth", {"epoch": 1})
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [".checkpoint0001.pth.01234567.tmp", "checkpoint.pth"]


KILLED = """
import os, random, signal, sys, time
import torch
from util.checkpoint import read_checkpoint, save_checkpoint

path = sys.argv[1]
torch.set_num_threads(1)
save = lambda epoch: save_checkpoint(path, {"epoch": epoch, "w": torch.full((200_000,), epoch)})
save(0)
epochs = []
while len(epochs) < 15 or epochs[-1] == 0:  # on slow machines, until one save completes
    child = os.fork()
    if child == 0:
        epoch = read_checkpoint(path)["epoch"]
        while True:
            epoch += 1
            save(epoch)
    time.sleep(random.uniform(0.02, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    state = read_checkpoint(path)
    assert (state["w"] == state["epoch"]).all()
    epochs.append(state["epoch"])
assert epochs == sorted(epochs), epochs
"""


def test_killed_while_saving(tmp_path):
    command = [sys.executable, "-c", KILLED, tmp_path / "checkpoint.pth"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.iterdir())) <= 2  # the checkpoint and at most one temporary file


@pytest.mark.parametrize("key", ["model", "ema_model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_found_under_each_key(tmp_path, model, key, prefix):
    expected = snapshot(model)
    state = {prefix + name: value for name, value in expected.items()}
    checkpoint = {key: state, "epoch": 3} if key else state
    for source in (checkpoint, write(tmp_path / "a.pth", checkpoint)):
        other = Net()
        report = load_weights(other, source)
        assert same(other.state_dict(), expected)
        assert report == LoadReport(loaded=len(expected))


def test_wrapped_model(model):
    other = nn.DataParallel(Net())
    load_weights(other, snapshot(model))
    assert same(other.module.state_dict(), snapshot(model))


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {"w": 1}}, {1: torch.ones(2)}])
def test_dict_without_weights(tmp_path, model, content):
    assert error_of(load_weights, model, content).startswith("the state dict: holds no weights")
    path = write(tmp_path / "a.pth", content)
    assert error_of(load_weights, model, path).startswith(f"{path}: holds no weights")


def test_strict_lists_mismatches_and_keeps_the_model(tmp_path, model):
    state = snapshot(Net(classes=7))
    del state["norm.running_mean"]
    state["extra.weight"] = torch.ones(1)
    before = snapshot(model)
    path = write(tmp_path / "a.pth", {"model": state})
    message = error_of(load_weights, model, path)
    assert message.startswith(f"{path}: does not fit the model, nothing of it is used")
    assert "missing: 1\n  norm.running_mean\n" in message
    assert "unexpected: 1\n  extra.weight\n" in message
    assert "mismatched: 3\n" in message
    assert "  class_embed.weight: (7, 4) in the file, (5, 4) in the model" in message
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("number", [20, 21, 57])
def test_long_lists_are_truncated(number):
    names = [f"layer{i:02}" for i in range(number)]
    ours = nn.ParameterDict({name: torch.zeros(1) for name in names})
    wrong = nn.ParameterDict({name: torch.zeros(2) for name in names})
    others = {f"other{i:02}": torch.zeros(1) for i in range(number)}
    message = error_of(load_weights, ours, others)
    assert f"missing: {number}\n" in message and f"unexpected: {number}\n" in message
    assert "layer19" in message and "other19" in message
    assert "layer20" not in message and "other20" not in message
    assert message.count(f"... and {number - 20} more") == (2 if number > 20 else 0)
    message = error_of(load_weights, wrong, ours.state_dict())
    assert message.count("(1,) in the file, (2,) in the model") == 20
    report = load_weights(ours, others, strict=False)
    assert len(report.missing) == len(report.unexpected) == number
    assert str(report).count("\n  ... and") == (2 if number > 20 else 0)


def test_non_strict_loads_matching_weights(model):
    state, before = snapshot(Net(classes=7)), snapshot(model)
    state["extra.weight"] = torch.ones(1)
    del state["norm.running_mean"]
    report = load_weights(model, {"model": state}, strict=False)
    after = model.state_dict()
    assert report.missing == ["norm.running_mean"] and report.unexpected == ["extra.weight"]
    kept = ["label_enc.weight", "class_embed.weight", "class_embed.bias", "norm.running_mean"]
    assert [entry.split(":")[0] for entry in report.mismatched] == kept[:3]
    for name in after:
        assert torch.equal(after[name], (before if name in kept else state)[name])
    assert report.loaded == len(after) - len(kept)
    assert str(report).startswith(f"loaded: {report.loaded}\nmissing: 1\n  norm.running_mean\n")


@pytest.mark.parametrize("strict", [True, False])
def test_finetune_ignore(model, strict):
    state, before = snapshot(Net(classes=7)), snapshot(model)
    ignore = ["label_enc.weight", "class_embed"]
    report = load_weights(model, state, strict=strict, ignore=ignore)
    ignored = ["label_enc.weight", "class_embed.weight", "class_embed.bias"]
    assert report.ignored == ignored and not (report.missing or report.mismatched)
    for name, value in model.state_dict().items():
        assert torch.equal(value, (before if name in ignored else state)[name])


def test_ignoring_one_name_of_a_shared_tensor_ignores_all(model):
    before = snapshot(model)
    report = load_weights(model, snapshot(Net()), ignore=["decoder.bbox_embed.1"])
    assert len(report.ignored) == 8
    assert torch.equal(model.bbox_embed[0].weight, before["bbox_embed.0.weight"])


@pytest.mark.parametrize("kept", ["bbox_embed.0", "bbox_embed.1", "decoder.bbox_embed.1"])
def test_one_name_of_a_shared_tensor_suffices(model, kept):
    expected = snapshot(Net())
    state = {k: v for k, v in expected.items() if "bbox" not in k or k.startswith(kept)}
    report = load_weights(model, state)
    assert same(model.state_dict(), expected) and report == LoadReport(loaded=len(expected))
    for name in [name for name in state if "bbox" in name]:
        del state[name]
    message = error_of(load_weights, model, state)
    assert "missing: 8\n" in message and "decoder.bbox_embed.1.bias" in message


def test_conflicting_values_of_a_shared_tensor(model):
    state, before = snapshot(Net()), snapshot(model)
    state["bbox_embed.1.weight"] = torch.full((4, 4), torch.nan)
    message = error_of(load_weights, model, state)
    assert "bbox_embed.1.weight: not shared in the file, shared in the model" in message
    assert same(model.state_dict(), before)
    for name in state:  # equal, in separate storages, and non-finite
        state[name] = torch.full_like(state[name], torch.nan)
    load_weights(model, state)


def test_batch_norm_step_counters(model):
    state = snapshot(model)
    state["norm.num_batches_tracked"] = torch.tensor(3)
    assert not load_weights(model, state).unexpected
    norm = nn.BatchNorm1d(2)
    load_weights(norm, {**norm.state_dict(), "num_batches_tracked": torch.tensor(9)})
    assert norm.num_batches_tracked == 9


def test_half_precision_is_converted(model):
    state = {name: value.half() for name, value in snapshot(Net()).items()}
    load_weights(model, state)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[name].float())


def test_parameters_keep_their_identity(model):
    before = dict(model.named_parameters())
    load_weights(model, snapshot(Net()))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def draw():
    numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
    tensors = [torch.rand(3), torch.randn(3)]
    for device in range(torch.cuda.device_count()):
        tensors.append(torch.randn(3, device=f"cuda:{device}").cpu())
    return numbers + torch.cat(tensors).tolist()


def test_random_streams_resume_bit_exactly(tmp_path):
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draw()  # leaves a cached normal sample in Python's and numpy's generators
    save_checkpoint(tmp_path / "checkpoint.pth", {"rng": rng_state()})
    expected = [draw() for _ in range(3)]
    set_rng_state(read_checkpoint(tmp_path / "checkpoint.pth")["rng"])
    assert [draw() for _ in range(3)] == expected


def put(directory, name, modified, **state):
    path = write(directory / name, {"model": {"w": torch.ones(3)}, **state})
    os.utime(path, (modified, modified))
    return path


def test_latest_is_the_newest(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None
    put(tmp_path, "checkpoint0009.pth", 200, epoch=9)
    put(tmp_path, "checkpoint0010.pth", 100, epoch=10)
    path, state = latest_checkpoint(tmp_path)
    assert path == tmp_path / "checkpoint0009.pth" and state["epoch"] == 9
    put(tmp_path, "checkpoint.pth", 300, epoch=11)
    assert latest_checkpoint(str(tmp_path))[0].name == "checkpoint.pth"


def test_latest_breaks_ties_by_name(tmp_path):
    for name in ("checkpoint.pth", "checkpoint0003.pth", "checkpoint0012.pth"):
        put(tmp_path, name, 100)
    assert latest_checkpoint(tmp_path)[0].name == "checkpoint0012.pth"


def test_latest_skips_unusable_checkpoints(tmp_path, caplog):
    put(tmp_path, "checkpoint0001.pth", 100, epoch=1)
    cut = put(tmp_path, "checkpoint0002.pth", 100, epoch=2)
    cut.write_bytes(cut.read_bytes()[:-100])
    put(tmp_path, "checkpoint0003.pth", 2_000_000_000, epoch=3, nonfinite=True)
    (tmp_path / "checkpoint0004.pth").symlink_to(tmp_path / "absent")
    (tmp_path / "checkpoint0005.pth").mkdir()
    with caplog.at_level(logging.WARNING):
        path, state = latest_checkpoint(tmp_path)
    assert path.name == "checkpoint0001.pth" and state["epoch"] == 1
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 3 and all("skipping" in message for message in warned)
    assert any(str(cut) in message for message in warned)
    path.unlink()
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint_best.pth",
        "checkpoint_best_regular.pth",
        "checkpoint0011_beststg1.pth",
        "checkpoint_nonfinite.pth",
        "checkpoint1.pth",
        "checkpoint.pth.old",
        ".checkpoint.pth.01234567.tmp",
        "model_checkpoint.pth",
    ],
)
def test_latest_ignores_other_names(tmp_path, name):
    put(tmp_path, name, 200)
    assert latest_checkpoint(tmp_path) is None
