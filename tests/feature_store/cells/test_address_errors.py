"""What is wrong with an address or its server is one clear error."""

from __future__ import annotations

import importlib.util

import cell_files
import pytest
from address_cells import same
from served_files import forget_connections

from feature_store.cells import open_source
from feature_store.errors import InputError, NotFoundError
from feature_store.storage import remote_objects
from feature_store.storage.addresses import data_path
from feature_store.storage.remote_http import HttpObjects


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are repeated without a wait."""
    monkeypatch.setattr(remote_objects, "WAIT_S", 0.0)


def test_a_zarr_folder_of_the_web_needs_consolidated_metadata(cells_with_ids, served):
    import zarr

    path = cell_files.zarr_folder(cells_with_ids, served.folder, version=2)
    (path / ".zmetadata").unlink()
    with pytest.raises(NotFoundError, match="there is nothing at"):
        open_source(f"{served.address}/{path.name}")
    path = cell_files.zarr_folder(cells_with_ids, served.folder, name="three.zarr")
    group = zarr.open_group(path, use_consolidated=False)
    group.attrs["touched"] = True
    with pytest.raises(InputError, match=r"no consolidated metadata.*zarr\.consolidate_metadata\('three\.zarr'\)"):
        open_source(f"{served.address}/three.zarr")


def test_one_address_twice_is_refused(cells_with_ids, served):
    path = cell_files.h5ad(cells_with_ids, served.folder)
    address = f"{served.address}/{path.name}"
    with pytest.raises(InputError, match="was given twice"):
        open_source([address, f"{address}?signature=b"])


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({"statuses": [404] * 9}, r"there is nothing at .*check the address"),
        ({"statuses": [403]}, r"may not be read \(the server answers 403\); .*netrc"),
        ({"statuses": [503] * 9}, r"cannot be reached \(the server answers 503, 4 tries\)"),
        ({"ranges": False}, r"does not answer requests for a range of bytes.*download it"),
        ({"ranges": False, "kind": "text/html"}, r"with a web page; give the address of the file itself"),
    ],
)
def test_what_a_server_of_the_web_refuses_is_said(server, words, cells_with_ids, served):
    path = cell_files.h5ad(cells_with_ids, served.folder)
    vars(served).update(server)
    with pytest.raises((InputError, NotFoundError), match=words):
        open_source(f"{served.address}/{path.name}")
    assert served.n_bytes <= path.stat().st_size


def test_an_answer_that_is_too_short_is_no_data(cells_with_ids, served, monkeypatch):
    path = cell_files.h5ad(cells_with_ids, served.folder)
    own = HttpObjects.read
    monkeypatch.setattr(HttpObjects, "read", lambda *given: own(*given)[:-1])
    with pytest.raises(InputError, match=r"answered [\d,]+ bytes of the [\d,]+ from 0 on"):
        open_source(f"{served.address}/{path.name}")


@pytest.mark.usefixtures("at_once")
def test_requests_that_fail_for_a_moment_are_repeated(cells_with_ids, served):
    path = cell_files.h5ad(cells_with_ids, served.folder)
    served.statuses = [503, 429, 500]
    same(f"{served.address}/{path.name}", path)


@pytest.mark.usefixtures("at_once")
def test_a_server_that_is_not_there_is_one_error(s3, monkeypatch):
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:9/cells\.h5ad cannot be reached .*check the address"):
        open_source("http://127.0.0.1:9/cells.h5ad")


def test_what_a_bucket_lacks_or_forbids_is_said(s3, monkeypatch):
    for address in ("s3://cells/nothing.h5ad", "s3://cells/nothing.zarr", "s3://no-such-bucket/cells.h5ad"):
        with pytest.raises(NotFoundError, match="there is nothing at s3://"):
            open_source(address)
    monkeypatch.setattr(
        "s3fs.S3FileSystem.call_s3", lambda *_args, **_options: (_ for _ in ()).throw(PermissionError("Forbidden"))
    )
    with pytest.raises(InputError, match=r"may not be read \(Forbidden\); set AWS_ACCESS_KEY_ID"):
        open_source("s3://cells/some.h5ad")


def test_credentials_that_are_missing_are_said(s3, monkeypatch, tmp_path):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    forget_connections()
    with pytest.raises(InputError, match=r"may not be read .*set AWS_ACCESS_KEY_ID"):
        open_source("s3://cells/some.h5ad")
    s3fs.S3FileSystem.clear_instance_cache()
    forget_connections()


@pytest.mark.parametrize(
    ("address", "module", "extra"),
    [("s3://b/a.h5ad", "s3fs", "s3"), ("gs://b/a.h5ad", "gcsfs", "gs"), ("https://h/a.h5ad", "aiohttp", "https")],
)
def test_a_missing_package_is_named_with_its_command(address, module, extra, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == module else found(name))
    with pytest.raises(InputError, match=rf"needs more packages: pip install 'scsae\[{extra}\]'"):
        open_source(address)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("filecache::https://host/a.h5ad", r"data are read at s3://"),
        ("ftp://host/a.h5ad", r"data are read at s3://, gs://, https://, http://, or from a file"),
        ("https://user:word@host/a.h5ad", r"holds a user.*netrc"),
        ("s3://bucket", r"give one with a host or bucket"),
        ("https:///a.h5ad", r"give one with a host or bucket"),
    ],
)
def test_an_address_that_is_not_taken_is_refused(address, words):
    with pytest.raises(InputError, match=words):
        data_path(address)


@pytest.mark.parametrize("where", ["web", "bucket"])
def test_a_missing_chunk_of_values_is_no_zeros(where, cells_with_ids, served, s3):
    path = cell_files.zarr_folder(cells_with_ids, served.folder)
    (path / "X/data/c/0").unlink()
    address = f"{served.address}/{path.name}" if where == "web" else s3.put(path, "missing/cells.zarr")
    with pytest.raises(InputError, match=r"missing; the file is damaged|missing; the folder was copied in part"):
        open_source(address)


def test_what_is_no_data_file_at_an_address_is_named(served):
    for name, content, words in [
        ("page.h5ad", b"<!doctype html><html></html>", "web page"),
        ("cells.h5ad", b"PAR1 and more", "not an HDF5 file"),
        ("half.h5ad", b"\x89HDF\r\n\x1a\n" + bytes(5) + b"\x08\x08" + bytes(81), "incomplete|damaged"),
    ]:
        (served.folder / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            open_source(f"{served.address}/{name}")
    (served.folder / "empty.h5ad").write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        open_source(f"{served.address}/empty.h5ad")
