"""Names of sites in other libraries: which site of ours a name means, where that is certain.

| name | site |
|---|---|
| layer.2, mlp.2, attention.2, embedding, final | the same |
| blocks.2.hook_resid_post, blocks.2.hook_mlp_out, blocks.2.hook_attn_out | layer.2, mlp.2, attention.2 |
| blocks.2.hook_resid_pre, hook_embed | layer.1, embedding |
| resid_post_layer_2, mlp_out_layer_2, attn_out_layer_2 | layer.2, mlp.2, attention.2 |
| encoder.layers.2, bert.encoder.layer.2, h.2 | layer.2 |
| layers.2.mlp, layers.2.self_attn, layers.2.attention | mlp.2, attention.2 |
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_core.scfm import Site

_KINDS = {
    "resid_post": "layer",
    "mlp_out": "mlp",
    "attn_out": "attention",
    "attention_out": "attention",
    "mlp": "mlp",
    "attn": "attention",
    "self_attn": "attention",
    "attention": "attention",
}
_OF_BLOCK = (
    re.compile(r"blocks\.(?P<index>\d+)\.hook_(?P<kind>resid_pre|resid_post|mlp_out|attn_out)"),
    re.compile(r"(?P<kind>resid_pre|resid_post|mlp_out|attn_out|attention_out)_layer_(?P<index>\d+)"),
    re.compile(r"(?:\w+\.)*(?:layers?|blocks|h)\.(?P<index>\d+)(?:\.(?P<kind>mlp|attn|self_attn|attention))?"),
)
_EMBEDDING = ("hook_embed", "blocks.0.hook_resid_pre", "resid_pre_layer_0")


def site_named(name: str) -> "Site | None":
    """Return the site that a name of another library means; None for a name that is not known here."""
    from sae_core.errors import ConfigError
    from sae_core.scfm import Site

    try:
        return Site.parse(name)
    except ConfigError:
        pass
    if name in _EMBEDDING:
        return Site(kind="embedding")
    found = next((match for pattern in _OF_BLOCK if (match := pattern.fullmatch(name))), None)
    if found is None:
        return None
    index, kind = int(found["index"]), found["kind"]
    if kind == "resid_pre":
        return Site(kind="layer", index=index - 1)
    return Site.parse(f"{_KINDS.get(kind, 'layer')}.{index}")
