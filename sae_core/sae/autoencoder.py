"""`SparseAutoencoder`: sparse codes of raw activations, and the reconstruction of activations from codes.

With x_n = (x - mu) / scale the normalised activation:
    pre = W_enc x_n + b_enc      z = scale * select(pre)      x_hat = z W_dec + scale * b_dec + mu
The value of a code is the length, in the units of the activation, that a feature adds along its unit direction
W_dec[f], and it is the same number before and after the normaliser is folded in. Folding uses that a rectifier and
every selector commute with a positive factor: scale * (W_enc (x - mu) / scale + b_enc) = W_enc x + (scale * b_enc -
W_enc mu). Hence
    W_enc, W_dec stay     b_enc' = scale * b_enc - W_enc mu     b_dec' = scale * b_dec + mu     theta' = scale * theta
    mu' = 0, scale' = 1
and folding a folded autoencoder changes nothing, bit for bit. Training uses the unfolded form, because learning rates
and coefficients refer to unit variance; a saved autoencoder is always folded. theta is a vector over features for
every architecture, also where all its entries are equal (BatchTopK) or unused (TopK).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from sae_core.errors import ConfigError
from sae_core.sae.architectures import architecture
from sae_core.sae.codes import SparseCodes
from sae_core.sae.config import SAEConfig
from sae_core.sae.kernels import kernel_for
from sae_core.sae.objectives import Weights

MAX_DENSE = 2**24  # pre-activations that are held in memory at once while encoding: 64 MB in float32


class SparseAutoencoder(nn.Module):
    """A dictionary of `n_features` unit directions, and the encoder that finds the sparse code of an activation."""

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    theta: Tensor
    mu: Tensor
    scale: Tensor

    def __init__(self, config: SAEConfig, *, generator: torch.Generator | None = None) -> None:
        """Random unit directions for the decoder, the same for the encoder, zero biases and no normalisation.

        `generator` None is a generator of seed 0.
        """
        super().__init__()
        self.config = config
        self.architecture = architecture(config.arch)
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        directions = functional.normalize(torch.randn(config.n_features, config.d_model, generator=generator), dim=1)
        self.W_dec = nn.Parameter(directions)
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(config.n_features))
        self.b_dec = nn.Parameter(torch.zeros(config.d_model))
        theta = torch.full((config.n_features,), self.architecture.initial_theta(config))
        if "theta" in self.architecture.learned:
            self.theta = nn.Parameter(theta)
        else:
            self.register_buffer("theta", theta)
        self.register_buffer("mu", torch.zeros(config.d_model))
        self.register_buffer("scale", torch.ones(()))

    @property
    def weights(self) -> Weights:
        """The weights, biases and thresholds."""
        return Weights(self.W_enc, self.W_dec, self.b_enc, self.b_dec, self.theta)

    def normalise(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """The normalised activation (x - mu) / scale; a `ConfigError` if x has another width than the autoencoder."""
        self.check_width(x)
        return (x - self.mu) / self.scale

    def check_width(self, x: Float[Tensor, "token _"]) -> None:
        """Raise a `ConfigError` if x has another width than the autoencoder."""
        if x.shape[1] != self.config.d_model:
            raise ConfigError(
                f"the activations have d_model = {x.shape[1]}, and the autoencoder has {self.config.d_model}: use "
                "activations of the model and site that it was trained on."
            )

    def pre_activations(self, x_n: Float[Tensor, "token d_model"]) -> Float[Tensor, "token feature"]:
        """The pre-activations W_enc x_n + b_enc of all features, from normalised activations."""
        return functional.linear(x_n, self.W_enc, self.b_enc)

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "token d_model"]) -> SparseCodes:
        """The codes of raw activations, in raw units.

        A token's code does not depend on other tokens: it holds what exceeds the threshold, or for topk the k largest
        entries of the token. At most 64 MB of dense pre-activations exist at a time.
        """
        chunk = max(1, MAX_DENSE // self.config.n_features)
        x_n = self.normalise(x)
        parts = [
            self.architecture.infer(self.pre_activations(x_n[start : start + chunk]), self.theta, self.config)
            for start in range(0, max(1, len(x_n)), chunk)
        ]
        codes = parts[0] if len(parts) == 1 else SparseCodes.concatenate(parts)
        return codes.with_value(codes.value * self.scale)

    def decode(self, codes: SparseCodes) -> Float[Tensor, "token d_model"]:
        """The reconstruction of raw activations, codes W_dec + scale * b_dec + mu.

        Raises:
            ConfigError: the codes have another number of features.
        """
        if codes.n_features != self.config.n_features:
            raise ConfigError(
                f"the codes have n_features = {codes.n_features}, and the autoencoder has {self.config.n_features}: "
                "decode codes with the autoencoder that encoded them."
            )
        return kernel_for(self.W_dec.device).decode(codes, self.W_dec) + (self.scale * self.b_dec + self.mu)

    def forward(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """The reconstruction of raw activations from their codes."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def folded(self) -> "SparseAutoencoder":
        """A copy without gradients that computes the same and has the normaliser in its weights (mu = 0, scale = 1)."""
        copy = SparseAutoencoder(self.config).to(device=self.W_enc.device, dtype=self.W_enc.dtype)
        W_enc, W_dec, b_enc, b_dec, theta = (weight.double() for weight in self.weights)
        mu, scale = self.mu.double(), self.scale.double()
        copy.W_enc.copy_(W_enc)
        copy.W_dec.copy_(W_dec)
        copy.b_enc.copy_(scale * b_enc - W_enc @ mu)
        copy.b_dec.copy_(scale * b_dec + mu)
        copy.theta.copy_(scale * theta)
        return copy.requires_grad_(False)
