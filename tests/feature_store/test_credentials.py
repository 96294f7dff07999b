"""Credentials in addresses reach no error, no printed text and no representation."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from feature_store.credentials import is_signed, without_credentials
from feature_store.errors import InputError, NotFoundError
from feature_store.storage.addresses import RemotePath, data_path
from pipelines.config import EncodeOptions
from pipelines.errors import RunFailedError, UsageError

SIGNED = {
    "S3": "https://bucket.s3.amazonaws.com/a.h5ad?X-Amz-Algorithm=AWS4&X-Amz-Signature=SECRET",
    "Google": "https://storage.googleapis.com/b/a.h5ad?X-Goog-Signature=SECRET",
    "SAS": "https://account.blob.core.windows.net/c/a.h5ad?sv=2024&sig=SECRET%3D",
    "CloudFront": "https://d1.cloudfront.net/a.h5ad?Expires=1&Signature=SECRET&Key-Pair-Id=K1",
    "token": "https://host/a.h5ad?access_token=SECRET",
    "s3 with a query": "s3://bucket/a.h5ad?X-Amz-Signature=SECRET",
    "password of a database": "postgresql://host/a.h5ad?password=SECRET",
    "SAS of another protocol": "abfs://c@account/a.h5ad?sig=SECRET",
}


@pytest.mark.parametrize("kind", SIGNED)
def test_a_signature_is_recognised_and_taken_out_of_any_text(kind):
    address = SIGNED[kind]
    assert is_signed(address)
    shown = without_credentials(f"there is nothing at {address}; give `--data '{address}'`, or ({address}).")
    assert "SECRET" not in shown
    assert shown.count("a.h5ad?...") == 3
    assert shown.endswith("a.h5ad?...).")


def test_text_without_credentials_stays_as_it_is():
    for text in (
        "is that so? s3://bucket/a?b and gs://bucket/a?b/c.h5ad",
        "see http://127.0.0.1:8265, or https://host/a.h5ad.",
        "the column 'sig=' is missing?",
        "sqlite:////store/mlflow.db?mode=ro",
        "models:/sae-mine@champion, or C:/data?",
    ):
        assert without_credentials(text) == text
        assert not is_signed(text)
    assert without_credentials(f"no file {Path(SIGNED['SAS'])}") == f"no file {Path(SIGNED['SAS']).parent}/a.h5ad?..."
    assert without_credentials(str(Path("https://user:word@host/a"))) == "https:/...@host/a"
    assert without_credentials("https://user:word@host/a?x=1, b") == "https://...@host/a?..., b"


@pytest.mark.parametrize("error", [InputError, NotFoundError, UsageError, RunFailedError])
def test_an_error_holds_no_credentials_and_survives_pickling(error):
    made = error(f"cannot read {SIGNED['S3']}")
    for one in (made, pickle.loads(pickle.dumps(made))):
        assert str(one) == "cannot read https://bucket.s3.amazonaws.com/a.h5ad?..."
        assert "SECRET" not in repr(one)


def test_representations_hold_no_query():
    path = data_path(SIGNED["SAS"])
    assert isinstance(path, RemotePath)
    assert path.address == SIGNED["SAS"]
    options = EncodeOptions(data=SIGNED["S3"], obs=SIGNED["SAS"])
    assert "SECRET" not in f"{path!r} {path} {options!r} {options}"
