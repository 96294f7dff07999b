"""The HTML page of the atlas: the folder of its files, and its text."""

from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, Template, select_autoescape

from feature_store.query.store import FeatureStore

STATIC = Path(__file__).parent / "static"
POLICY_IN_PAGE = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)
"""The content security policy as a tag of the page, because a static host sends no such header."""
SHARED = ("dom", "state", "data", "colour", "axis", "figure", "scatter", "table", "features")


def title_of(store: FeatureStore) -> str:
    """The name of the data set, as the title of the page."""
    return store.lineage.dataset or store.layout.root.name


def index_html(store: FeatureStore, *, bundled: bool = False) -> bytes:
    """The bytes of the page; all names in it are escaped. bundled: its data lie in bundles (`atlas.bundles`), and not
    at a path of their own.
    """
    page = _template().render(title=title_of(store), policy=POLICY_IN_PAGE, shared=_shared(), bundled=bundled)
    return page.encode()


@cache
def _shared() -> list[str]:
    """Paths of the scripts that most pages need; the page names them so that a browser loads them in parallel."""
    return [f"static/js/{name}.js" for name in SHARED]


@cache
def _template() -> Template:
    loader = PackageLoader("feature_store.atlas")
    return Environment(loader=loader, autoescape=select_autoescape(default=True)).get_template("index.html")
