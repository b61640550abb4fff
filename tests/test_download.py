"""Checkpoints given by URL, from a real server: complete, truncated, missing."""

import functools
import http.server
import json
import socketserver
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from main import main
from models.download import download
from models.errors import UserError
from models.images import read_image, read_source
from tests.test_main import fails_with, read_log


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves and records requests; for /cut/..., half a file with its full Content-Length."""

    requests: list[str] = []

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.path.startswith("/cut/"):
            content = (Path(self.directory) / self.path.removeprefix("/cut/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        else:
            super().do_GET()

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a server of tmp_path's files; the cache is empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Handler.requests.clear()
    handler = functools.partial(Handler, directory=str(tmp_path))
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.pth"))


def test_checkpoint_from_a_url(small: list[str], tmp_path: Path, server: str, capsys):
    """For evaluation and fine-tuning; downloaded once."""
    assert main(small) == 0
    out, url = tmp_path / "out", f"{server}/out/checkpoint.pth"
    expected = read_log(out)[-1]["test_coco_eval_bbox"]
    other = [*small, "--output_dir", str(tmp_path / "other"), "--resume", url]
    capsys.readouterr()
    assert main([*other, "--eval"]) == 0
    assert f"downloading {url} to {cached(tmp_path)[0]}" in capsys.readouterr().out
    stats = json.loads((tmp_path / "other" / "eval.json").read_text())
    assert stats["test_coco_eval_bbox"] == expected
    more = ["--onecyclelr", "FALSE", "--epochs", "1"]
    pretrained = [*small, *more, "--output_dir", str(tmp_path / "third")]
    assert main([*pretrained, "--pretrain_model_path", url]) == 0
    assert Handler.requests == ["/out/checkpoint.pth"]


def test_truncated_download_is_not_kept(small: list[str], tmp_path: Path, server: str, capsys):
    (tmp_path / "checkpoint.pth").write_bytes(bytes(3 * 2**20))
    args = [*small, "--eval", "--resume", f"{server}/cut/checkpoint.pth"]
    message = f"not downloaded (cut off after {3 * 2**19} of {3 * 2**20} bytes)"
    fails_with(capsys, args, args[-1], message)
    assert cached(tmp_path) == []
    fails_with(capsys, args, message)  # it is retried
    assert len(Handler.requests) == 2


def test_download_errors_are_one_line(small, tmp_path: Path, server: str, capsys):
    args = [*small, "--eval", "--resume"]
    url = f"{server}/absent.pth"
    fails_with(capsys, [*args, url], f"{url}: not downloaded (HTTP Error 404: File not found)")
    fails_with(capsys, [*args, "http://127.0.0.1:9/x.pth"], "not downloaded", "refused")
    (tmp_path / "page.html").write_text("<html>Sign in</html>")
    fails_with(capsys, [*args, f"{server}/page.html"], "not a checkpoint")


def test_concurrent_downloads_fetch_once(tmp_path: Path, server: str):
    (tmp_path / "x.pth").write_bytes(bytes(2**20))
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(download, [f"{server}/x.pth"] * 4))
    assert len(set(paths)) == 1 and paths[0].stat().st_size == 2**20
    assert Handler.requests == ["/x.pth"]
    with pytest.raises(UserError, match=r"absent\.pth: not downloaded"):
        download(f"{server}/absent.pth")


def test_image_from_a_url(tmp_path: Path, server: str):
    Image.effect_noise((20, 10), 90).save(tmp_path / "noise.png")
    ((name, image),) = read_source(f"{server}/noise.png")
    assert name == f"{server}/noise.png"
    assert torch.equal(image, read_image(tmp_path / "noise.png"))
    with pytest.raises(UserError, match=r"absent\.png: not downloaded"):
        next(read_source(f"{server}/absent.png"))
