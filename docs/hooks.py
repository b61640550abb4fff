"""Generates the pages that are not in this folder: every module, CONTRIBUTING.md, CHANGELOG.md."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
NO_MODULES = ("ops/setup.py", "ops/__main__.py")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {
        name.lower(): (ROOT / name).read_text() for name in ("CONTRIBUTING.md", "CHANGELOG.md")
    }
    for path in sorted([*ROOT.glob("models/**/*.py"), *ROOT.glob("ops/*.py")]):
        place = path.relative_to(ROOT)
        if str(place) not in NO_MODULES:
            page = place.with_name(place.stem.replace("__init__", "index") + ".md")
            name = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
            pages[f"api/{page}"] = f"# {name}\n\n::: {name}\n"
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for path in sorted(ROOT.glob("results/*/curves.png")):  # of docs/RESULTS.md
        place = str(path.relative_to(ROOT))
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    """Pictures outside this folder are copied into the site, where links cannot leave it."""
    return markdown.replace("](../results/", "](results/")
