"""Controls for an intervention: random features of the same density, and a random direction of the same step length.

Ablating many features moves an embedding whatever they mean, and a feature that fires on every token moves it more
than a feature that fires on one token in a hundred. The control for a set of features is therefore a set of the same
size whose features match them one by one in density. The control for the reconstruction alone needs no function: it
is any intervention that changes nothing, in mode "replace".
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
    """One random feature for each target, drawn from the `n_nearest` features in log density.

    No feature is drawn twice, and neither targets nor dead features are drawn. The rarest targets are matched first,
    because they have the fewest neighbours.

    Args:
        targets: the features to match.
        density: the share of tokens (or cells) on which each feature fires.
        seed: of the draws.
        n_nearest: how many features each draw chooses from.
        exclude: further features that are not drawn, such as others that were significant.

    Raises:
        ConfigError: a target does not exist or is dead, or fewer living features are left than targets.
    """
    chosen = sorted(set(targets))
    unknown = sorted(feature for feature in {*chosen, *exclude} if not 0 <= feature < density.numel())
    if not chosen or unknown:
        raise ConfigError(
            f"targets = {list(targets)} and exclude = {list(exclude)} are not allowed: the features are 0 to "
            f"{density.numel() - 1}, {unknown} do not exist, and at least one target is needed."
        )
    dead = [feature for feature in chosen if density[feature] <= 0]
    if dead:
        raise ConfigError(f"targets {dead} never fire, so no feature matches their density: leave them out.")
    free = density > 0
    free[torch.tensor([*chosen, *exclude])] = False
    if int(free.sum()) < len(chosen):
        raise ConfigError(
            f"{len(chosen)} targets need as many other living features, and only {int(free.sum())} are left: choose "
            "fewer targets."
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
    """A unit vector drawn uniformly from all directions, for `Steering(direction=...)`."""
    return functional.normalize(torch.randn(d_model, generator=torch.Generator().manual_seed(seed)), dim=0)
