"""What an intervention is held against: chance features that fire as often, and a chance direction of the same length.

Ablating many features moves an embedding whatever they mean, and a feature that fires on every token moves it more
than one that fires on a hundredth. So the null for a set of features is a set of as many others that match them one
by one in density. The reconstruction-only null needs nothing here: it is any intervention that changes nothing, in
mode "replace".
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sae_core.errors import ConfigError


def matched_features(
    targets: Sequence[int],
    density: Float[Tensor, " feature"],
    *,
    seed: int,
    n_nearest: int = 10,
    exclude: Sequence[int] = (),
) -> list[int]:
    """One random feature for each target, drawn from the `n_nearest` in log density; none twice, no target, none dead.

    `density` is the share of tokens (or cells) on which each feature fires; `exclude` names more features to keep
    out, such as others that were found significant. The rarest targets choose first, as their neighbours are the
    fewest. Raises `ConfigError` if a target does not exist or is dead, or fewer living features are left than
    targets.
    """
    chosen = sorted(set(targets))
    unknown = sorted(feature for feature in {*chosen, *exclude} if not 0 <= feature < density.numel())
    if not chosen or unknown:
        raise ConfigError(
            f"targets {list(targets)} and exclude {list(exclude)} must name features from 0 to {density.numel() - 1}, "
            f"and at least one target; {unknown} do not exist."
        )
    dead = [feature for feature in chosen if density[feature] <= 0]
    if dead:
        raise ConfigError(f"targets {dead} never fire, so no feature matches them in density: leave them out.")
    free = density > 0
    free[torch.tensor([*chosen, *exclude])] = False
    if int(free.sum()) < len(chosen):
        raise ConfigError(
            f"{len(chosen)} targets need as many other living features, and {int(free.sum())} are left: choose fewer."
        )
    generator = torch.Generator().manual_seed(seed)
    log_density = density.double().log()
    picks = {}
    for target in sorted(chosen, key=lambda feature: float(density[feature])):
        distance = (log_density - log_density[target]).abs().where(free, torch.inf)
        nearest = distance.argsort(stable=True)[: min(n_nearest, int(free.sum()))]
        pick = int(nearest[torch.randint(nearest.numel(), (), generator=generator)])
        free[pick] = False
        picks[target] = pick
    return [picks[target] for target in targets]


def random_direction(d_model: int, *, seed: int) -> Float[Tensor, " d_model"]:
    """A unit vector drawn evenly from all directions, for `Steering(direction=...)`."""
    return functional.normalize(torch.randn(d_model, generator=torch.Generator().manual_seed(seed)), dim=0)
