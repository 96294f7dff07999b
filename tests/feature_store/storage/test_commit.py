from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from feature_store.errors import (
    IncompleteRunError,
    InputError,
    IntegrityError,
    NotFoundError,
    OutdatedRunError,
    PlanMismatchError,
    StoreWriteError,
)
from feature_store.storage import commit, filesystem
from feature_store.storage.hashing import sealed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PLAN = {"n_shards": 3, "seed": 7, "site": "layer.2"}


def content(shard: int) -> bytes:
    return f"content of {shard} ".encode() * 1000


def writer(shard: int) -> Callable[[Path], int]:
    def write(path: Path) -> int:
        path.write_bytes(content(shard))
        return shard + 1

    return write


def fill(run: commit.Run, shards: list[int] | None = None) -> None:
    for shard in run.pending() if shards is None else shards:
        run.commit_shard(shard, writer(shard), start=10 * shard, stop=10 * shard + 10)


@pytest.fixture
def run(tmp_path: Path) -> commit.Run:
    return commit.Run.create(tmp_path / "run", PLAN)


@pytest.fixture
def finished(run: commit.Run) -> commit.Run:
    fill(run)
    run.finalize()
    return run


def test_a_finished_run_lists_every_part_and_verifies(finished: commit.Run) -> None:
    manifest = finished.manifest()
    assert [(m.shard, m.start, m.stop, m.rows) for m in manifest.shards] == [
        (0, 0, 10, 1),
        (1, 10, 20, 2),
        (2, 20, 30, 3),
    ]
    assert manifest.rows == 6
    assert manifest.bytes == sum(path.stat().st_size for path in finished.parts())
    assert [path.read_bytes() for path in finished.parts()] == [content(shard) for shard in range(3)]
    assert finished.verify() == []


def test_a_finished_run_holds_plan_parts_markers_and_manifest_and_nothing_else(finished: commit.Run) -> None:
    parts = [f"part-0000{shard}.{kind}" for shard in range(3) for kind in ("json", "parquet")]
    assert sorted(path.name for path in finished.path.iterdir()) == sorted([*parts, "plan.json", "MANIFEST.json"])


def test_the_same_plan_opens_the_folder_whatever_the_order_of_its_keys(run: commit.Run) -> None:
    again = commit.Run.create(run.path, dict(reversed(list(PLAN.items()))))
    assert again.plan_sha == run.plan_sha == commit.Run.open(run.path).plan_sha


def test_another_plan_is_refused_naming_the_keys_and_both_values(run: commit.Run) -> None:
    with pytest.raises(PlanMismatchError) as error:
        commit.Run.create(run.path, {"n_shards": 3, "seed": 8, "dtype": "f16"})
    message = str(error.value)
    assert "seed: 7 in the folder, 8 asked for" in message
    assert "site: 'layer.2' in the folder, '(absent)' asked for" in message
    assert "dtype: '(absent)' in the folder, 'f16' asked for" in message
    assert "n_shards" not in message


@pytest.mark.parametrize(
    "plan", [{}, {"n_shards": 0}, {"n_shards": "3"}, {"n_shards": True}, {"n_shards": 2, "files": ["a"]}]
)
def test_a_bad_plan_is_refused_before_anything_is_written(tmp_path: Path, plan: dict[str, object]) -> None:
    with pytest.raises(InputError):
        commit.Run.create(tmp_path / "run", plan)
    assert not (tmp_path / "run").exists()


def test_a_plan_of_another_format_version_is_refused(run: commit.Run) -> None:
    content = filesystem.read_sealed(run.path / "plan.json")
    (run.path / "plan.json").write_text(sealed({**content, "format_version": 99}))
    with pytest.raises(OutdatedRunError, match="99"):
        commit.Run.open(run.path)


def test_opening_a_folder_without_a_run_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="it has no plan"):
        commit.Run.open(tmp_path)


def test_an_unfinished_run_has_no_manifest_and_no_parts_to_read(run: commit.Run) -> None:
    fill(run, [0, 2])
    for ask in (run.manifest, run.parts, run.finalize):
        with pytest.raises(IncompleteRunError):
            ask()
    with pytest.raises(IncompleteRunError, match=r"1 of 3 shards are not committed \(first: \[1\]\)"):
        run.finalize()
    assert run.pending() == [1]
    assert run.verify()


