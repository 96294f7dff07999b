"""`scsae demo` as a newcomer runs it: in an empty folder, then again; its answers are checked against its store."""

import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from feature_store import FeatureStore
from feature_store.storage.layout import Layout
from pipelines.verify import verify_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

B_GENES = {"CD79A", "MS4A1", "CD74", "CD79B"}
STAGES = ["activations", "saes", "codes", "associations", "steering"]
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class Place:
    """An empty folder to work in, with a home of its own."""

    here: Path
    home: Path

    @property
    def store(self):
        return self.here / "st"

    def scsae(self, *arguments):
        return subprocess.run(self.command(*arguments), **self.options, capture_output=True, check=False, timeout=800)

    def command(self, *arguments):
        return [sys.executable, "-m", "pipelines.cli", *arguments]

    @property
    def options(self):
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SCSAE_", "MLFLOW_"))}
        return {"cwd": self.here, "env": {**kept, "HOME": str(self.home)}, "text": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(here=tmp_path_factory.mktemp("demo"), home=tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def demo(place):
    done = place.scsae("demo", "--store", "st")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def again(demo, place):
    """Times of the store's files after the first run, and what the second run said."""
    before = times(place.store)
    done = place.scsae("demo", "--store", "st")
    assert done.returncode == 0, done.stdout + done.stderr
    return before, done.stdout


@pytest.fixture(scope="module")
def held_out(demo, place):
    """Cells of the test split with their codes, dense, read by Polars alone."""
    cells = pl.read_parquet(next(place.store.glob("cells/*/part-*.parquet")))
    codes = np.zeros((cells.height, 1024), dtype=np.float32)
    for part in place.store.glob("codes/*/by_cell/part-*.parquet"):
        cell, feature, value = pl.read_parquet(part).select("cell_idx", "feature_id", "value").to_numpy().T
        codes[cell.astype(int), feature.astype(int)] = value
    test = cells.filter(split="test")
    return test, codes[test["cell_idx"].to_numpy()]


def times(store):
    """Time of every file that a stage commits; MLflow's own and the plots apart."""
    files = (path for kind in (*STAGES, "cells") for path in (store / kind).rglob("*"))
    committed = (path for path in files if path.suffix in (".parquet", ".safetensors") or path.name == "MANIFEST.json")
    return {path: path.stat().st_mtime_ns for path in committed}


def table_after(text, title):
    """Rows of the first table after a line that starts with `title`."""
    lines = iter(text[text.index(title) :].splitlines())
    rows = []
    for line in lines:
        if line[:1] in ("┃", "│"):
            rows.append([cell.strip() for cell in re.split("[┃│]", line)[1:-1]])
        elif line[:1] == "└":
            break
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def query_after(text, title):
    """The SQL printed below a question."""
    lines = text[text.index(title) :].splitlines()[1:]
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if line.startswith("┏"))])


def test_the_best_b_cell_feature_reads_b_cell_genes(demo):
    best = table_after(demo, "Which features mean CD19+ B?")[0]
    assert B_GENES & set(best["top_genes"].split())


def test_the_best_b_cell_feature_is_highest_in_held_out_b_cells(demo, held_out):
    best = table_after(demo, "Which features mean CD19+ B?")[0]
    cells, codes = held_out
    own = codes[:, int(best["feature_id"])]
    means = cells.with_columns(value=own).group_by("cell_type").agg(pl.col("value").mean()).sort("value")
    assert means["cell_type"][-1] == "CD19+ B"
    auroc = roc_auc_score((cells["cell_type"] == "CD19+ B").to_numpy(), own)
    assert auroc > 0.9
    assert float(best["test_auroc"]) == pytest.approx(auroc, abs=5e-4)


def test_the_best_nk_feature_reads_cytotoxic_genes(demo):
    best = table_after(demo, "Which features mean CD56+ NK?")[0]
    assert {"NKG7", "GNLY", "GZMB", "PRF1", "CTSW", "FGFBP2"} & set(best["top_genes"].split())
    sets = table_after(demo, "Which gene sets do these match (CD56+ NK)?")
    assert "NK_CELL" in {row["gene_set"] for row in sets}


@pytest.mark.parametrize(
    "question", ["Which features mean CD19+ B?", "Which features mean CD56+ NK?", "Which features tell batches apart"]
)
def test_the_query_that_is_shown_gives_the_answer_that_is_shown(demo, place, question):
    answer = FeatureStore.open(place.store).sql(query_after(demo, question))
    assert [row["feature_id"] for row in table_after(demo, question)] == [str(i) for i in answer["feature_id"]]


def test_every_plot_that_is_named_is_a_png_with_something_on_it(demo, place):
    from matplotlib import image

    named = re.findall(r"^plot +(\S+)$", demo, flags=re.MULTILINE)
    assert len(named) >= 2
    for name in named:
        content = (place.here / name).read_bytes()
        assert content[:8] == PNG
        width, height = struct.unpack(">II", content[16:24])
        assert (min(width, height) >= 200, max(width, height) <= 4000) == (True, True), (name, width, height)
        pixels = image.imread(place.here / name)[..., :3]
        assert 0.005 < (pixels < 0.9).any(axis=2).mean() < 0.9, f"{name} is blank or black"


