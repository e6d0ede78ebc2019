"""The artifact store: what exists is whole, in a folder and in a remote store alike; names depend on all that is said."""

import os
import threading
from pathlib import Path

import fsspec
import pytest

from service.artifacts import ArtifactStore, content_key
from service.ids import new_id

KEY = "embed/ab/abcdef.safetensors"


@pytest.fixture(params=["folder", "file URL", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    urls = {
        "folder": str(tmp_path / "store"),
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


def test_what_was_written_is_read_back_by_every_way(store: ArtifactStore) -> None:
    write(store, KEY, b"content")
    assert store.exists(KEY)
    assert store.size(KEY) == 7
    assert read(store, KEY) == b"content"
    with store.local(KEY) as path:
        assert path.read_bytes() == b"content"
    assert files(store) == [KEY]


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


def test_writers_of_one_key_at_once_leave_one_whole_content(store: ArtifactStore) -> None:
    contents = [bytes([i]) * 200_000 for i in range(8)]
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
    assert files(store) == [KEY]


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
    """Whoever was told that the artifact is there may rely on it: the file before its name, every new folder's name as well."""
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
    """Changing how keys are made would lose every artifact that stands in a store."""
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
