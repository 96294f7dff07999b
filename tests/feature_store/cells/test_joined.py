"""Several files as one data set: cells follow each other, genes are the union, and what cannot be joined is refused."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import polars as pl
import pytest
from cell_tables import written_cells
from scipy import sparse

from feature_store.cells import CSRRows, open_source, read_cells, read_split_record
from feature_store.cells.splits import check_whole_units
from feature_store.errors import InputError
from feature_store.storage.commit import Run
from feature_store.storage.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


FORMS = {
    "integer": lambda ids: np.array(ids),
    "float": lambda ids: np.array(ids, dtype=float),
    "float32": lambda ids: np.array(ids, dtype=np.float32),
    "text": lambda ids: [str(i) for i in ids],
    "text of floats": lambda ids: [str(float(i)) for i in ids],
    "category of integers": lambda ids: pd.Categorical(ids),
    "category of floats": lambda ids: pd.Categorical(np.array(ids, dtype=float)),
    "category of text": lambda ids: pd.Categorical([str(i) for i in ids]),
    "nullable integer": lambda ids: pd.array(ids, dtype="Int64"),
}
"""The same donors as a file may hold them."""


@pytest.fixture
def save(tmp_path: Path, rng: np.random.Generator) -> Callable[..., Path]:
    """Write random counts of `n` cells and these genes; `log` stores their logarithms."""

    def write(name: str, genes: Sequence[str], n: int = 12, *, log: bool = False, **columns: object) -> Path:
        counts = rng.poisson(1.5, (n, len(genes))).astype(np.float32)
        ids = columns.pop("ensembl", None)
        var = pd.DataFrame({} if ids is None else {"gene_ids": ids}, index=list(genes))
        obs = pd.DataFrame(columns, index=[f"cell {i}" for i in range(n)])
        values = np.log1p(counts / 3) if log else counts
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        anndata.AnnData(sparse.csr_matrix(values), obs=obs, var=var).write_h5ad(path)
        return path

    return write


def dense(rows: CSRRows, n_genes: int) -> np.ndarray:
    return sparse.csr_array((rows.data, rows.indices, rows.indptr), shape=(len(rows.indptr) - 1, n_genes)).toarray()


def frames(*paths: Path) -> pd.DataFrame:
    """Cells x union of genes by anndata and pandas; 0 where a file has no such gene."""
    return pd.concat([anndata.read_h5ad(path).to_df() for path in paths]).fillna(0.0)


def test_rows_across_files_are_those_of_the_files_below_each_other(save: Callable[..., Path]) -> None:
    paths = save("a.h5ad", ["G1", "G2", "G3"]), save("b.h5ad", ["G3", "G4", "G1"], 5), save("c.h5ad", ["G5", "G2"], 9)
    source = open_source(paths)
    wanted = frames(*paths)
    assert source.gene_symbols == list(wanted.columns) == ["G1", "G2", "G3", "G4", "G5"]
    assert (source.n_cells, source.n_genes, source.n_genes_in_all) == (26, 5, 0)
    assert source.paths == paths
    for start, stop in ((0, 26), (0, 12), (10, 14), (11, 18), (12, 17), (17, 26), (25, 26), (12, 12), (26, 26)):
        rows = source.read_rows(start, stop)
        assert (dense(rows, 5) == wanted.to_numpy()[start:stop]).all()
        assert all((np.diff(rows.indices[a:b]) > 0).all() for a, b in zip(rows.indptr, rows.indptr[1:], strict=False))
    with pytest.raises(InputError, match=r"\[20, 27\).*\[0, 26\)"):
        source.read_rows(20, 27)


def test_scattered_cells_of_several_files_have_the_genes_of_all(save: Callable[..., Path]) -> None:
    paths = save("a.h5ad", ["G1", "G2", "G3"]), save("b.h5ad", ["G3", "G4", "G1"], 5), save("c.h5ad", ["G5", "G2"], 9)
    cells = np.array([1, 4, 11, 12, 16, 17, 25])
    assert (dense(open_source(paths).read_cells(cells), 5) == frames(*paths).to_numpy()[cells]).all()


def test_obs_of_cells_are_those_of_the_same_cells_in_every_file(save: Callable[..., Path]) -> None:
    source = open_source([save("a.h5ad", ["G1", "G2"], 12), save("b.h5ad", ["G2", "G3"], 1200)])
    columns, cells = source.obs().columns, np.array([1, 4, 11, 12, 16, 900, 1210])
    assert source.obs_of_cells(cells, columns).equals(source.obs()[cells])


def test_the_first_cells_are_the_same_number_of_cells_from_each_file(save: Callable[..., Path]) -> None:
    paths = [save(f"{i}.h5ad", ["G1", "G2"], n) for i, n in enumerate((30, 4, 30))]
    source = open_source(paths)
    rows = source.read_cells(source.first_cells(18))
    wanted = np.concatenate([frames(path).to_numpy()[:6] for path in paths])
    assert (dense(rows, 2) == wanted).all()


def test_genes_are_joined_by_ensembl_id_where_every_file_has_them(save: Callable[..., Path]) -> None:
    ids = [f"ENSG0000000000{i}" for i in range(4)]
    first = save("a.h5ad", ["OLD", "SAME"], ensembl=ids[:2])
    second = save("b.h5ad", ["NEW", "OTHER", "MORE"], ensembl=[f"{ids[0]}.7", ids[2], ids[3]])
    source = open_source([first, second])
    assert source.gene_symbols == ["OLD", "SAME", "OTHER", "MORE"]
    assert source.ensembl_ids == ids
    assert source.n_genes_in_all == 1
    assert (dense(source.read_rows(12, 24), 4)[:, 0] == frames(second)["NEW"].to_numpy()).all()


def test_genes_are_joined_by_symbol_where_a_file_has_no_ensembl_ids(save: Callable[..., Path]) -> None:
    ids = ["ENSG00000000001", "ENSG00000000002"]
    source = open_source([save("a.h5ad", ["G1", "G2"]), save("b.h5ad", ["G2", "G3"], ensembl=ids)])
    assert source.gene_symbols == ["G1", "G2", "G3"]
    assert source.ensembl_ids == ["", *ids]
    assert open_source([save("c.h5ad", ["G1", "G2"]), save("d.h5ad", ["G2"])]).ensembl_ids is None


def test_a_name_that_a_file_has_twice_stays_two_genes(save: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("a.h5ad", "b.h5ad"):
        adata = anndata.read_h5ad(save(name, ["G1", "X", "Y"]))
        adata.var = pd.DataFrame({"gene_name": ["G1", "TWICE", "TWICE"]}, index=["G1", "X", "Y"])
        adata.write_h5ad(tmp_path / name)
    source = open_source([tmp_path / "a.h5ad", tmp_path / "b.h5ad"])
    assert source.gene_symbols == ["G1", "TWICE", "TWICE"]
    wanted = np.concatenate([frames(path).to_numpy() for path in source.paths])
    assert (dense(source.read_rows(0, 24), 3) == wanted).all()


def test_joined_obs_starts_with_the_file_and_has_nulls_for_missing_columns(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    a = save("a.h5ad", ["G1"], 3, donor=["d1", "d2", "d3"], age=[1, 2, 3], dose=[1, 2, 3], file=["x", "y", "z"])
    b = save("b.h5ad", ["G1"], 2, donor=["d1", "d4"], age=[0.5, 1.5], dose=["low", "high"], only=[True, False])
    source = open_source([a, b])
    found = source.obs()
    assert found.to_dict(as_series=False) == {
        "file": ["a.h5ad"] * 3 + ["b.h5ad"] * 2,
        "donor": ["d1", "d2", "d3", "d1", "d4"],
        "age": [1.0, 2.0, 3.0, 0.5, 1.5],
        "dose": ["1", "2", "3", "low", "high"],
        "obs_file": ["x", "y", "z", None, None],
        "only": [None, None, None, True, False],
    }
    assert source.obs_names().to_list() == ["cell 0", "cell 1", "cell 2", "cell 0", "cell 1"]
    cells = written_cells(Layout(tmp_path / "store"), source, donor="donor", batch="file", dataset="both")
    assert cells["batch"].to_list() == found["file"].to_list()
    assert cells["cell_idx"].to_list() == [0, 1, 2, 3, 4]
    assert cells["cell_id"].n_unique() == 3


def test_files_of_one_name_are_named_with_their_folders(save: Callable[..., Path], tmp_path: Path) -> None:
    paths = [save(f"{folder}/cells.h5ad", ["G1"], 2) for folder in ("s1", "s2")]
    source = open_source(paths)
    assert source.obs()["file"].to_list() == ["s1/cells.h5ad"] * 2 + ["s2/cells.h5ad"] * 2


def test_a_donor_in_two_files_is_one_donor_and_in_one_split(save: Callable[..., Path], tmp_path: Path) -> None:
    donors = [f"d{i % 4}" for i in range(12)]
    source = open_source([save("a.h5ad", ["G1"], donor=donors), save("b.h5ad", ["G1"], donor=donors)])
    layout = Layout(tmp_path / "store")
    cells = written_cells(layout, source, donor="donor")
    check_whole_units(cells["split"].to_numpy(), cells["donor"])
    assert read_split_record(layout.cells_dir(cells["dataset"][0])).n_units == 4


def test_genes_are_counted_over_all_files(save: Callable[..., Path], tmp_path: Path) -> None:
    paths = save("a.h5ad", ["G1", "G2"]), save("b.h5ad", ["G2", "G3"], 5)
    layout = Layout(tmp_path / "store")
    written_cells(layout, open_source(paths), dataset="both")
    genes, wanted = read_cells(layout.genes_dir("both")), frames(*paths)
    assert genes["symbol"].to_list() == ["G1", "G2", "G3"]
    assert genes["n_cells"].to_list() == (wanted > 0).sum().tolist()
    assert np.allclose(genes["mean"].to_numpy(), wanted.mean())


def test_the_files_and_their_order_determine_the_data_set(
    save: Callable[..., Path], tmp_path: Path, folder_hashes: Callable[[Path], dict[str, str]]
) -> None:
    a, b = save("a.h5ad", ["G1", "G2"]), save("b.h5ad", ["G1", "G2"])
    layout = Layout(tmp_path / "store")
    first = written_cells(layout, open_source([a, b]))["dataset"][0]
    assert first.startswith("a-and-1-more-")
    before = folder_hashes(layout.root)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    copies = [(moved / path.name) for path in (a, b)]
    for path, copy in zip((a, b), copies, strict=True):
        copy.write_bytes(path.read_bytes())
    assert written_cells(layout, open_source(copies))["dataset"][0] == first
    assert folder_hashes(layout.root) == before
    other = open_source([b, a])
    assert other.digest != open_source([a, b]).digest
    assert written_cells(layout, other)["dataset"][0] not in (first, None)
    assert open_source([a]).digest == open_source(a).digest


def test_a_list_of_one_file_is_the_same_as_the_file(save: Callable[..., Path], tmp_path: Path) -> None:
    path = save("a.h5ad", ["G1", "G2"], donor=["x", "y", "z"] * 4)
    alone, listed = (Layout(tmp_path / name) for name in ("alone", "listed"))
    cells = written_cells(alone, open_source(path), donor="donor")
    written_cells(listed, open_source([str(path)]), donor="donor")
    dataset = cells["dataset"][0]
    assert "file" not in cells.columns
    for folder in (Layout.cells_dir, Layout.genes_dir):
        assert Run.open(folder(alone, dataset)).manifest() == Run.open(folder(listed, dataset)).manifest()


def test_each_file_may_have_its_counts_in_another_matrix(save: Callable[..., Path], tmp_path: Path) -> None:
    a, b = save("a.h5ad", ["G1", "G2"]), save("b.h5ad", ["G1", "G2"])
    adata = anndata.read_h5ad(b)
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X / 3)
    adata.write_h5ad(b)
    source = open_source([a, b])
    assert (source.matrix, source.value_kind) == ("X,layers/counts", "counts")
    again = open_source([a, b], matrix=source.matrix)
    assert (dense(again.read_rows(0, 24), 2) == dense(source.read_rows(0, 24), 2)).all()
    with pytest.raises(InputError, match=r"--matrix was 'X,X,X'.* 3 .* 2 "):
        open_source([a, b], matrix="X,X,X")
    with pytest.raises(InputError, match=r"b\.h5ad: X holds lognorm.*--matrix"):
        open_source([a, b], matrix="X")


def test_counts_and_logarithms_are_refused_together(save: Callable[..., Path]) -> None:
    paths = save("a.h5ad", ["G1"]), save("b.h5ad", ["G1"], log=True)
    with pytest.raises(InputError, match=r"a\.h5ad: X holds counts; .*b\.h5ad: X holds lognorm\); .*--matrix"):
        open_source(paths)


def test_files_without_a_gene_in_common_are_refused(save: Callable[..., Path]) -> None:
    paths = save("human.h5ad", ["CD3D", "LYZ"]), save("mouse.h5ad", ["Cd3d", "Lyz2"])
    with pytest.raises(InputError, match=r"mouse\.h5ad .*human\.h5ad: Cd3d, Lyz2, "):
        open_source(paths)


def test_the_same_cells_twice_are_refused(save: Callable[..., Path], tmp_path: Path) -> None:
    path = save("a.h5ad", ["G1"])
    with pytest.raises(InputError, match=r"a\.h5ad .*once"):
        open_source([path, tmp_path / "." / "a.h5ad"])
    copy = tmp_path / "copy.h5ad"
    copy.write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"copy\.h5ad .*a\.h5ad"):
        written_cells(Layout(tmp_path / "store"), open_source([path, copy]))
    assert not (tmp_path / "store").exists()
    with pytest.raises(InputError, match=r"\.h5ad"):
        open_source([])


def test_an_obs_column_that_no_file_has_is_refused_naming_the_files(save: Callable[..., Path], tmp_path: Path) -> None:
    source = open_source([save("a.h5ad", ["G1"], donor=["d"] * 12), save("b.h5ad", ["G1"])])
    with pytest.raises(InputError, match=r"--donor was 'doner'.*a\.h5ad, .*b\.h5ad.* file, donor.*'donor'"):
        written_cells(Layout(tmp_path / "store"), source, donor="doner")


def test_every_pass_over_the_data_reports_what_is_done(save: Callable[..., Path], tmp_path: Path) -> None:
    seen: dict[str, tuple[int, str, list[int]]] = {}

    @contextmanager
    def progress(title: str, total: int, unit: str):
        done: list[int] = []
        seen[title] = (total, unit, done)
        yield done.append

    source = open_source([save("a.h5ad", ["G1"], 9000), save("b.h5ad", ["G1"], 300)], progress=progress)
    written_cells(Layout(tmp_path / "store"), source)
    assert list(seen) == ["hash", "check values"]
    assert seen["check values"] == (9300, "cells", [4096, 8192, 9000, 9300])
    assert seen["hash"][1] == "MB"
    assert seen["hash"][2][-1] == seen["hash"][0]


def test_real_files_of_two_studies_are_one_data_set(scsae_data: Path, tmp_path: Path) -> None:
    paths = sorted(scsae_data.glob("kang18*.h5ad"))
    assert len(paths) == 2
    source = open_source(paths)
    alone = [open_source(path) for path in paths]
    assert source.n_cells == sum(one.n_cells for one in alone)
    ids = [set(one.ensembl_ids or one.gene_symbols) for one in alone]
    assert source.n_genes_in_all == len(ids[0] & ids[1])
    boundary = alone[0].n_cells
    for one, start in zip(alone, (0, boundary), strict=True):
        mine, theirs = source.read_rows(start, start + 50), one.read_rows(0, 50)
        assert mine.data.sum() == theirs.data.sum()
        names = [source.gene_symbols[i] for i in mine.indices[: mine.indptr[1]]]
        assert sorted(names) == sorted(one.gene_symbols[i] for i in theirs.indices[: theirs.indptr[1]])
    cells = written_cells(Layout(tmp_path), source, donor="donor", cell_type="cell_type")
    check_whole_units(cells["split"].to_numpy(), cells["donor"])
    assert cells.group_by("file").len().sort("file")["len"].to_list() == [one.n_cells for one in alone]
    assert cells.filter(pl.col("donor").is_null()).height == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_donor_is_one_donor_in_whatever_type_each_file_holds_it(
    save: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    ids = [1015, 7, 1256, 7, 1015, 3] * 2
    paths = [
        save(f"{i}.h5ad", ["G1"], donor=FORMS[one](ids)) for i, one in enumerate((form, "float", "category of text"))
    ]
    cells = written_cells(Layout(tmp_path / "store"), open_source(paths), donor="donor", labels=["donor"])
    assert cells["donor"].to_list() == [str(i) for i in ids] * 3
    assert cells.group_by("donor").agg(pl.col("split").n_unique())["split"].to_list() == [1] * 4


def test_truth_values_and_their_texts_are_one_label(save: Callable[..., Path], tmp_path: Path) -> None:
    a = save("a.h5ad", ["G1"], 3, treated=[True, False, True], dose=np.array([0.1, 1, 0.1], dtype=np.float32))
    b = save("b.h5ad", ["G1"], 3, treated=pd.Categorical(["True", "False", None]), dose=[0.1, 1.0, 0.5])
    c = save("c.h5ad", ["G1"], 2, treated=["true", "FALSE"])
    cells = written_cells(Layout(tmp_path / "store"), open_source([a, b, c]), labels=["treated", "dose"])
    assert cells["treated"].to_list() == ["True", "False", "True", "True", "False", None, "True", "False"]
    assert cells["dose"].to_list() == ["0.1", "1", "0.1", "0.1", "1", "0.5", None, None]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([1, 2, 3], ["1", "P2", "3"], "numbers.*'P2'"),
        ([1.0, 2.0, 3.0], ["01", "02", "03"], "numbers.*'01'"),
        ([True, False, True], ["yes", "no", "yes"], "truth values.*'yes'"),
        ([True, False, True], [1, 0, 1], "truth values.*'1'"),
    ],
)
def test_ids_that_cannot_be_compared_between_files_are_an_error_that_names_files_and_column(
    save: Callable[..., Path], tmp_path: Path, first: list[object], second: list[object], words: str
) -> None:
    source = open_source([save("a.h5ad", ["G1"], 3, who=first), save("b.h5ad", ["G1"], 3, who=second)])
    layout = Layout(tmp_path / "store")
    for option in ({"donor": "who"}, {"batch": "who"}, {"labels": ["who"]}):
        with pytest.raises(InputError, match=rf"'who'.*{words}") as caught:
            written_cells(layout, source, **option)
        assert all(word in str(caught.value) for word in ("a.h5ad", "b.h5ad", "astype(str)"))
    assert not layout.root.exists()
    assert written_cells(layout, source)["who"].dtype == pl.String or not isinstance(second[0], str)
