"""Data and model together: which gene is which token, and under which name it is reported."""

import anndata
import numpy as np
import pandas as pd
import pytest

from pipelines.config import DataOptions
from pipelines.inputs import open_inputs, token_of_gene
from sae_core.scfm import load_model


@pytest.fixture
def table_of(tmp_path):
    """Names of genes -> the table of their symbols and tokens under the mini model."""

    def make(names):
        counts = np.ones((4, len(names)), dtype=np.float32)
        file = tmp_path / "cells.h5ad"
        obs = pd.DataFrame(index=[f"c{i}" for i in range(4)])
        anndata.AnnData(X=counts, obs=obs, var=pd.DataFrame(index=names)).write_h5ad(file)
        return token_of_gene(open_inputs(DataOptions(data=file)))

    return make


def test_genes_named_by_ensembl_id_get_the_models_symbols(table_of):
    table = table_of(["ENSG00000105369.12", "ENSG00000156738", "ENSG00000999999"])
    vocabulary = load_model("mini").vocabulary
    assert table["symbol"].to_list() == ["CD79A", "MS4A1", "ENSG00000999999"]
    assert table["gene_id"].to_list() == [vocabulary.id_of("CD79A"), vocabulary.id_of("MS4A1"), None]


def test_genes_named_by_symbol_keep_their_names(table_of):
    table = table_of(["CD79A", "not a gene"])
    assert table["symbol"].to_list() == ["CD79A", "not a gene"]
    assert table["gene_id"].is_null().to_list() == [False, True]
