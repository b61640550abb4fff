"""`dn-dino demo` in a browser."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from models import Predictor, load_detector
from models.cli import main
from util.checkpoint import save_checkpoint

CHROMIUM = shutil.which("chromium")
SECONDS = 120  # that a step may take on a busy machine


@pytest.fixture(scope="module")
def file(checkpoint: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is sure of one class, and less of another."""
    biases = torch.tensor([-5.0, -5, -5, -5, -1.5, 1])
    weights = checkpoint["model"] | {"class_embed.bias": biases}
    path = tmp_path_factory.mktemp("demo") / "shapes.pth"
    save_checkpoint(path, checkpoint | {"model": weights})
    return path


class Server:
    """`dn-dino demo` in a process of its own, which would reach other machines by `proxy` only."""

    def __init__(self, checkpoint: Path, directory: Path):
        self.proxy = socket.create_server(("127.0.0.1", 0))
        self.proxy.setblocking(False)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}/", directory / "log.txt"
        proxy = f"http://127.0.0.1:{self.proxy.getsockname()[1]}"
        proxies = {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-m", "models", "demo", str(checkpoint), "--device", "cpu"]
        command += ["--port", str(self.port), "--max_size", "0.01"]
        env = os.environ | proxies | {"GRADIO_TEMP_DIR": str(directory / "uploads")}
        # Shells have what runs in the background ignore Ctrl-C, which is inherited.
        listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        with self.log.open("w") as log:
            streams = {"stdout": log, "stderr": log}
            self.process = subprocess.Popen(command, env=env, preexec_fn=listen, **streams)

    def wait(self) -> None:
        while self.url not in self.log.read_text():
            with pytest.raises(subprocess.TimeoutExpired):  # it is running
                self.process.wait(0.2)

    def addresses(self) -> set[str]:
        """The addresses that it listens on, as the kernel writes them."""
        rows = [
            row.split()
            for kind in ("tcp", "tcp6")
            for row in Path("/proc/net", kind).read_text().splitlines()
        ]
        local = [row[1].split(":") for row in rows if row[3] == "0A"]
        return {address for address, port in local if int(port, 16) == self.port}


@pytest.fixture
def server(file: Path, tmp_path: Path) -> Iterator[Server]:
    server = Server(file, tmp_path)
    yield server
    server.process.kill()
    server.process.wait()
    server.proxy.close()


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(1000 * SECONDS)
        yield page
        browser.close()


def drawn(page: Page) -> np.ndarray:
    source = page.locator("img").last.get_attribute("src")
    with Image.open(BytesIO(page.request.get(source).body())) as picture:
        return np.asarray(picture.convert("RGB"), dtype=float)


@pytest.mark.full
@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_in_a_browser(server, page, file, toy, tmp_path):
    """A picture goes in, boxes come out; what is no picture, or too large, gives a message."""
    predictor: Predictor = load_detector(file)
    images = sorted((toy / "val2017").glob("*.jpg"))[:2]
    expect.set_options(timeout=1000 * SECONDS)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    server.wait()
    assert server.addresses() == {"0100007F"}  # 127.0.0.1
    page.goto(server.url)
    result = page.get_by_label("Result")
    upload = lambda path: page.locator("input[type=file]").first.set_input_files(path)
    clear = page.get_by_role("button", name="Clear")

    upload(images[0])
    expect(result).to_have_value(re.compile(r"\d+ objects"))
    (found,) = predictor.predict(images[0])
    assert 0 < len(found) < 20
    expect(result).to_have_value(f"{len(found)} objects")
    score = f"{found.scores[0]:.3f}".rstrip("0")
    expect(page.get_by_role("gridcell", name=score, exact=True).first).to_be_visible()
    expect(page.locator("img")).to_have_count(1)
    assert np.abs(drawn(page) - np.asarray(found.draw())).mean() < 5

    threshold = page.get_by_role("spinbutton")
    threshold.fill("0.1")
    threshold.press("Enter")
    (more,) = predictor.predict(images[0], threshold=0.1)
    assert len(more) > len(found)
    expect(result).to_have_value(f"{len(more)} objects")

    clear.click()
    expect(result).to_have_value("")
    text = tmp_path / "text.jpg"
    text.write_text("This is not a picture.")
    upload(text)
    expect(result).to_have_value(re.compile(r"^text\.jpg: cannot be read as an image"))
    expect(page.locator("img")).to_have_count(0)

    clear.click()
    large = tmp_path / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(99, 99, 3), dtype=np.uint8)).save(
        large
    )
    upload(large)
    expect(
        page.get_by_text('exceed the maximum allowed size of 10.2 Kb: "large.png"')
    ).to_be_visible()
    parts = {"files": {"name": "a.png", "mimeType": "image/png", "buffer": large.read_bytes()}}
    refused = page.request.post(f"{server.url}gradio_api/upload", multipart=parts)
    assert refused.status == 413

    upload(images[1])  # it still works
    (found,) = predictor.predict(images[1], threshold=0.1)
    expect(result).to_have_value(f"{len(found)} objects")

    assert "Traceback" not in page.content()
    assert all(url.startswith((server.url, "data:", "blob:")) for url in requests)
    with pytest.raises(BlockingIOError):
        server.proxy.accept()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(SECONDS) == 0
    assert "Traceback" not in server.log.read_text() and "Error" not in server.log.read_text()


def test_errors(file, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for options, message in (
            (["--port", str(port)], f"cannot listen on port {port} of 127.0.0.1"),
            (["--max_size", "0"], "max_size: more than 0"),
            (["--threshold", "2"], "threshold: from 0 to 1"),
        ):
            assert main(["demo", str(file), "--device", "cpu", *options]) == 2
            error = capsys.readouterr().err
            assert message in error and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "gradio", None)  # its import fails
    assert main(["demo", str(file)]) == 2
    assert "pip install dn_dino[demo]" in capsys.readouterr().err