def test_files_named_by_the_plan_are_the_parts(tmp_path: Path) -> None:
    run = commit.Run.create(tmp_path / "sae", {"n_shards": 2, "files": ["sae.safetensors", "config.json"]})
    fill(run)
    run.finalize()
    assert [path.name for path in run.parts()] == ["sae.safetensors", "config.json"]
    assert run.verify() == []


def test_a_committed_shard_is_not_written_again(run: commit.Run) -> None:
    fill(run, [1])
    before = run.part(1).stat().st_mtime_ns

    def never(_: Path) -> int:
        raise AssertionError("a retry has to find the marker")

    assert run.commit_shard(1, never, start=10, stop=20) == run.committed(1)
    assert run.part(1).stat().st_mtime_ns == before


def test_a_late_writer_with_other_bytes_changes_nothing(run: commit.Run) -> None:
    def overtaken(path: Path) -> int:
        fill(commit.Run.open(run.path), [0])
        path.write_bytes(b"of a zombie")
        return 1

    marker = run.commit_shard(0, overtaken, start=0, stop=10)
    assert run.part(0).read_bytes() == content(0)
    assert marker == run.committed(0)


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [(damage_truncate, "truncated"), (damage_flip, "its bytes changed"), (damage_remove, "missing")],
)
def test_a_damaged_part_is_named_and_repaired_by_running_again(
    finished: commit.Run,
    folder_hashes: Callable[[Path], dict[str, str]],
    damage: Callable[[Path], None],
    problem: str,
) -> None:
    before = folder_hashes(finished.path)
    damage(finished.part(1))
    (found,) = finished.verify()
    assert "part-00001.parquet" in found
    assert problem in found
    assert finished.pending() == [1]
    fill(finished)
    finished.finalize()
    assert finished.verify() == []
    assert folder_hashes(finished.path) == before


def test_a_damaged_part_cannot_be_replaced_by_other_bytes(finished: commit.Run) -> None:
    damage_flip(finished.part(1))
    assert finished.verify()

    def other(path: Path) -> int:
        path.write_bytes(b"other")
        return 2

    with pytest.raises(IntegrityError, match="other bytes than the manifest"):
        finished.commit_shard(1, other, start=10, stop=20)


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    run = commit.Run.create(tmp_path / "run", {"n_shards": 1, "seed": 7})
    run.commit_shard(0, lambda path: path.write_bytes(b"a few bytes"), start=0, stop=10)
    run.finalize()
    assert commit.verify(run.path) == []
    for path in run.path.iterdir():
        whole = path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert any(path.name in problem for problem in commit.verify(run.path)), (path.name, place)
        path.write_bytes(whole)


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_remove])
@pytest.mark.parametrize("name", ["plan.json", "MANIFEST.json"])
def test_a_damaged_plan_or_manifest_is_named_and_written_again_without_redoing_a_shard(
    finished: commit.Run,
    folder_hashes: Callable[[Path], dict[str, str]],
    damage: Callable[[Path], None],
    name: str,
) -> None:
    before = folder_hashes(finished.path)
    damage(finished.path / name)
    assert any(name in problem for problem in commit.verify(finished.path))
    run = commit.Run.create(finished.path, PLAN)
    assert run.pending() == []
    run.finalize()
    assert folder_hashes(finished.path) == before


