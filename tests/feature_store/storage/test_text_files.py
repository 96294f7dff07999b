"""One reader for the text files of users: compressed, marked and Latin-1 ones are read, all else is one line."""

import bz2
import gzip
import lzma
import os
import threading

import pytest

from feature_store.errors import InputError, NotFoundError
from feature_store.storage.text_files import plain_stem, read_text


@pytest.mark.parametrize(
    "content",
    [
        b"a\tb\nc",
        gzip.compress(b"a\tb\nc", mtime=0),
        bz2.compress(b"a\tb\nc"),
        lzma.compress(b"a\tb\nc"),
        b"\xef\xbb\xbfa\tb\r\nc",
        "a\tb\rc".encode("utf-16"),
    ],
)
def test_a_text_is_read_whatever_its_compression_mark_and_ends_of_lines(tmp_path, content):
    (tmp_path / "x.gmt").write_bytes(content)
    assert read_text(tmp_path / "x.gmt", "the file", wanted="a text") == "a\tb\nc"


@pytest.mark.parametrize("content", [b"a\tb\nc", gzip.compress(b"a\tb\nc", mtime=0)])
def test_a_pipe_is_read_once(tmp_path, content):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    assert read_text(pipe, "the file", wanted="a text") == "a\tb\nc"
    writer.join()


def test_latin1_is_read_where_it_is_allowed(tmp_path):
    (tmp_path / "x").write_bytes(b"na\xefve")
    assert read_text(tmp_path / "x", "the file", wanted="a text", latin1=True) == "naïve"
    with pytest.raises(InputError, match=r"0xef.*UTF-8"):
        read_text(tmp_path / "x", "the recipe", wanted="a text")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x89HDF\r\n\x1a\n\0\0", "binary"),
        (b"PK\x03\x04\0\0", "zip"),
        (gzip.compress(b"a" * 1000, mtime=0)[:-12], "incomplete"),
        (lzma.compress(b"a" * 1000)[:-12], "incomplete"),
        (bz2.compress(b"a" * 1000)[:-12], "incomplete"),
        (b"BZh9 is no bzip2 file", "incomplete"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(tmp_path, content, said):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=said) as found:
        read_text(tmp_path / "x", "the file", wanted="a text", latin1=True)
    assert "\n" not in str(found.value)


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(InputError, match="folder"):
        read_text(tmp_path, "the recipe", wanted="a text")
    with pytest.raises(NotFoundError, match="nothing"):
        read_text(tmp_path / "nothing", "the recipe", wanted="a text")


def test_the_collection_of_a_compressed_file_is_named_without_the_suffix_of_the_compression():
    assert [plain_stem(name) for name in ("h.all.v7.gmt", "h.all.v7.gmt.gz", "h.gmt.XZ")] == [
        "h.all.v7",
        "h.all.v7",
        "h",
    ]