def test_the_verdict_on_steering_is_that_of_the_results_table(demo, place):
    sentence = r"^Steering cell_type = CD19\+ B: the effect (differs|does NOT differ) .*\((.*)\)"
    said = re.search(sentence, demo, re.MULTILINE)
    (part,) = place.store.glob("steering/*/results/part-*.parquet")
    row = pl.read_parquet(part).filter(condition="ablate", metric="target_votes").row(0, named=True)
    p = {name: row[f"p_{name.replace(' ', '_')}"] for name in ("random features", "random direction")}
    assert (said[1] == "differs") == all(value <= 0.05 for value in p.values())
    for name, value in p.items():
        assert f"p against {name} {value:.2g}" in said[2]


def test_the_sae_is_registered_as_champion(demo, place):
    done = place.scsae("models", "--store", "st", "--format", "json")
    assert done.returncode == 0, done.stderr
    models = pl.read_json(done.stdout.encode())
    assert models["name"].to_list() == ["sae-mini-layer.2"]
    assert models["alias"].to_list() == ["champion"]
    assert models["sae run"].item() == Layout(place.store).latest("saes").run


def test_every_run_is_intact(demo, place):
    layout = Layout(place.store)
    assert [verify_run(layout.latest(kind).run, place.store) for kind in STAGES] == [0] * len(STAGES)


def test_every_command_it_says_to_type_next_works(demo, place):
    lines = [line.strip() for line in demo[demo.index("Next:") :].splitlines() if line.startswith("  scsae")]
    commands = [shlex.split(line)[1:] for line in lines if "YOUR" not in line]
    assert len(commands) >= 4
    for command in commands:
        done = place.scsae(*command)
        assert (done.returncode, done.stderr) == (0, ""), command
        assert done.stdout.strip(), command


def test_the_last_line_names_the_command_that_opens_the_atlas_of_what_was_made(demo, place):
    last = demo.splitlines()[-1]
    assert last == "Look at the features in a web browser:  scsae serve --store st"
    _, *command = shlex.split(last.split(":")[1])
    with subprocess.Popen(
        place.command(*command, "--port", "0"), **place.options, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as served:
        url = re.search(r"http://\S+", served.stdout.readline())[0]
        with urllib.request.urlopen(f"{url}/data/atlas.json", timeout=60) as answer:
            atlas = json.load(answer)
        served.send_signal(signal.SIGINT)
        assert served.wait(60) == 0
        said = served.stderr.read()
    assert atlas["runs"]["associations"] == Layout(place.store).latest("associations").run
    assert atlas["n_features"] == 1024
    assert {"umap", "feature_umap", "feature_neighbour", "profile_umap", "steering_map"} <= set(atlas["tables"])
    assert said.count("making the map of") == 4


def test_the_second_run_recomputes_nothing_and_says_so(again, place):
    before, text = again
    rows = table_after(text, "What was made")
    assert [row["stage"] for row in rows] == STAGES
    assert [row["done now"] for row in rows] == ["0"] * len(STAGES)
    assert all(int(row["reused"]) > 0 for row in rows)
    assert before
    assert times(place.store) == before


def test_the_second_run_gives_the_same_answers_in_a_fraction_of_the_time(again, demo):
    _, text = again
    for question in ("Which features mean CD19+ B?", "Which gene sets do these match (CD56+ NK)?", "target_votes"):
        assert table_after(text, question) == table_after(demo, question)
    first, second = (int(re.search(r"done in (\d+) s", said)[1]) for said in (demo, text))
    assert second < first / 2
    assert second < 60


def test_nothing_was_written_outside_the_store_but_ray_and_matplotlibs_own_files(again, place):
    assert [path.name for path in place.here.iterdir()] == ["st"]
    at_home = {path.relative_to(place.home).parts[0] for path in place.home.rglob("*") if path.is_file()}
    assert at_home <= {".ray", ".cache", ".config"}


def test_the_first_example_of_the_readme_finds_the_b_cell_features(demo, place, pytestconfig):
    lines = (pytestconfig.rootpath / "README.md").read_text().splitlines()
    *statements, last = [line.removeprefix(">>> ") for line in lines if line.startswith(">>> ")]
    code = "\n".join([*statements, f"print({last}.write_csv(), end='')"]).replace("scsae-store", "st")
    done = subprocess.run([sys.executable, "-c", code], **place.options, capture_output=True, check=True)
    rows = pl.read_csv(done.stdout.encode())
    assert rows.columns == ["feature_id", "select_auroc", "auroc", "q", "top_genes"]
    assert (rows["auroc"] > 0.95).all()
    assert all(B_GENES & set(genes.split()) for genes in rows["top_genes"])
    shown = [[cell.strip() for cell in re.split("[│┆]", line)[1:-1]] for line in lines if re.match(r"│ \d", line)]
    assert len(shown) == rows.height
    for row, (_, chosen, auroc, q, genes) in zip(rows.iter_rows(named=True), shown, strict=True):
        # another processor rounds otherwise, and trains another autoencoder by a little
        assert float(chosen) == pytest.approx(row["select_auroc"], abs=0.01)
        assert float(auroc) == pytest.approx(row["auroc"], abs=0.01)
        assert 0.01 < float(q) / row["q"] < 100
        assert genes.split()[0] in row["top_genes"]
