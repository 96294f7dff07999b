"""A tiny data set, a tiny checkpoint, and a small Ray session; nothing lands in the user's home."""

import json
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from safetensors.torch import save_file

from pipelines.config import AssociateOptions, EncodeOptions, ExtractOptions, TrainOptions

N_CELLS, N_GENES = 72, 30
SYMBOLS = [f"GENE{i}" for i in range(N_GENES)]
ARGS = {"nlayers": 3, "nheads": 2, "embsize": 16, "d_hid": 24, "n_bins": 51, "max_seq_len": 64, "tie_break": "midpoint"}
ARGS |= {"pad_value": -2, "mask_value": -1, "input_emb_style": "continuous", "dropout": 0.2, "n_layers_cls": 3}


@pytest.fixture(scope="session")
def ray_local(tmp_path_factory):
    """Two cores of Ray on this machine, for the whole session."""
    from pipelines.cluster import ray_session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_session(num_cpus=2):
            yield


@pytest.fixture(scope="session")
def tiny_cells() -> anndata.AnnData:
    """Counts of 72 cells of 6 donors and two types; type A expresses the first ten genes more, type B the next ten."""
    rng = np.random.default_rng(0)
    kind = np.tile(["A", "B"], N_CELLS // 2)
    rate = np.full((N_CELLS, N_GENES), 0.6)
    rate[kind == "A", :10] = 4.0
    rate[kind == "B", 10:20] = 4.0
    obs = pd.DataFrame(
        {"type": kind, "donor": [f"D{i % 6}" for i in range(N_CELLS)], "batch": [f"b{i % 2}" for i in range(N_CELLS)]},
        index=[f"cell{i}" for i in range(N_CELLS)],
    )
    obs["donor"] = [f"D{i // 2 % 6}" for i in range(N_CELLS)]
    counts = sp.csr_matrix(rng.poisson(rate).astype(np.float32))
    return anndata.AnnData(X=counts, obs=obs, var=pd.DataFrame(index=SYMBOLS))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory, tiny_cells) -> Path:
    """The tiny cells as an .h5ad file."""
    file = tmp_path_factory.mktemp("data") / "tiny.h5ad"
    tiny_cells.write_h5ad(file)
    return file


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A scGPT checkpoint folder with random weights, which knows the tiny genes but two."""
    from sae_core.scfm import ScGPT, ScGPTConfig, Vocabulary
    from sae_core.scfm.scgpt import init_weights

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    tokens = (*SYMBOLS[2:], "<pad>", "<cls>", "<eoc>")
    model = ScGPT.empty(ScGPTConfig.from_args(ARGS), Vocabulary(tokens=tokens), n_tokens=len(tokens))
    init_weights(model, seed=3)
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "args.json").write_text(json.dumps(ARGS))
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return folder


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A store with every stage up to the associations, and the options that made it."""

    store: Path
    extract: ExtractOptions
    train: TrainOptions


@pytest.fixture(scope="session")
def extract_options(tiny_data, tiny_model) -> ExtractOptions:
    """Extraction of layer 1 in shards of 16 cells, exact in f32."""
    return ExtractOptions(
        data=tiny_data,
        model=str(tiny_model),
        layer=("1",),
        donor="donor",
        batch="batch",
        cell_type="type",
        shard_cells=16,
        dtype="f32",
    )


@pytest.fixture(scope="session")
def train_options() -> TrainOptions:
    """A few steps of a small SAE, without a worker process."""
    return TrainOptions(n_features=48, k=4, n_steps=60, batch_size=128, checkpoint_steps=20, num_workers=0, num_cpus=1)


@pytest.fixture(scope="session")
def chain(tmp_path_factory, ray_local, extract_options, train_options) -> Chain:
    """Every stage run once on the tiny data; read it, do not write to it."""
    from pipelines.associate import associate
    from pipelines.encode import encode
    from pipelines.extract import extract
    from pipelines.train import train

    store = tmp_path_factory.mktemp("chain") / "store"
    extract(extract_options, store)
    train(train_options, store)
    encode(EncodeOptions(), store)
    associate(AssociateOptions(), store)
    return Chain(store=store, extract=extract_options, train=train_options)
