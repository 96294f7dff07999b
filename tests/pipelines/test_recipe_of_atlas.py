"""The recipe that the batch page of the atlas exports, downloaded by a browser, is one that `scsae run` takes."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import polars as pl
import pytest

from feature_store import FeatureStore
from feature_store.storage.layout import Layout
from pipelines.config import SteerOptions, check, load_recipe
from pipelines.steering.request import SteeringRequest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Page

N_CHOSEN = 6


@pytest.fixture
def page(chain, browser, serving) -> Iterator[Page]:
    """A browser at the atlas of the chain's store."""
    with browser.new_context(
        base_url=serving(FeatureStore.open(chain.store)), viewport={"width": 1280, "height": 800}
    ) as context:
        yield context.new_page()


def strongest(store: Path) -> tuple[float, list[int]]:
    """A threshold of cell context that N_CHOSEN features of the store pass, and these, in the order of the page."""
    features = FeatureStore.open(store).frame("features").filter(~pl.col("dead") & (pl.col("density") > 0)).collect()
    assert features.height >= 2 * N_CHOSEN
    values = features["context_effect"].sort(descending=True)
    threshold = (values[N_CHOSEN - 1] + values[N_CHOSEN]) / 2
    chosen = features.filter(pl.col("context_effect") >= threshold)
    assert chosen.height == N_CHOSEN
    return threshold, chosen.sort("batch_effect", "feature_id", descending=True)["feature_id"].to_list()


@pytest.mark.parametrize("intervention", ["ablate", "shift"])
def test_a_recipe_from_the_atlas_is_read_and_accepted_before_steering(chain, page, tmp_path, intervention):
    threshold, wanted = strongest(chain.store)
    page.goto(f"/#/batch?quad=context&y=1&x={threshold}&how={intervention}")
    page.wait_for_selector("main[data-ready]")
    with page.expect_download() as caught:
        page.get_by_role("button", name="Export as steering recipe").click()
    file = tmp_path / caught.value.suggested_filename
    caught.value.save_as(file)

    recipe = load_recipe(file)
    (options,) = recipe.steer
    assert (recipe.store, recipe.extract, recipe.associate) == (None, None, None)
    assert (options.kind, options.target, options.intervention) == ("batch", "all", intervention)
    assert list(options.feature) == wanted
    assert options.associations == FeatureStore.open(chain.store).lineage.associations

    request = SteeringRequest.of(options, Layout(chain.store))
    assert (request.task.type, request.task.intervention) == ("mix", intervention)
    assert [point.n_features for point in request.grid] == [N_CHOSEN]

    command = shlex.split(page.locator(".batch-command").inner_text())
    assert command[:4] == ["scsae", "steer", "--store", str(chain.store)]
    typed = [(name.removeprefix("--"), value) for name, value in zip(command[4::2], command[5::2], strict=True)]
    features = tuple(int(value) for name, value in typed if name == "feature")
    same = {name: value for name, value in typed if name != "feature"}
    assert check(SteerOptions, {**same, "feature": features}, "scsae steer") == options
