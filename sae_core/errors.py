"""Errors that `sae_core` raises on purpose.

SaeCoreError
├── ConfigError        an argument or option has a value that is not allowed
├── CheckpointError    a checkpoint cannot be read, or its files do not fit together
│   └── UnknownScaleError  an autoencoder takes scaled activations, and its folder does not say by how much
├── VocabularyError    a gene or token is not in the model's vocabulary
├── TokenizationError  the values of a cell cannot be turned into tokens
└── TrainingError      training cannot continue, e.g. because the loss is not finite

A message says what is wrong, the value, what is allowed and what to do next.
"""


class SaeCoreError(Exception):
    """Base of every error that `sae_core` raises on purpose."""


class ConfigError(SaeCoreError, ValueError):
    """An argument or option has a value that is not allowed."""


class CheckpointError(SaeCoreError):
    """A checkpoint cannot be read, or its files do not fit together."""


class UnknownScaleError(CheckpointError):
    """An autoencoder takes activations that were multiplied by a number which its folder does not hold."""


class VocabularyError(SaeCoreError):
    """A gene or token is not in the model's vocabulary."""


class TokenizationError(SaeCoreError):
    """The values of a cell cannot be turned into tokens."""


class TrainingError(SaeCoreError):
    """Training cannot continue."""
