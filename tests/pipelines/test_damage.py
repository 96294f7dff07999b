"""Damage to any file of a store: every answer stays as it was or is an error, and `scsae verify` names the file.

The store is small and has every kind of run and of table. Each file of it is damaged in five ways, one at a time; the
default run takes a sample of the files.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from stored_bytes import hashes_of
from toy_plans import toy_plan

from feature_store import FeatureStore, Lineage
from feature_store.activations import ActivationReader
from feature_store.associations import MeasuredRun
from feature_store.cells import ExpressionReader, load_source_location, read_cells, read_split_numbers
from feature_store.codes import (
    CodesRun,
    load_cell_codes,
    load_feature_codes,
    load_token_counts,
    load_top_tokens,
    panel_firing,
)
from feature_store.errors import IntegrityError, NotFoundError, StoreError
from feature_store.query.runs import RunChain, newest_run
from feature_store.storage import commit
from feature_store.storage.layout import (
    CIRCUIT_TABLES,
    EFFECT_TABLES,
    INPUT_TABLES,
    KINDS,
    MODULE_TABLES,
    PROBE_TABLES,
    Layout,
)
from feature_store.storage.plans import (
    CircuitPlan,
    ComparisonPlan,
    EffectsPlan,
    InputsPlan,
    MapPlan,
    MatchPlan,
    ModulesPlan,
    ProbePlan,
    SAEPlan,
    SteeringResultsPlan,
)
from pipelines.associate import associate
from pipelines.config import AssociateOptions, EncodeOptions
from pipelines.encode import encode
from pipelines.extract import extract
from pipelines.inputs import load_model_location, load_stored_sae, load_token_of_gene
from pipelines.training_loop import commit_sae, create_sae_run
from pipelines.verify import forget_run, verify_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TABLE = pl.DataFrame({"feature_id": pl.Series([0, 1, 2], dtype=pl.Int32), "x": [0.5, 1.5, 2.5]})
N_FEATURES, K = 24, 4


@dataclass(frozen=True, kw_only=True)
class Store:
    """A store, its runs by kind, newest first, its tables, and its answers."""

    root: Path
    runs: dict[str, list[str]]
    tables: list[str]
    answers: dict[str, Any]

    @property
    def layout(self) -> Layout:
        return Layout(self.root)


def make_sae(layout: Layout, seed: int) -> str:
    """An SAE with random weights of the newest activations."""
    import torch

    from sae_core.sae import SAEConfig, SparseAutoencoder

    parent = commit.Run.open(newest_run(layout, "activations").path)
    config = SAEConfig(d_model=parent.plan["d_model"], n_features=N_FEATURES, k=K)
    same = {name: parent.plan[name] for name in ("dataset", "model", "model_digest", "site")}
    plan = toy_plan(SAEPlan, activations=parent.path.name, sae=config.to_dict(), train={"seed": seed}, **same)
    run = create_sae_run(layout, plan)
    sae = SparseAutoencoder(config, generator=torch.Generator().manual_seed(seed))
    commit_sae(run.path, sae, {"test_fvu": 0.5}, history=[{"step": 1.0, "mse": 2.0 + seed}])
    return run.path.name


def make_store(root: Path, options: Any) -> None:
    """Two runs of each kind that has defaults, and every optional table."""
    layout = Layout(root)
    for layer in ("0", "1"):
        extract(options.model_copy(update={"layer": (layer,)}), root)
    for seed in (0, 1):
        sae = make_sae(layout, seed)
        codes = encode(EncodeOptions(), root).run
        run = associate(AssociateOptions(), root).run
        steering = toy_plan(SteeringResultsPlan, associations=run, sae=sae, seed=seed)
        for table in ("results", "variants", "scores"):
            commit.write_table(layout.steering_dir(steering.id) / table, TABLE, steering.table(table))
        match = toy_plan(MatchPlan, saes=(sae, f"other{seed}"), method="cosine")
        rows = TABLE.with_columns(sae=pl.lit(sae))
        commit.write_table(layout.matches_dir(match.id) / "feature_match", rows, match.table("feature_match"))
        effects = toy_plan(EffectsPlan, associations=run, sae=sae)
        for table in EFFECT_TABLES:
            commit.write_table(layout.effects_dir(effects.id) / table, TABLE, effects.table(table))
        circuit = toy_plan(CircuitPlan, associations=run, sae=sae, to_sae=f"other{seed}")
        for table in CIRCUIT_TABLES:
            commit.write_table(layout.circuits_dir(circuit.id) / table, TABLE, circuit.table(table))
        inputs = toy_plan(InputsPlan, associations=run, sae=sae)
        for table in INPUT_TABLES:
            commit.write_table(layout.inputs_dir(inputs.id) / table, TABLE, inputs.table(table))
        modules = toy_plan(ModulesPlan, associations=run, sae=sae)
        for table in MODULE_TABLES:
            commit.write_table(layout.modules_dir(modules.id) / table, TABLE, modules.table(table))
        probes = toy_plan(ProbePlan, associations=run, sae=sae)
        for table in PROBE_TABLES:
            commit.write_table(layout.probes_dir(probes.id) / table, TABLE, probes.table(table))
        compared = toy_plan(ComparisonPlan, associations=run)
        for table in ("comparison", "representation"):
            commit.write_table(layout.comparisons_dir(compared.id) / table, TABLE, compared.table(table))
        made = toy_plan(MapPlan)
        maps = [layout.feature_map_dir(sae) / name for name in ("umap", "neighbours")]
        for folder in (*maps, layout.umap_dir(codes), layout.profile_map_dir(run)):
            commit.write_table(folder, TABLE, made.table("map"))


def questions(root: Path, runs: dict[str, list[str]], names: list[str]) -> dict[str, Callable[[], Any]]:
    """What is asked of a store, by name."""
    layout = Layout(root)
    codes = layout.codes_dir(runs["codes"][0])
    cells = layout.cells_dir(runs["cells"][0])
    opened: list[FeatureStore] = []

    def store() -> FeatureStore:
        # one opening serves all questions, as in a session
        if not opened:
            opened.append(FeatureStore.open(root))
        return opened[0]

    def tables() -> list[str]:
        return FeatureStore.open(root).tables()

    def frame(table: str) -> pl.DataFrame:
        return store().frame(table).collect()

    def named(run: str) -> Any:
        return FeatureStore.open(root, associations=run).lineage

    def chain(run: str) -> Any:
        found = RunChain.of(layout, run)
        return found.associations, found.codes, found.sae, found.activations

    def activations() -> list[bytes]:
        reader = ActivationReader(commit.Run.open(layout.activations_dir(runs["activations"][0])))
        return [reader.read(one.shard, one.group).act.tobytes() for one in reader.row_groups]

    def expression() -> bytes:
        run = commit.Run.open(cells / "expression")
        reader = ExpressionReader(run, np.arange(run.plan["n_cells"]))
        return reader.read(0, reader.bounds[-1]).toarray().tobytes()

    def measured() -> list[str]:
        folder = layout.associations_dir(runs["associations"][0]) / "measured"
        found = MeasuredRun.open(folder)
        return [found.read_all(table).write_json() for table in found.runs]

    def statistics() -> list[str]:
        run = CodesRun.open(codes)
        tables = [*load_token_counts(run, 0, N_FEATURES), load_top_tokens(run, 0, N_FEATURES)]
        return [*(table.write_json() for table in tables), str(panel_firing(run).tolist())]

    cells_of_all = pl.int_range(72, eager=True).to_numpy()
    sparse: dict[str, Callable[[], Any]] = {
        "cell codes": lambda: load_cell_codes(CodesRun.open(codes), cells_of_all).toarray().tobytes(),
        "feature codes": lambda: (
            load_feature_codes(CodesRun.open(codes), cells_of_all, 0, N_FEATURES).toarray().tobytes()
        ),
    }
    return {
        **{f"newest {kind}": partial(lambda kind: newest_run(layout, kind).run, kind) for kind in KINDS},
        **{f"chain of {run}": partial(chain, run) for run in runs["associations"]},
        **{f"lineage of {run}": partial(named, run) for run in runs["associations"]},
        "lineage": lambda: FeatureStore.open(root).lineage,
        "tables": tables,
        **{f"table {name}": partial(frame, name) for name in names},
        **{f"SQL {name}": partial(lambda name: store().sql(f"SELECT * FROM {name}"), name) for name in names},
        "top cells": lambda: store().top_cells(3),
        "features of a cell": lambda: store().features_of("cell7"),
        "features of a gene": lambda: store().features_for(gene="GENE5"),
        "provenance": lambda: store().provenance(),
        "facts": lambda: store().sae_facts(),
        "cells": lambda: read_cells(cells).write_json(),
        "splits": lambda: read_split_numbers(cells).tolist(),
        "model": lambda: load_model_location(commit.Run.open(layout.activations_dir(runs["activations"][0]))),
        "source": lambda: load_source_location(layout, runs["cells"][0]),
        "tokens of genes": lambda: load_token_of_gene(layout, CodesRun.open(codes)).write_json(),
        "weights": lambda: load_stored_sae(layout.saes_dir(runs["saes"][0])).W_dec.numpy().tobytes(),
        "activations": activations,
        "expression": expression,
        "measured": measured,
        "statistics": statistics,
        **sparse,
    }


def answers_of(root: Path, runs: dict[str, list[str]], names: list[str]) -> dict[str, Any]:
    """The answer to every question, or the error of the store's own that came instead; no other error is allowed."""
    found: dict[str, Any] = {}
    for name, ask in questions(root, runs, names).items():
        try:
            found[name] = ask()
        except StoreError as error:
            found[name] = error
    return found


