"""Errors of the mathematics.

SaeCoreError
├── ConfigError        an option has a value that is not allowed
├── CheckpointError    a checkpoint folder is not what it should be: unknown family, missing or unexpected weight
├── VocabularyError    no gene of the data is known to the model
├── TokenizationError  the values cannot be tokenized: negative, not finite, counts needed
└── TrainingError      training cannot go on: a loss that is not finite

A message says what was wrong, the value received, what is allowed and what to do next.
"""


class SaeCoreError(Exception):
    """Base of every error that `sae_core` raises on purpose."""


class ConfigError(SaeCoreError, ValueError):
    """An option has a value that is not allowed."""


class CheckpointError(SaeCoreError):
    """A checkpoint folder is not what it should be."""


class VocabularyError(SaeCoreError):
    """No gene of the data is known to the model."""


class TokenizationError(SaeCoreError):
    """The values of a cell cannot be turned into tokens."""


class TrainingError(SaeCoreError):
    """Training cannot go on."""
