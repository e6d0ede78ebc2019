"""The artifact store: what exists is whole, in a folder and in a remote store alike; names depend on all that is said."""

import fcntl
import os
import threading
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.ids import new_id
from service.plan.artifact_keys import content_key
from service.storage.artifacts import ArtifactStore
from service.storage.checksums import ArtifactDamaged, CheckedFile

KEY = "embed/ab/abcdef.safetensors"


@pytest.fixture(params=["folder", "file URL", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    urls = {
        "folder": f"{tmp_path}/store",
        "file URL": f"file://{tmp_path}/store",
        "memory": f"memory://{new_id('store')}",
    }
    return ArtifactStore(urls[request.param])


def files(store: ArtifactStore) -> list[str]:
    """Every file under the root, unfinished ones too."""
    return sorted(path.removeprefix(f"{store.root}/") for path in store.fs.find(store.root))


def write(store: ArtifactStore, key: str, content: bytes) -> None:
    with store.writing(key) as path:
        path.write_bytes(content)


def write_half(store: ArtifactStore, key: str) -> None:
    with store.writing(key) as path:
        path.write_bytes(b"half")
        raise RuntimeError("mid-way")


def read(store: ArtifactStore, key: str) -> bytes:
    with store.open(key) as file:
        return file.read()


def read_by_path(store: ArtifactStore, key: str) -> bytes:
    with store.local(key) as path:
        return path.read_bytes()


def test_what_was_written_is_read_back_by_every_way(store: ArtifactStore) -> None:
    write(store, KEY, b"content")
    assert store.exists(KEY)
    assert store.size(KEY) == 7
    assert read(store, KEY) == b"content"
    with store.local(KEY) as path:
        assert path.read_bytes() == b"content"
    assert files(store) == [KEY, f"{KEY}.sum"]


def test_json_comes_back_as_it_was(store: ArtifactStore) -> None:
    value = {"rows": 3, "text": "é\u2028", "list": [1.5, None, True]}
    store.write_json("a.json", value)
    assert store.read_json("a.json") == value


def test_nothing_exists_before_the_writer_is_done(store: ArtifactStore) -> None:
    with store.writing(KEY) as path:
        path.write_bytes(b"half")
        assert not store.exists(KEY)
    assert store.exists(KEY)


def test_a_writer_that_fails_leaves_nothing(store: ArtifactStore) -> None:
    with pytest.raises(RuntimeError, match="mid-way"):
        write_half(store, KEY)
    assert not store.exists(KEY)
    assert files(store) == []


def test_a_writer_that_fails_leaves_no_local_file_of_a_remote_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RuntimeError, match="mid-way"):
        write_half(ArtifactStore(f"memory://{new_id('store')}"), KEY)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_fails_leaves_the_content_of_before(store: ArtifactStore) -> None:
    write(store, KEY, b"before")
    with pytest.raises(RuntimeError, match="mid-way"):
        write_half(store, KEY)
    assert read(store, KEY) == b"before"


def test_a_writer_that_writes_no_file_is_an_error_and_no_artifact(store: ArtifactStore) -> None:
    with pytest.raises(FileNotFoundError), store.writing(KEY):
        pass
    assert not store.exists(KEY)


def test_json_that_cannot_be_written_leaves_nothing(store: ArtifactStore) -> None:
    with pytest.raises(TypeError):
        store.write_json("a.json", {"object": object()})
    assert files(store) == []


def test_a_reader_keeps_the_content_that_it_opened(tmp_path: Path) -> None:
    """The new file takes the place of the old one, which is never written to."""
    store = ArtifactStore(str(tmp_path / "store"))
    write(store, KEY, b"before")
    with store.open(KEY) as file:
        write(store, KEY, b"after")
        assert file.read() == b"before"
    assert read(store, KEY) == b"after"


def test_writers_of_one_key_at_once_leave_one_whole_content(store: ArtifactStore) -> None:
    """Where the store has no locks they agree on the content: if not, it would be found damaged, and made once more."""
    contents = [bytes([i * store.is_local]) * 200_000 for i in range(8)]
    barrier = threading.Barrier(len(contents) + 1)
    seen, failures = [], []

    def publish(content: bytes) -> None:
        try:
            with store.writing(KEY) as path:
                path.write_bytes(content)
                barrier.wait()
        except Exception as error:
            failures.append(error)

    def look() -> None:
        barrier.wait()
        seen.extend(read(store, KEY) for _ in range(50) if store.exists(KEY))

    threads = [threading.Thread(target=publish, args=(content,)) for content in contents]
    # A memory store shows its open files; that an upload appears at once is a promise of object stores, not of fsspec.
    reader = threading.Thread(target=look if store.fs.protocol[0] == "file" else barrier.wait)
    for thread in (*threads, reader):
        thread.start()
    for thread in (*threads, reader):
        thread.join()
    assert not failures
    assert set(seen) | {read(store, KEY)} <= set(contents)
    assert files(store) == [KEY, f"{KEY}.sum"]


def test_what_is_not_there_is_said_to_be_missing(store: ArtifactStore) -> None:
    assert not store.exists(KEY)
    with pytest.raises(FileNotFoundError):
        store.open(KEY)
    with pytest.raises(FileNotFoundError), store.local(KEY) as path:
        path.read_bytes()


def test_a_delete_can_be_repeated(store: ArtifactStore) -> None:
    write(store, KEY, b"content")
    store.delete(KEY)
    store.delete(KEY)
    assert not store.exists(KEY)


def test_the_local_copy_of_a_remote_artifact_is_removed_after_use() -> None:
    store = ArtifactStore(f"memory://{new_id('store')}")
    write(store, KEY, b"content")
    with store.local(KEY) as path:
        assert path.exists()
    assert not path.exists()
    assert not path.parent.exists()


def test_a_relative_folder_does_not_move_with_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = ArtifactStore("store")
    write(store, KEY, b"content")
    monkeypatch.chdir("/")
    assert store.exists(KEY)
    assert (tmp_path / "store" / KEY).is_file()


def test_the_temporary_files_are_on_the_file_system_of_the_store(tmp_path: Path) -> None:
    """Else the rename would be a copy, which a crash can cut short."""
    store = ArtifactStore(str(tmp_path / "store"))
    with store.writing(KEY) as path:
        path.write_bytes(b"")
        assert path.is_relative_to(tmp_path / "store")


def test_a_loss_of_power_takes_neither_content_nor_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifact that is reported to exist must survive: the file is synchronised before its name, and every new folder."""
    synchronised = []
    fsync = os.fsync

    def recording(descriptor: int) -> None:
        synchronised.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", recording)
    root = tmp_path / "store"
    write(ArtifactStore(str(root)), KEY, b"content")
    file, folder, kind = root / KEY, (root / KEY).parent, (root / KEY).parent.parent
    assert synchronised[-2:] == [file.stat().st_ino, folder.stat().st_ino]
    assert {kind.stat().st_ino, root.stat().st_ino} <= set(synchronised)


def test_two_stores_on_one_url_see_the_same(tmp_path: Path) -> None:
    for url in (str(tmp_path), f"memory://{new_id('store')}"):
        write(ArtifactStore(url), KEY, b"content")
        assert read(ArtifactStore(url), KEY) == b"content"
    assert isinstance(ArtifactStore("memory://x").fs, fsspec.implementations.memory.MemoryFileSystem)


def test_the_key_of_known_content_never_changes() -> None:
    """Changing how keys are made would lose every artifact in a store."""
    key = content_key("embed", {"model": "m", "seed": 1, "blocks": [0, 1]}, ".safetensors")
    assert key == "embed/57/57b20fd521c3eb9c7979876ef20409ccfa8980caf7978f9d3a32e115c2339c7f.safetensors"


def test_the_key_depends_on_every_value_and_not_on_their_order() -> None:
    base = {"model": {"id": "a", "commit": "b"}, "seed": 1, "text": "é"}
    shuffled = {"text": "é", "seed": 1, "model": {"commit": "b", "id": "a"}}
    assert content_key("embed", base, "") == content_key("embed", shuffled, "")
    others = [
        {**base, "seed": 2},
        {**base, "seed": "1"},
        {**base, "seed": None},
        {**base, "model": {"id": "a", "commit": "c"}},
        {**base, "more": 0},
        {name: base[name] for name in ("model", "seed")},
    ]
    keys = {content_key("embed", depends_on, "") for depends_on in (base, *others)}
    keys |= {content_key("select", base, ""), content_key("embed", base, ".json")}
    assert len(keys) == len(others) + 3


def test_a_key_stays_inside_its_kind() -> None:
    key = content_key("embed", {"name": "../../etc/passwd"}, ".json")
    kind, folder, name = key.split("/")
    assert kind == "embed"
    assert name.startswith(folder)
    assert len(name) == 64 + len(".json")


def change(store: ArtifactStore, key: str, *, at: int | None = None, size: int | None = None) -> None:
    """Behind the store's back: another byte, or another size."""
    path = f"{store.root}/{key}"
    content = bytearray(store.fs.cat_file(path))
    if at is not None:
        content[at] ^= 1
    store.fs.pipe_file(path, bytes(content[:size]))


MIB = 2**20
BLOCKS = os.urandom(2 * MIB) + b"end"


@pytest.fixture
def reported(store: ArtifactStore) -> list[str]:
    """What the store reports of damaged artifacts."""
    found: list[str] = []
    store.on_damage = lambda key, _: found.append(key)
    return found


@pytest.mark.parametrize(
    "damage",
    [{"at": 0}, {"at": MIB + 7}, {"at": 2 * MIB + 2}, {"size": 2 * MIB}, {"size": 0}],
    ids=["first byte", "in the midst", "last byte", "cut at a block", "empty"],
)
@pytest.mark.parametrize("way", ["open", "local", "is_whole"])
def test_damage_is_never_read_and_set_aside_once(
    store: ArtifactStore, reported: list[str], damage: dict[str, int], way: str
) -> None:
    write(store, KEY, BLOCKS)
    assert store.damage(KEY) is None
    change(store, KEY, **damage)
    assert store.damage(KEY) is not None
    assert (reported, store.set_aside()) == ([], [])  # looking changes nothing
    if way == "is_whole":
        assert not store.is_whole(KEY)
    else:
        with pytest.raises(ArtifactDamaged) as found:
            {"open": read, "local": read_by_path}[way](store, KEY)
        assert found.value.key == KEY
    assert reported == [KEY]
    assert not store.exists(KEY)
    assert [file.size for file in store.set_aside()] == [damage.get("size", len(BLOCKS))]
    with pytest.raises(FileNotFoundError) as missing:
        read(store, KEY)
    assert missing.value.filename == KEY  # not the path
    write(store, KEY, b"again")
    assert read(store, KEY) == b"again"


def test_a_reader_checks_what_it_reads_and_no_more(store: ArtifactStore) -> None:
    write(store, KEY, BLOCKS)
    change(store, KEY, at=MIB)
    with store.open(KEY) as file:
        assert file.read(MIB) == BLOCKS[:MIB]
        file.seek(-3, os.SEEK_END)
        assert file.read() == b"end"
        file.seek(MIB + 100)
        with pytest.raises(ArtifactDamaged):
            file.read(1)


def test_parts_are_read_as_from_the_file_itself(store: ArtifactStore) -> None:
    write(store, KEY, BLOCKS)
    with store.open(KEY) as file:
        for start, size in ((0, 10), (MIB - 5, 10), (MIB, MIB), (10, 2 * MIB), (2 * MIB + 1, 100), (len(BLOCKS), 1)):
            file.seek(start)
            assert file.read(size) == BLOCKS[start : start + size]


@pytest.mark.parametrize("damage", [{"at": 3}, {"at": 20}, {"size": 9}, {"size": 0}])
def test_what_has_lost_its_checksums_is_not_read(store: ArtifactStore, damage: dict[str, int]) -> None:
    write(store, KEY, b"content")
    change(store, f"{KEY}.sum", **damage)
    with pytest.raises(ArtifactDamaged):
        store.open(KEY)
    write(store, KEY, b"content")
    store.fs.rm_file(f"{store.root}/{KEY}.sum")
    assert not store.exists(KEY)
    assert store.damage(KEY) is not None
    with pytest.raises(FileNotFoundError):
        store.open(KEY)


def test_an_empty_artifact_is_whole(store: ArtifactStore) -> None:
    write(store, KEY, b"")
    assert store.is_whole(KEY)
    assert read(store, KEY) == b""


def test_a_file_is_checked_again_once_it_was_changed(tmp_path: Path) -> None:
    """In between, a process reads it by its path without another look."""
    store = ArtifactStore(str(tmp_path / "store"))
    write(store, KEY, BLOCKS)
    checked = []
    check = CheckedFile.check
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckedFile, "check", lambda file: (checked.append(1), check(file)))
        for _ in range(3):
            with store.local(KEY):
                pass
        assert len(checked) == 1
        store.touch(KEY)
        with store.local(KEY):
            pass
        assert len(checked) == 1
        change(store, KEY, at=5)
        with pytest.raises(ArtifactDamaged), store.local(KEY):
            pass


def test_what_was_made_again_is_not_set_aside_for_what_was_there_before(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    write(store, KEY, BLOCKS)
    change(store, KEY, at=5)
    with store.open(KEY) as file:
        write(store, KEY, b"again")
        with pytest.raises(ArtifactDamaged):
            file.read()
    assert read(store, KEY) == b"again"
    assert store.set_aside() == []


def test_parquet_readers_see_the_damage_as_such(store: ArtifactStore) -> None:
    """And not as an error of the format."""
    with store.writing(KEY) as path:
        pq.write_table(pa.table({"x": list(range(300_000))}), path, compression="none", use_dictionary=False)
    change(store, KEY, at=1_500_000)
    with store.open(KEY) as file, pytest.raises(ArtifactDamaged):
        pq.ParquetFile(file).read()


def test_a_writer_that_stands_still_with_the_lock_holds_nobody_up_for_long(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    store.write_json(KEY, 1)
    folder = os.open(Path(store.root, KEY).parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        store.write_json(KEY, 2)
        assert store.read_json(KEY) == 2
    finally:
        os.close(folder)