def is_same(before: Any, after: Any) -> bool:
    if isinstance(before, pl.DataFrame):
        return isinstance(after, pl.DataFrame) and before.equals(after)
    return bool(before == after)


def says_damaged(answer: Any) -> bool:
    """Whether an answer is an error, or says of itself that something could not be read."""
    if isinstance(answer, Lineage):
        return bool(answer.unreadable)
    return isinstance(answer, StoreError) or "unreadable" in repr(answer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, module_without_actors, extract_options) -> Store:
    """The store, undamaged. A test that damages a file of it mends it again."""
    root = tmp_path_factory.mktemp("damage") / "store"
    make_store(root, extract_options)
    runs = {kind: [info.run for info in Layout(root).runs(kind)] for kind in KINDS}
    names = FeatureStore.open(root).tables()
    answers = answers_of(root, runs, names)
    assert [name for name, answer in answers.items() if says_damaged(answer)] == []
    return Store(root=root, runs=runs, tables=names, answers=answers)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flip": flip,
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "delete": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(b"\x00\xff no file of a store" * 9),
}


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def named_by_verify(store: Store, path: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether `scsae verify` of some run names the file, or the table that it is of."""
    capsys.readouterr()
    codes = [verify_run(f"{kind}/{run}", store.root) for kind, runs in store.runs.items() for run in runs]
    said = capsys.readouterr().err
    return any(codes) and (str(path) in said or str(path.parent) in said)


def check(store: Store, path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What is wrong with the answers after one file was damaged; the file is mended at the end."""
    data = path.read_bytes()
    # whoever finds a damaged part removes its marker
    markers = {marker: marker.read_bytes() for marker in path.parent.glob("part-*.json")}
    DAMAGES[damage](path)
    where = f"{damage} {path.relative_to(store.root)}"
    try:
        after = answers_of(store.root, store.runs, store.tables)
        changed = [name for name, answer in store.answers.items() if not is_same(answer, after[name])]
        faults = [f"{where}: another answer to {name}" for name in changed if not says_damaged(after[name])]
        if not named_by_verify(store, path, capsys):
            faults.append(f"{where}: verify does not name it; changed: {changed}")
        return faults
    finally:
        for marker, content in markers.items():
            marker.write_bytes(content)
        path.write_bytes(data)


def test_a_damaged_file_changes_no_answer_without_an_error_and_is_named_by_verify(whole, capsys):
    files = files_of(whole.root)
    # a file of every table and name, each damaged in one way
    kinds = {(path.parent.name if len(path.parent.name) != 12 else path.parent.parent.name, path.name): path
             for path in files}  # fmt: skip
    chosen = sorted(kinds.values())[::23]
    assert len(chosen) >= 8
    ways = list(DAMAGES)
    faults = [check(whole, path, ways[i % len(ways)], capsys) for i, path in enumerate(chosen)]
    assert "\n".join(fault for found in faults for fault in found) == ""


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_that_is_damaged_changes_no_answer_without_an_error_and_is_named_by_verify(whole, capsys, damage):
    older = {run for runs in whole.runs.values() for run in runs[1:]}
    files = [
        # of an older run, whose tables are of the same kinds, what decides which run is taken
        path for path in files_of(whole.root)
        if not older & set(path.parts) or path.name in ("plan.json", "MANIFEST.json")
    ]  # fmt: skip
    faults = [check(whole, path, damage, capsys) for path in files]
    assert "\n".join(fault for found in faults for fault in found) == ""


def test_damaged_or_deleted_files_of_one_kind_of_run_close_only_its_tables(whole):
    steering = whole.layout.steering_dir(whole.runs["steering"][1])
    for path in (steering / "results" / "plan.json", steering / "results" / "MANIFEST.json"):
        data = path.read_bytes()
        for damage in ("flip", "delete"):
            DAMAGES[damage](path)
            store = FeatureStore.open(whole.root)
            with pytest.raises(IntegrityError, match=steering.name):
                store.sql("SELECT * FROM steering")
            for name in store.tables():
                if not name.startswith("steering"):
                    assert store.frame(name).collect().equals(whole.answers[f"table {name}"])
            path.write_bytes(data)


def test_a_run_that_was_deleted_by_hand_is_named_with_what_to_type_and_that_works(whole, tmp_path, capsys):
    root = tmp_path / "store"
    shutil.copytree(whole.root, root)
    layout, (new, old) = Layout(root), whole.runs["saes"]
    shutil.rmtree(layout.saes_dir(new))
    with pytest.raises(IntegrityError, match=rf"saes/{new} was committed and is gone.*`scsae forget saes/{new} "):
        encode(EncodeOptions(), root)
    assert verify_run(new, root) == 1
    assert f"scsae forget saes/{new}" in capsys.readouterr().err
    assert encode(EncodeOptions(sae=old), root).done == 0, "another run that is named is taken"
    with pytest.raises(NotFoundError, match=f"nothing of saes/{old} is gone"):
        forget_run(old, root)
    forget_run(new, root)
    assert encode(EncodeOptions(), root).run == encode(EncodeOptions(sae=old), root).run
    assert make_sae(layout, 1) == new, "a run that is made again is on the list again"
    assert verify_run(new, root) == 0


REPAIRS: dict[str, Callable[[Path, Any], object]] = {
    "cells": lambda root, options: [extract(options, root), associate(AssociateOptions(), root)],
    "activations": lambda root, options: extract(options, root),
    "codes": lambda root, _: encode(EncodeOptions(), root),
    "associations": lambda root, _: associate(AssociateOptions(), root),
}


@pytest.mark.parametrize("kind", REPAIRS)
def test_the_stages_that_verify_names_mend_every_damaged_file(whole, extract_options, tmp_path, capsys, kind):
    root = tmp_path / "store"
    shutil.copytree(whole.root, root)
    info = newest_run(Layout(root), kind)
    files = [path for path in files_of(info.path) if not {"umap", "map"} & set(path.parts)]
    before = hashes_of(root)
    for way in range(2):
        for i, path in enumerate(files):
            # careful: what the bytes of a part follow from is its plan, which the stage supplies again
            DAMAGES["flip" if (i + way) % 2 else "delete"](path)
        assert verify_run(info.run, root) == 1
        assert {"cells": "scsae associate"}.get(kind, "scsae") in capsys.readouterr().err
        REPAIRS[kind](root, extract_options)
        assert verify_run(info.run, root) == 0
        assert hashes_of(root) == before
