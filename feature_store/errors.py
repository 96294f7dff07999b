"""Errors of the store.

StoreError
├── InputError          what the user gave is wrong: file, matrix, column, value (nothing was written)
├── QueryError          a query names what does not exist
├── NotFoundError       a run or a table is not in the store
├── PlanMismatchError   a run folder holds another plan than the one asked for
├── IncompleteRunError  a run has no MANIFEST yet
├── IntegrityError      bytes on disk differ from what was committed
├── OutdatedRunError    a run was made by another version of its stage
├── BusyError           another driver is at work on the run
└── StoreWriteError     the folder cannot be written: permission denied, read-only, disk full

A message says what was wrong, the value received, what is allowed and what to type next. It holds no credentials of an
address, whatever it was made of.
"""

from feature_store.credentials import WithoutCredentials


class StoreError(WithoutCredentials):
    """Base of every error that `feature_store` raises on purpose."""


class InputError(StoreError, ValueError):
    """What the user gave is wrong; nothing was written."""


class QueryError(StoreError, ValueError):
    """A query names what does not exist."""


class NotFoundError(StoreError, LookupError):
    """A run or a table is not in the store."""


class PlanMismatchError(StoreError):
    """A run folder holds another plan than the one asked for."""


class IncompleteRunError(StoreError):
    """A run has no MANIFEST yet: it was interrupted or is still running."""


class IntegrityError(StoreError):
    """Bytes on disk differ from what was committed."""


class OutdatedRunError(StoreError):
    """A run was made by another version of its stage; running the stage again makes a new one."""


class BusyError(StoreError):
    """Another driver is at work on the run; the same command goes on from what it committed."""


class StoreWriteError(StoreError):
    """The folder cannot be written; what was committed stays, and the run resumes once this is repaired."""
