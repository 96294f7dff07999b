"""The pages of `make docs`: the reference is whole, tutorials run as notebooks, nothing is loaded from elsewhere."""

import re
import shutil
import subprocess
import sys

import build_site
import nbformat
import pytest
import typer.main
from notebooks import page_of, read_tutorial, run_notebook
from reference_pages import commands_page, python_page, tables_page

import scsae
from feature_store import FeatureStore
from feature_store.query.described import SQL_TABLES, described_columns
from pipelines.cli import app

COMMANDS = typer.main.get_command(app)
CONTEXT = typer.Context(COMMANDS)
SCRIPT = """# %% [markdown]
# # A page
#
# See [another](pbmc.py).

# %%
import sys

from pipelines.runtime.progress import stderr_console

print("out")
print("progress", file=sys.stderr)
stderr_console().print("more progress")
6 * 7

# %% [markdown]
# ## A figure

# %%
import matplotlib.pyplot as plt

plt.plot([1, 2]);
"""


def options_of(command, name="scsae"):
    for parameter in command.params:
        yield name, parameter
    for below, inner in getattr(command, "commands", {}).items():
        yield from options_of(inner, f"{name} {below}")


def test_the_page_of_commands_has_every_option_of_every_command():
    page = commands_page()
    sections = {one.partition("\n")[0]: one for one in re.split(r"(?m)^## ", page)[1:]}
    own = [(name, one) for name, one in options_of(COMMANDS) if name != "scsae"]
    assert len(own) > 200
    for name, parameter in own:
        flag, _ = parameter.get_help_record(CONTEXT)
        assert f"`{flag}`" in sections[name], name
        assert not parameter.opts[0].startswith("-") or parameter.opts[0] in sections[name], name


def test_the_page_of_python_has_every_public_name_and_every_look_up():
    headings = set(re.findall(r"(?m)^#+ (\S+)$", python_page()))
    assert {f"scsae.{name}" for name in scsae.__all__ if name != "plots"} <= headings
    assert {f"FeatureStore.{name}" for name in ("sql", "features_for", "describe", "to_anndata")} <= headings
    assert hasattr(FeatureStore, "describe")
    plots = {name for name in scsae.plots.__all__ if callable(getattr(scsae.plots, name))}
    assert {f"scsae.plots.{name}" for name in plots} <= headings


def test_the_page_of_tables_has_every_column_with_its_meaning():
    sections = {one.partition("\n")[0]: one for one in re.split(r"(?m)^## ", tables_page())[1:]}
    assert list(sections) == list(SQL_TABLES)
    for table in SQL_TABLES:
        for name, meaning in described_columns(table)["column", "meaning"].rows():
            assert f"| `{name}` |" in sections[table], table
            assert meaning.split("`")[0].split("|")[0][:30] in sections[table].replace("\\", "")


def test_a_tutorial_is_run_as_a_notebook_and_shows_what_it_printed_and_drew(tmp_path):
    (tmp_path / "page.py").write_text(SCRIPT)
    notebook = run_notebook(read_tutorial(tmp_path / "page.py"), tmp_path)
    nbformat.validate(notebook)
    page = page_of(notebook, "page", tmp_path)
    assert page.startswith("# A page\n\nSee [another](pbmc.md).\n")
    assert "[download it](page.ipynb)" in page
    assert "```text\nout\n```" in page
    assert "```text\n42\n```" in page
    assert "progress\n" not in page
    assert "![A figure](page_1.png)" in page
    assert (tmp_path / "page_1.png").stat().st_size > 1000


@pytest.mark.parametrize("name", build_site.TUTORIALS)
def test_every_tutorial_begins_with_a_title_and_ends_with_something_to_do_or_see(name):
    cells = read_tutorial(build_site.ROOT / "docs" / "tutorials" / f"{name}.py").cells
    assert cells[0].source.startswith("# ")
    assert [cell.cell_type for cell in cells[:2]] == ["markdown", "code"]
    assert len(cells) >= 7


def test_every_tutorial_is_listed():
    folder = build_site.ROOT / "docs" / "tutorials"
    assert {file.stem for file in folder.glob("*.py")} == set(build_site.TUTORIALS)


def test_every_page_is_in_the_list_of_contents_once(tmp_path):
    build_site.write_pages(tmp_path)
    (tmp_path / "tutorials").mkdir()
    for name in build_site.TUTORIALS:
        (tmp_path / "tutorials" / f"{name}.md").write_text("# A tutorial")
    nav = build_site.config_of(tmp_path, tmp_path / "site")["nav"]
    listed = [
        page for entry in nav for found in entry.values() for page in ([found] if isinstance(found, str) else found)
    ]
    pages = [str(page.relative_to(tmp_path)) for page in tmp_path.rglob("*.md")]
    assert sorted(listed) == sorted(pages)


def test_a_link_to_a_file_that_is_not_there_stops_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(build_site, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("[source](code.py) [gone](gone.md)")
    (tmp_path / "code.py").touch()
    with pytest.raises(build_site.BuildError, match=r"page\.md links to gone\.md"):
        build_site._with_links(page, {})
    page.write_text("[source](code.py), [itself](page.md#here) and [elsewhere](https://host/x)")
    assert build_site._with_links(page, {page: "named.md"}) == (
        "source (`code.py`), [itself](named.md#here) and [elsewhere](https://host/x)"
    )


def test_what_a_page_would_load_from_another_host_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="https://host/text"></a><link rel="canonical" href="https://me"><script src="//cdn/x.js"></script>'
        '<link rel="stylesheet" href="own.css"><img src="https://host/p.png">'
    )
    (tmp_path / "own.css").write_text("@font-face { src: url('https://fonts/f.woff2') } b { background: url(own.png) }")
    assert build_site.outside_resources(tmp_path) == ["//cdn/x.js", "https://fonts/f.woff2", "https://host/p.png"]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    assert shutil.which("mkdocs", path=str(sys.exec_prefix) + "/bin")
    script = build_site.ROOT / "docs" / "site" / "build_site.py"
    subprocess.run([sys.executable, script, "--out", tmp_path / "site", "--without-tutorials"], check=True)
    assert (tmp_path / "site" / "tables.html").exists()
