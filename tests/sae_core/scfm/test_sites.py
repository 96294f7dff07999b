from __future__ import annotations

import pytest

from sae_core.errors import ConfigError
from sae_core.scfm import Site


@pytest.mark.parametrize("text", ["embedding", "layer.0", "layer.11", "attention.2", "mlp.3"])
def test_a_site_and_its_name_are_inverse(text: str) -> None:
    assert str(Site.parse(text)) == text
    assert Site.parse(Site.parse(text)) == Site.parse(text)


@pytest.mark.parametrize("text", ["", "layer", "layer.", "layer.-1", "embedding.0", "embedding.", "head.1", "layer.x"])
def test_a_name_of_no_site_is_refused_with_the_allowed_ones(text: str) -> None:
    with pytest.raises(ConfigError, match=r"layer\.I"):
        Site.parse(text)


def test_a_site_knows_how_many_blocks_lead_to_it() -> None:
    assert [Site.parse(t).n_blocks for t in ("embedding", "attention.0", "layer.0", "mlp.2")] == [0, 1, 1, 3]
