"""The one HTML page: where its files lie, and its text."""

from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, Template, select_autoescape

from feature_store.query.store import FeatureStore

STATIC = Path(__file__).parent / "static"
POLICY_IN_PAGE = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)
"""What a static host is not asked to send as a header."""
SHARED = ("dom", "state", "data", "colour", "axis", "scatter", "table", "features")


def title_of(store: FeatureStore) -> str:
    """The data set, as a title."""
    return store.lineage.dataset or store.layout.root.name


def index_html(store: FeatureStore) -> bytes:
    """The page of a store; all names in it are escaped."""
    return _template().render(title=title_of(store), policy=POLICY_IN_PAGE, shared=_shared()).encode()


@cache
def _shared() -> list[str]:
    """The scripts that most pages need: named in the page, they come at once and not one after the other."""
    return [f"static/js/{name}.js" for name in SHARED]


@cache
def _template() -> Template:
    loader = PackageLoader("feature_store.atlas")
    return Environment(loader=loader, autoescape=select_autoescape(default=True)).get_template("index.html")