def test_a_start_hashes_no_part(finished: commit.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(path: Path) -> str:
        raise AssertionError(f"{path} was hashed")

    for name in ("sha256", "end_sha256"):
        monkeypatch.setattr(filesystem, name, never)
    assert finished.pending() == []
    assert finished.committed(1) == finished.manifest().shards[1]
    assert commit.is_intact(finished.path)
    damage_truncate(finished.part(1))
    assert not commit.is_intact(finished.path)
    assert finished.pending() == [1]


def files_read(folder: Path, n_shards: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many small files are read, and sizes asked for, to plan, commit and finish a run and to start it again."""
    counts = dict.fromkeys(("commit", "half", "finalize", "again"), 0)
    part = ["commit"]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            counts[part[0]] += 1
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("read_bytes", "size_bytes", "file_sizes", "file_state"):
            patch.setattr(filesystem, name, counted(getattr(filesystem, name)))
        run = commit.Run.create(folder, {"n_shards": n_shards})
        fill(run, list(range(n_shards)))
        part[0] = "half"
        assert commit.Run.create(folder, {"n_shards": n_shards}).pending() == []
        part[0] = "finalize"
        run.finalize()
        part[0] = "again"
        again = commit.Run.create(folder, {"n_shards": n_shards})
        assert again.pending() == []
        again.finalize()
        for shard in range(n_shards):
            again.checked_part(shard)
    return counts


def test_the_files_read_by_a_start_and_an_end_grow_with_the_shards_and_no_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large, larger = (files_read(tmp_path / str(n), n, monkeypatch) for n in (20, 40, 60))
    for what, n in larger.items():
        assert n - large[what] == large[what] - small[what], what
    assert larger["half"] - large["half"] == 20, "a marker each"
    assert larger["finalize"] - large["finalize"] == 20


def test_a_manifest_is_parsed_once_and_again_when_its_file_changes(
    finished: commit.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[Path] = []
    read_sealed = filesystem.read_sealed
    monkeypatch.setattr(filesystem, "read_sealed", lambda path: parsed.append(path) or read_sealed(path))
    run = commit.Run.open(finished.path)
    parsed.clear()
    assert [run.checked_part(shard) for shard in range(3)] == run.parts()
    assert len(parsed) == 1
    text = (run.path / "MANIFEST.json").read_bytes()
    damage_flip(run.path / "MANIFEST.json")
    with pytest.raises(IntegrityError, match=r"MANIFEST\.json"):
        run.manifest()
    (run.path / "MANIFEST.json").write_bytes(text)
    assert run.manifest() == finished.manifest()
    (run.path / "MANIFEST.json").unlink()
    with pytest.raises(IncompleteRunError):
        run.manifest()


def test_a_reader_that_finds_other_bytes_makes_the_shard_pending_and_the_same_command_repairs_it(
    finished: commit.Run, folder_hashes: Callable[[Path], dict[str, str]]
) -> None:
    before = folder_hashes(finished.path)
    damage_flip(finished.part(1))
    assert finished.pending() == []
    with pytest.raises(IntegrityError, match=r"part-00001\.parquet.*run its stage again"):
        finished.checked_parts()
    assert finished.pending() == [1]
    assert not commit.is_intact(finished.path)
    fill(finished)
    finished.finalize()
    assert folder_hashes(finished.path) == before


def test_a_part_that_could_not_be_read_but_has_its_bytes_keeps_its_marker(finished: commit.Run) -> None:
    assert "run its stage again" in commit.mark_damaged(finished.part(1))
    assert finished.pending() == []
    damage_flip(finished.part(1))
    commit.mark_damaged(finished.part(1))
    assert finished.pending() == [1]


def test_a_damaged_part_in_a_store_that_is_only_read_is_named_with_verify(finished: commit.Run) -> None:
    with without_root() as folder:
        run = commit.Run.create(folder / "run", PLAN)
        fill(run)
        run.finalize()
        damage_flip(run.part(1))
        for path in (run.path, run.path / "plan.json"):
            path.chmod(0o555)
        with pytest.raises(IntegrityError, match=r"its bytes changed.*a user who can write there .*`scsae verify"):
            run.checked_parts()
        assert any("its bytes changed" in problem for problem in run.verify())
        assert run.pending() == []
        for path in (run.path, run.path / "plan.json"):
            path.chmod(0o755)
        run.verify()
        assert run.pending() == [1]


def test_a_part_and_the_manifest_damaged_together_are_both_made_again(
    finished: commit.Run, folder_hashes: Callable[[Path], dict[str, str]]
) -> None:
    before = folder_hashes(finished.path)
    damage_flip(finished.part(1))
    damage_flip(finished.path / "MANIFEST.json")
    assert len(finished.verify()) == 2
    fill(finished)
    finished.finalize()
    assert folder_hashes(finished.path) == before


def test_a_damaged_table_is_refused_when_it_is_read(tmp_path: Path) -> None:
    commit.write_table(tmp_path / "t", FRAME, {})
    part = tmp_path / "t" / "part-00000.parquet"
    column = pq.read_metadata(part).row_group(0).column(0)
    whole = bytearray(part.read_bytes())
    whole[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    part.write_bytes(whole)
    with pytest.raises(IntegrityError, match=r"part-00000\.parquet: sha256 .*its bytes changed.*scsae verify"):
        commit.read_table(tmp_path / "t")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"shard": 1}'])
def test_a_marker_that_is_none_makes_its_shard_pending(run: commit.Run, text: str) -> None:
    fill(run)
    (run.path / "part-00001.json").write_text(text)
    assert run.pending() == [1]


def test_a_marker_of_another_plan_is_not_accepted(run: commit.Run, tmp_path: Path) -> None:
    fill(run)
    other = commit.Run.create(tmp_path / "other", {**PLAN, "seed": 8})
    for path in run.path.glob("part-*"):
        shutil.copy(path, other.path)
    assert other.pending() == [0, 1, 2]


def test_a_manifest_of_another_run_is_refused(finished: commit.Run, tmp_path: Path) -> None:
    other = commit.Run.create(tmp_path / "other", {**PLAN, "seed": 8})
    shutil.copy(finished.path / "MANIFEST.json", other.path)
    with pytest.raises(IntegrityError, match="not of the plan"):
        other.manifest()
    assert other.verify()


def test_a_failing_write_leaves_no_file_and_its_own_error(run: commit.Run) -> None:
    def fails(path: Path) -> int:
        path.write_bytes(b"half")
        raise KeyError("the model failed")

    with pytest.raises(KeyError):
        run.commit_shard(0, fails, start=0, stop=10)
    assert [path.name for path in run.path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_is_a_clear_error_that_resumes(run: commit.Run, code: int) -> None:
    fill(run, [0])

    def fails(path: Path) -> int:
        path.write_bytes(b"half")
        raise OSError(code, os.strerror(code), str(path))

    with pytest.raises(StoreWriteError, match=os.strerror(code)):
        run.commit_shard(1, fails, start=10, stop=20)
    assert run.pending() == [1, 2]
    assert not list(run.path.glob(".tmp-*"))


def test_an_input_file_that_is_missing_is_not_blamed_on_the_store(run: commit.Run, tmp_path: Path) -> None:
    def fails(_: Path) -> int:
        return len((tmp_path / "absent").read_bytes())

    with pytest.raises(FileNotFoundError):
        run.commit_shard(0, fails, start=0, stop=10)


@contextlib.contextmanager
def without_root() -> Iterator[Path]:
    """A folder to write in as a user whom permissions bind (they do not bind root)."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    folder = Path(tempfile.mkdtemp(prefix="scsae-test-", dir="/tmp"))
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        shutil.rmtree(folder)


def test_a_read_only_folder_is_a_clear_error_and_still_readable() -> None:
    with without_root() as folder:
        run = commit.Run.create(folder / "run", PLAN)
        fill(run, [0])
        run.path.chmod(0o555)
        with pytest.raises(StoreWriteError, match="cannot write in"):
            run.commit_shard(1, writer(1), start=10, stop=20)
        folder.chmod(0o555)
        with pytest.raises(StoreWriteError, match="Permission denied"):
            commit.Run.create(folder / "new", PLAN)
        assert commit.Run.create(run.path, PLAN).pending() == [1, 2]
        for path in (folder, run.path):
            path.chmod(0o755)


def test_a_file_where_the_folder_should_be_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreWriteError):
        commit.Run.create(tmp_path / "file" / "run", PLAN)


def test_a_finished_run_keeps_no_file_of_a_writer_that_died_while_others_went_on(run: commit.Run) -> None:
    fill(run)
    (run.path / ".tmp-00000-ofakilledwriter").write_bytes(b"half")
    run.finalize()
    assert list(run.path.glob(".tmp-*")) == []


def test_pending_removes_what_killed_writers_left_but_not_the_file_of_a_living_one(run: commit.Run) -> None:
    (run.path / ".tmp-00000-ofakilledwriter").write_bytes(b"half")

    def watched(path: Path) -> int:
        assert commit.Run.open(run.path).pending() == [0, 1, 2]
        assert list(run.path.glob(".tmp-*")) == [path]
        return writer(0)(path)

    run.commit_shard(0, watched, start=0, stop=10)
    assert run.pending() == [1, 2]


def test_threads_racing_for_the_same_shards_commit_each_once(tmp_path: Path) -> None:
    run = commit.Run.create(tmp_path / "run", {"n_shards": 8})
    barrier = threading.Barrier(4)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        barrier.wait()
        try:
            for shard in np.random.default_rng(seed).permutation(8).tolist():
                # bytes differ by thread: a part and its marker have to be of one writer nevertheless
                run.commit_shard(
                    shard, lambda path: path.write_bytes(bytes([seed]) * 5000), start=shard, stop=shard + 1
                )
            run.finalize()
        except Exception as error:  # noqa: BLE001  what a thread raises is lost otherwise
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert run.verify() == []
    assert not list(run.path.glob(".tmp-*"))


def test_replace_text_replaces_whole_files(tmp_path: Path) -> None:
    for text in ("first", "second"):
        commit.replace_text(tmp_path / "progress.json", text)
        assert [path.read_text() for path in tmp_path.iterdir()] == [text]


FRAME = pl.DataFrame({"b": ["x", None, "z"], "a": [1.5, 2.5, None], "c": [True, False, None]})


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = commit.write_table(tmp_path / "t", FRAME, {"k": 1})
    assert manifest.rows == 3
    assert commit.read_table(tmp_path / "t").equals(FRAME)
    assert commit.read_table(tmp_path / "t").schema == FRAME.schema


def test_an_empty_table_comes_back_with_its_schema(tmp_path: Path) -> None:
    commit.write_table(tmp_path / "t", FRAME.clear(), {})
    assert commit.read_table(tmp_path / "t").schema == FRAME.schema


def test_writing_a_table_again_writes_nothing_and_needs_no_frame(
    tmp_path: Path, folder_hashes: Callable[[Path], dict[str, str]]
) -> None:
    first = commit.write_table(tmp_path / "t", FRAME, {"k": 1})
    before = folder_hashes(tmp_path)

    def never() -> pl.DataFrame:
        raise AssertionError("the table is there")

    assert commit.write_table(tmp_path / "t", never, {"k": 1}) == first
    assert folder_hashes(tmp_path) == before


def test_a_table_whose_frame_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> pl.DataFrame:
        raise InputError("no")

    with pytest.raises(InputError):
        commit.write_table(tmp_path / "t", fails, {})
    assert not (tmp_path / "t").exists()


def test_the_same_table_gives_the_same_bytes(tmp_path: Path) -> None:
    shas = {commit.write_table(tmp_path / name, FRAME, {"k": 1}).sha for name in ("one", "two")}
    assert len(shas) == 1


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_part_is_hashed_once_a_process_and_again_when_its_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit.write_table(tmp_path / "t", FRAME, {})
    run = commit.Run.open(tmp_path / "t")
    hashed: list[Path] = []
    sha256 = filesystem.sha256
    monkeypatch.setattr(filesystem, "sha256", lambda path: hashed.append(path) or sha256(path))
    (part,) = run.checked_parts()
    assert run.checked_parts() == [part]
    assert hashed == [part]
    data = part.read_bytes()
    flipped(part, len(data) // 2)
    for _ in range(2):
        with pytest.raises(IntegrityError, match=r"part-00000\.parquet: sha256 .*scsae verify"):
            run.checked_parts()
    part.write_bytes(data)
    assert run.checked_parts() == [part]
    part.unlink()
    with pytest.raises(IntegrityError, match=r"part-00000\.parquet: missing"):
        run.checked_parts()


def test_of_a_large_part_the_end_is_hashed_and_verify_hashes_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "END_BYTES", 64)
    commit.write_table(tmp_path / "t", FRAME, {})
    run = commit.Run.open(tmp_path / "t")
    (part,) = run.checked_parts(max_bytes=10)
    data = part.read_bytes()
    flipped(part, len(data) - 40)
    with pytest.raises(IntegrityError, match=r"part-00000\.parquet: its last bytes"):
        run.checked_parts(max_bytes=10)
    part.write_bytes(data)
    flipped(part, 20)
    assert run.checked_parts(max_bytes=10) == [part]
    assert any("its bytes changed" in problem for problem in run.verify())
    part.write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match=r"part-00000\.parquet: .* bytes where"):
        run.checked_parts(max_bytes=10)
