"""Builds the pages of the documentation into a folder that any web host serves.

python docs/site/build_site.py --out site        (`make docs` does this)

The pages are README.md, those of docs/, the model card, the tutorials, which are run, and the reference, which is made
of the program (`reference_pages`). Warnings are errors: a page that no list of contents names, a link that leads
nowhere, and anything that a browser would load from another host.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import yaml
from notebooks import page_of, read_tutorial, run_notebook
from reference_pages import commands_page, python_page, tables_page

ROOT = Path(__file__).parents[2]
TUTORIALS = ("pbmc", "own_checkpoint", "any_vectors", "type_or_gene", "steering", "scanpy", "batch", "cluster")
STYLE = Path(__file__).with_name("extra.css")
CARD = Path("sae_core/scfm/mini/MODEL_CARD.md")
GUIDES = (
    "files",
    "genes",
    "vectors",
    "exchange-saes",
    "how-to-add-a-model",
    "atlas",
    "machines",
    "cluster",
    "atlas-scale",
)
METHODS = ("method", "effects", "inputs", "circuits", "steering-metrics", "measured")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


class BuildError(Exception):
    """The pages cannot be built as they are."""


def main() -> None:
    """Build the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="folder of the site; what was in it is deleted")
    parser.add_argument("--without-tutorials", action="store_true", help="leave the tutorials out, which take minutes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        pages = Path(scratch) / "docs"
        pages.mkdir()
        tutorials = () if given.without_tutorials else TUTORIALS
        write_pages(pages, tutorials=tutorials)
        run_tutorials(pages / "tutorials", Path(scratch) / "work", tutorials)
        config = Path(scratch) / "mkdocs.yml"
        config.write_text(yaml.safe_dump(config_of(pages, given.out.resolve())))
        # the theme prints advice on other programs
        quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
        subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", config], check=True, env=quiet
        )
    if found := outside_resources(given.out):
        raise BuildError(f"pages load from other hosts: {', '.join(found)}")
    print(
        f"the documentation is in {given.out}; python -m http.server --directory {given.out} serves it, with its search"
    )


def write_pages(folder: Path, *, tutorials: tuple[str, ...] = TUTORIALS) -> None:
    """Write the pages that need no run, with links between them; BuildError for a link to a file that is not there."""
    named = {ROOT / "README.md": "index.md", ROOT / CARD: "mini-model-card.md", ROOT / "infra/README.md": "cluster.md"}
    named |= {file: file.name for file in sorted((ROOT / "docs").glob("*.md"))}
    named |= {ROOT / "docs" / "tutorials" / f"{name}.py": f"tutorials/{name}.md" for name in tutorials}
    for file, name in named.items():
        if file.suffix == ".md":
            (folder / name).write_text(_with_links(file, named))
    shutil.copyfile(STYLE, folder / STYLE.name)
    for picture in (ROOT / "docs").glob("*.png"):
        shutil.copyfile(picture, folder / picture.name)
    for name, page in {"commands": commands_page, "python": python_page, "tables": tables_page}.items():
        (folder / f"{name}.md").write_text(page())


def run_tutorials(folder: Path, work: Path, names: tuple[str, ...]) -> None:
    """Run the tutorials in one folder, in order, and write their pages and notebooks."""
    folder.mkdir()
    work.mkdir()
    for name in names:
        print(f"runs the tutorial {name}", flush=True)
        notebook = run_notebook(read_tutorial(ROOT / "docs" / "tutorials" / f"{name}.py"), work)
        (folder / f"{name}.md").write_text(page_of(notebook, name, folder))
        nbformat.write(notebook, folder / f"{name}.ipynb")


def config_of(pages: Path, out: Path) -> dict[str, object]:
    """The options of mkdocs, with the list of contents; a page of docs/ that it does not name is among the findings."""
    found = sorted(file.stem for file in pages.glob("*.md"))
    placed = {"index", "glossary", "commands", "python", "tables", "mini-model-card", *GUIDES, *METHODS}
    findings = [name for name in found if name not in placed]
    tutorials = [f"tutorials/{file.name}" for name in TUTORIALS for file in (pages / "tutorials").glob(f"{name}.md")]
    return {
        "site_name": "scsae",
        "docs_dir": str(pages),
        "site_dir": str(out),
        "use_directory_urls": False,
        "theme": {
            "name": "material",
            "font": False,
            "features": ["navigation.sections", "navigation.top", "content.code.copy", "toc.follow"],
            "palette": [
                {
                    "media": "(prefers-color-scheme: light)",
                    "scheme": "default",
                    "primary": "teal",
                    "toggle": {"icon": "material/weather-night", "name": "Dark"},
                },
                {
                    "media": "(prefers-color-scheme: dark)",
                    "scheme": "slate",
                    "primary": "teal",
                    "toggle": {"icon": "material/weather-sunny", "name": "Light"},
                },
            ],
        },
        "extra_css": [STYLE.name],
        "plugins": ["search"],
        "markdown_extensions": ["tables", "admonition", "pymdownx.superfences", {"toc": {"permalink": True}}],
        "validation": {
            "omitted_files": "warn",
            "absolute_links": "warn",
            "unrecognized_links": "warn",
            "anchors": "warn",
        },
        "nav": [
            {"Start": "index.md"},
            *([{"Tutorials": tutorials}] if tutorials else []),
            {"How to": [f"{name}.md" for name in GUIDES]},
            {"Methods": [*(f"{name}.md" for name in METHODS), "mini-model-card.md"]},
            {"Findings": [f"{name}.md" for name in findings]},
            {"Reference": ["commands.md", "python.md", "tables.md", "glossary.md"]},
        ],
    }


def _with_links(page: Path, named: dict[Path, str]) -> str:
    """The text of a page whose links lead to other pages; a link to a source file becomes its path."""

    def rewritten(found: re.Match[str]) -> str:
        is_picture, text, target = found.groups()
        file, _, heading = target.partition("#")
        if "://" in target or not file:
            return found[0]
        path = (page.parent / file).resolve()
        if not path.exists():
            raise BuildError(f"{page.relative_to(ROOT)} links to {target}, which is not there")
        if is_picture:
            return f"![{text}]({path.name})"
        if path in named:
            return f"[{text}]({named[path]}{'#' + heading if heading else ''})"
        place = str(path.relative_to(ROOT))
        return f"`{place}`" if text.strip("`") == place else f"{text} (`{place}`)"

    return _LINK.sub(rewritten, page.read_text())


class _Resources(HTMLParser):
    """Collects what a browser loads of a page: scripts, styles, pictures and frames."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take the address of a resource; a link of the text is none."""
        values = dict(attrs)
        is_loaded = tag in ("script", "img", "iframe", "source") or (
            tag == "link" and values.get("rel") not in ("canonical", "prev", "next", "alternate")
        )
        for address in (values.get("src"), values.get("href")) if is_loaded else ():
            if address and re.match(r"(?:https?:)?//", address):
                self.found.append(address)


def outside_resources(site: Path) -> list[str]:
    """The addresses on other hosts that the pages load."""
    found: set[str] = set()
    for page in site.rglob("*.html"):
        parser = _Resources()
        parser.feed(page.read_text())
        found.update(parser.found)
    for style in site.rglob("*.css"):
        found.update(re.findall(r"url\(['\"]?((?:https?:)?//[^)'\"]+)", style.read_text()))
    return sorted(found)


if __name__ == "__main__":
    main()
