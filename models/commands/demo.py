"""Serve a web page to try a detector: an image goes in, boxes come out. Only this machine can open
it, unless --host says otherwise; there is no password. It loads nothing from other machines.

Examples:
  dn-dino demo checkpoint.pth
  dn-dino demo checkpoint.pth --host 0.0.0.0 --port 8000
"""

import os
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..detections import Detections
from ..errors import UserError, import_extra
from ..images import read_image
from ..predictor import Predictor
from .common import add_detector_arguments, load

FORMAT = {"type": "pil", "interactive": False, "format": "jpeg", "buttons": ["download"]}


def add_arguments(parser: ArgumentParser) -> None:
    add_detector_arguments(parser, batch_size=None)
    add = parser.add_argument
    text = "address to listen on (127.0.0.1); 0.0.0.0: every machine of the network"
    add("--host", default="127.0.0.1", metavar="ADDRESS", help=text)
    add("--port", type=int, default=7860, metavar="N", help="(7860)")
    add("--max_size", type=float, default=20, metavar="MB", help="largest file to upload (20)")
    add("--threshold", type=float, default=0.3, metavar="X", help="initial minimum score (0.3)")


def run(args: Namespace) -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import_extra("gradio", "demo")
    if args.max_size <= 0 or not 0 <= args.threshold <= 1:
        raise UserError("max_size: more than 0; threshold: from 0 to 1")
    page = make_page(load(args), Path(args.checkpoint).name, args.threshold)
    try:
        _, url, _ = page.launch(
            server_name=args.host,
            server_port=args.port,
            max_file_size=round(args.max_size * 2**20),
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
        )
    except OSError as error:
        where = f"port {args.port} of {args.host}"
        raise UserError(f"host, port: cannot listen on {where}; use another") from error
    print(f"{url} until Ctrl-C", flush=True)
    page.block_thread()


def make_page(predictor: Predictor, title: str, threshold: float) -> Any:
    """The page, a `gradio.Blocks`. An image is detected on once; moving the slider draws again."""
    gradio: Any = import_extra("gradio", "demo")

    def detect(path: str | None, threshold: float) -> tuple:
        if path is None:
            return None, *show(None, threshold)
        try:
            (found,) = predictor.predict(read_image(path), threshold=0)
        except UserError as error:
            return None, None, [], str(error).replace(path, Path(path).name)
        return found, *show(found, threshold)

    def show(found: Detections | None, threshold: float) -> tuple:
        if found is None:
            return None, [], ""
        count = int((found.scores >= threshold).sum())  # the best come first
        best: dict[str, Any] = {key: value[:count] for key, value in dict(found).items()}
        kept = replace(found, **best)
        boxes = kept.boxes.round().int().tolist()
        rows = [
            [name, round(score, 3), *box]
            for name, score, box in zip(kept.names, kept.scores.tolist(), boxes, strict=True)
        ]
        return kept.draw(), rows, f"{len(kept)} objects"

    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 600)) as page:
        gradio.Markdown(f"# {title}")
        found = gradio.State()
        with gradio.Row():
            with gradio.Column(scale=1):
                file = gradio.File(label="Image", type="filepath")
                slider = gradio.Slider(0, 1, threshold, step=0.01, label="Minimum score")
                message = gradio.Textbox(label="Result", interactive=False)
            with gradio.Column(scale=2):
                picture = gradio.Image(label="Detections", **FORMAT)
                headers = ["class", "score", "left", "top", "right", "bottom"]
                table = gradio.Dataframe(headers=headers, interactive=False)
        outputs = [picture, table, message]
        options = {"api_visibility": "private"}
        file.change(detect, [file, slider], [found, *outputs], **options)
        options |= {"trigger_mode": "always_last", "show_progress": "hidden"}
        slider.change(show, [found, slider], outputs, **options)
    return page
