"""Attacks on the running service: uploads that unfold, requests that name paths and URLs, models that take all memory.

docs/security.md lists every attack with the test that makes it, here and elsewhere; the last test here holds it to that.
"""

import ast
import gzip
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.tiny import save_model, turns
from support.world import serving

from service.datasets import storage
from service.datasets.rows.canonical import CanonicalRow
from service.datasets.storage import ContentWriter
from service.ledger.store_identity import MARKER
from service.plan.parameters import Parameters
from service.plan.stages import JobInputs
from service.settings import ApiSettings, UploadSettings
from service.storage.artifacts import ArtifactStore
from worker.process.compute_process import ComputeProcess

if TYPE_CHECKING:
    from support.world import World

ROOT = Path(__file__).parents[3]
MIB = 2**20
BUDGETS = UploadSettings(max_bytes=64 * MIB, max_rows=20_000, parquet_memory_bytes=192 * MIB)
# A reader of 192 MiB beside its 65 MiB of libraries, and what the API holds of rows.
MOST_GROWTH = 400 * MIB
PATIENCE = 120.0


@pytest.fixture
def settings(settings: ApiSettings) -> ApiSettings:
    # Even where all of the hub is allowed, what is no name of a model of it is refused.
    models = settings.models.model_copy(update={"hub": ("*/*",)})
    return settings.model_copy(update={"uploads": BUDGETS, "models": models})


@contextmanager
def growth_bounded(most: int) -> Iterator[None]:
    """Watches the memory of this process and of those that it starts meanwhile."""
    process, over = psutil.Process(), threading.Event()
    before = {child.pid for child in process.children(recursive=True)}
    own = process.cmdline()
    base, peak = process.memory_info().rss, 0

    def resident(child: psutil.Process) -> int:
        try:
            # One that is still this program has just been forked, and its memory is this process's.
            return 0 if child.pid in before or child.cmdline() == own else int(child.memory_info().rss)
        except psutil.Error:
            return 0

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            children = sum(map(resident, process.children(recursive=True)))
            peak = max(peak, process.memory_info().rss - base + children)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    assert peak < most, f"{peak / MIB:.0f} MiB more than before"


def deflated(piece: bytes, times: int) -> bytes:
    """One member of gzip that unfolds to the piece that many times."""
    packer = zlib.compressobj(1, wbits=31)
    return b"".join([*(packer.compress(piece) for _ in range(times)), packer.flush()])


def zip_of_zip() -> bytes:
    content = b"0" * 10 * MIB
    for _ in range(2):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("a", "b"):
                archive.writestr(name, content)
        content = out.getvalue()
    return content


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, compression="zstd", **options)
    return out.getvalue()


def varint(number: int) -> bytes:
    """As the footer writes a number: zigzag, seven bits a byte."""
    number, out = number << 1, bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def lying(data: bytes, truth: int, lie: int) -> bytes:
    """The file with a number of its footer exchanged, wherever the footer has it."""
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    assert len(varint(truth)) == len(varint(lie))
    assert varint(truth) in data[start:]
    return data[:start] + data[start:].replace(varint(truth), varint(lie))


def repeated(value_bytes: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int16()), pa.array(["a" * value_bytes]))


def huge_page() -> bytes:
    return parquet({"text": pa.array(["a" * 8 * MIB] * 25)}, use_dictionary=False)


def size_lie() -> bytes:
    """The footer tells of ten bytes where there are 200 MiB."""
    data = huge_page()
    size = pq.read_metadata(io.BytesIO(data)).row_group(0).column(0).total_uncompressed_size
    return lying(data, size, 2**27 + 10)


def levels() -> bytes:
    """One row, a list of 2**26 nulls: a run of levels, some bytes long."""
    count = 2**26
    buffers, children = [pa.py_buffer(bytes(count // 8))], [pa.nulls(count, pa.bool_())]
    nulls = pa.Array.from_buffers(pa.struct({"role": pa.bool_()}), count, buffers, count, children=children)
    return parquet({"messages": pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), nulls)})


def deep_lists(depth: int) -> bytes:
    column = pa.array(["a"])
    for _ in range(depth):
        column = pa.ListArray.from_arrays(pa.array([0, len(column)], pa.int32()), column)
    return parquet({"text": column})


def many_columns() -> bytes:
    columns = {f"c{i}": [0] * 20 for i in range(1_000)}
    return parquet({"text": ["a"] * 20, **columns}, row_group_size=1)


LARGE, BAD_FILE, BAD_ROWS = (413, "upload_too_large"), (422, "invalid_file"), (422, "invalid_rows")
JSONL: dict[str, tuple[bytes | Callable[[], bytes], tuple[int, str]]] = {
    "gzip of zeros": (lambda: deflated(bytes(MIB), 256), BAD_FILE),
    "gzip of blanks": (lambda: deflated(b" " * MIB, 256), LARGE),
    "zstd of blanks": (lambda: pa.compress(b" " * MIB, "zstd", asbytes=True) * 80, LARGE),
    "zstd of an array of one element": (
        lambda: (
            pa.compress(b'[{"text": "' + b"a" * MIB, "zstd", asbytes=True)
            + pa.compress(b"a" * MIB, "zstd", asbytes=True) * 80
        ),
        LARGE,
    ),
    "CSV whose quote never closes": (b'text\n"' + b"a,b\n" * MIB, LARGE),
    "gzip of many members": (lambda: gzip.compress(b'{"text": "a"}\n' * 4_000) * 8, LARGE),
    "gzip of newlines": (lambda: deflated(b"\n" * MIB, 32), LARGE),
    "gzip of gzip": (lambda: gzip.compress(deflated(bytes(MIB), 256)), BAD_FILE),
    "zip of zip": (zip_of_zip, BAD_FILE),
    "newlines": (b"\n" * 20_001, LARGE),
    "one line": (b'{"text": "' + b"a" * 32 * MIB, BAD_ROWS),
    "nested lists": (b'{"text": ' + b"[" * 500_000, BAD_ROWS),
    "nested arrays of a document": (b"[" * 500_000, BAD_FILE),
    "nested objects": (b'{"text":' * 100_000, BAD_ROWS),
    "a number of a million digits": (b'{"id": ' + b"9" * 1_000_000 + b', "text": "a"}', BAD_ROWS),
    "half a surrogate pair": (rb'{"text": "\ud800"}', BAD_ROWS),
    "an overlong slash": (b'{"text": "\xc0\xaf"}', BAD_ROWS),
    "NUL, escaped": (rb'{"text": "\u0000"}', BAD_ROWS),
    "NUL, plain": (b'{"text": "\0"}', BAD_ROWS),
    "a line break in an id": (rb'{"id": "a\r\nb", "text": "a"}', BAD_ROWS),
}
PARQUET: dict[str, tuple[Callable[[], bytes], tuple[int, str]]] = {
    "a dictionary that repeats a huge value": (lambda: parquet({"text": repeated(16 * MIB)}), LARGE),
    "a dictionary that repeats a large value": (lambda: parquet({"text": repeated(900_000)}), LARGE),
    "a page of 200 MiB": (huge_page, LARGE),
    "a footer that makes the page small": (size_lie, LARGE),
    "a run of levels": (levels, LARGE),
    "a footer with fewer rows": (lambda: lying(parquet({"text": ["a"] * 5_001}), 5_001, 4_999), (201, "")),
    "a footer with more rows": (lambda: lying(parquet({"text": ["a"] * 5_001}), 5_001, 8_000), BAD_FILE),
    "a footer longer than the file": (lambda: b"PAR1" + b"\xff\xff\xff\x7fPAR1", BAD_FILE),
    "lists of lists": (lambda: deep_lists(300), BAD_FILE),
    "twenty thousand columns of row groups": (many_columns, (201, "")),
    "more rows than the budget": (lambda: parquet({"text": ["a"] * 20_001}), LARGE),
}


@pytest.mark.parametrize(("make", "answer"), [*JSONL.values(), *PARQUET.values()], ids=[*JSONL, *PARQUET])
def test_an_upload_cannot_unfold_beyond_its_budgets(
    api: "World", make: bytes | Callable[[], bytes], answer: tuple[int, str]
) -> None:
    data = make if isinstance(make, bytes) else make()
    pa.default_memory_pool().release_unused()
    with growth_bounded(MOST_GROWTH):
        response = api.client.post("/v1/datasets", params={"name": "bomb"}, content=data)
    assert (response.status_code, response.json().get("code", "")) == answer, response.text
    if answer[0] != 201:
        assert api.client.get("/v1/datasets").json()["data"] == []
        kept = {Path(path).name for path in api.store.fs.find(api.store.root)} - {MARKER}
        assert not kept, "something of it was kept"


def test_an_id_is_text_and_never_a_path(api: "World", tmp_path: Path) -> None:
    ids = ["../../etc/passwd", "/etc/passwd", "..\\..\\x", "%2e%2e%2f", "file:///etc/passwd"]
    before = set(tmp_path.rglob("*"))
    rows = "".join(json.dumps({"id": id, "source": id, "text": "t"}) + "\n" for id in ids)
    dataset = api.client.post("/v1/datasets", params={"name": "../../x"}, content=rows).json()
    assert dataset["name"] == "../../x"
    page = api.client.get(f"/v1/datasets/{dataset['id']}/rows").json()["data"]
    assert [row["id"] for row in page] == ids
    made = {path.relative_to(tmp_path).as_posix() for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert {storage.fingerprint_of(name.removeprefix("store/")) for name in made} == {dataset["fingerprint"]}


@pytest.mark.parametrize("id", ["..%2f..%2fetc%2fpasswd", "%2e%2e", "ds_%00", "ds_x%0d%0aX-Evil:%201", "ds_*"])
def test_a_path_in_the_place_of_an_id_finds_nothing(api: "World", id: str) -> None:
    for path in (f"datasets/{id}", f"datasets/{id}/rows", f"selection-jobs/{id}", f"selection-jobs/{id}/export"):
        response = api.client.get(f"/v1/{path}", follow_redirects=False)
        assert response.status_code == 404, path
        assert "x-evil" not in response.headers


@pytest.mark.parametrize("name", ["a\r\nX-Evil: 1", 'a"; filename="b\n', "a\0b", "\x7f"])
def test_a_name_cannot_reach_a_header(api: "World", name: str) -> None:
    response = api.client.post("/v1/datasets", params={"name": name}, content=b'{"text": "t"}')
    assert response.status_code == 422
    assert "x-evil" not in response.headers


@pytest.mark.parametrize("field", ["pool", "target", "model"])
@pytest.mark.parametrize(
    "value",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "file:///etc/passwd",
        "http://169.254.169.254/latest/meta-data",
        "s3://bucket/key",
        "..",
        "models/../../etc",
        "\\\\host\\share",
    ],
)
def test_no_request_names_a_path_or_a_url(
    api: "World", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: str
) -> None:
    monkeypatch.setattr("service.models.registry.HfApi", lambda: pytest.fail("the hub is asked"))
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text('{"model_type": "llama", "num_hidden_layers": 30}')
    dataset = api.client.post("/v1/datasets", params={"name": "d"}, content=b'{"text": "t"}').json()["id"]
    request = {"model": "m", "pool": dataset, "target": dataset, "budget": 1, field: value}
    response = api.client.post("/v1/selection-jobs", json=request)
    assert response.status_code == 422, response.text
    assert response.json()["param"] == field
    assert api.client.get("/v1/selection-jobs").json()["data"] == []


@pytest.mark.parametrize("size", ["num_hidden_layers", "vocab_size", "head_dim"])
@pytest.mark.parametrize("value", ["Infinity", "NaN", "-1", "1" + "0" * 400])
def test_a_hostile_model_folder_breaks_neither_the_list_nor_another_model(
    api: "World", tmp_path: Path, size: str, value: str
) -> None:
    sizes = {"num_hidden_layers": "6", size: value}
    for name, of in (("good", {"num_hidden_layers": "6"}), ("bad", sizes)):
        (tmp_path / name).mkdir()
        entries = "".join(f', "{entry}": {text}' for entry, text in of.items())
        (tmp_path / name / "config.json").write_text(f'{{"model_type": "llama"{entries}}}')
    listed = api.client.get("/v1/models")
    assert listed.status_code == 200, listed.text
    found = {model["name"]: model["problem"] for model in listed.json()["data"]}
    assert found["good"] is None
    assert size in found["bad"]
    assert str(tmp_path) not in listed.text
    dataset = api.client.post("/v1/datasets", params={"name": "d"}, content=b'{"text": "t"}').json()["id"]
    request = {"pool": dataset, "target": dataset, "budget": 1, "dry_run": True}
    assert api.client.post("/v1/selection-jobs", json={**request, "model": "good"}).status_code == 200
    refused = api.client.post("/v1/selection-jobs", json={**request, "model": "bad"})
    assert (refused.status_code, refused.json()["param"]) == (422, "model")
    assert size in refused.json()["detail"]


@pytest.mark.parametrize("framed", [bytes, lambda body: iter([body])], ids=["announced", "chunked"])
def test_a_body_of_nested_lists_takes_no_memory(api: "World", framed: Callable[[bytes], Any]) -> None:
    """Parsed, each byte of it would be thirty."""
    body, headers = b"[[],[]," * (30 * MIB // 7), {"content-type": "application/json"}
    with serving(api.app) as url:
        for key, status in ({}, 401), ({"authorization": f"Bearer {api.key}"}, 413):
            with growth_bounded(4 * len(body)):  # of which most are this client's
                answer = httpx.post(f"{url}/v1/selection-jobs", content=framed(body), headers=headers | key)
            assert answer.status_code == status
            assert httpx.get(f"{url}/healthz").status_code == 200


def test_a_compute_process_beyond_its_memory_ends_the_attempt_and_says_so(
    settings: ApiSettings, tmp_path: Path
) -> None:
    """A chat template of a few characters asks for ten gigabytes."""
    model = save_model(tmp_path / "greedy", template="{{ 'a' * 10000000000 }}")
    store = ArtifactStore(settings.artifacts.url)
    sample = json.dumps({"messages": turns("question", "answer")})
    with ContentWriter(tmp_path) as writer:
        writer.append(CanonicalRow("a", None, sample))
    storage.publish(store, writer.content())
    pool = writer.content().fingerprint
    worker = settings.worker.model_copy(update={"device": "cpu", "threads": 1, "memory_bytes": 3 * 2**30})
    job = JobInputs(
        model={"kind": "registered", "name": model.name},
        pool=pool,
        target=pool,
        budget=1,
        parameters=Parameters(method="random").model_dump(mode="json"),
    )
    child = ComputeProcess(settings.model_copy(update={"worker": worker}))
    try:
        child.send(type="run", stage="prepare", artifact_key="p", spec={}, job=job.as_dict(), prepared={}, halvings=0)
        deadline = time.monotonic() + PATIENCE
        while (message := child.receive(1) or {"type": "none"})["type"] != "failed":
            assert time.monotonic() < deadline
            assert message["type"] in ("none", "alive", "ready"), message
        assert message["error"]["code"] == "out_of_memory", message
        assert "3.0 GiB (WINNOW_WORKER__MEMORY_BYTES)" in message["error"]["detail"]
        assert child.is_alive
        assert psutil.Process(child.pid).memory_info().rss < 3 * 2**30
    finally:
        child.stop(grace_seconds=5)


def test_a_worker_does_not_start_beside_packages_that_run_what_a_model_says(tmp_path: Path) -> None:
    for name, version in (("kernels", "0.18.2"), ("transformers", "5.2.0")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "WINNOW_DATABASE__URL": "postgresql://nobody@127.0.0.1:1/none",
        "WINNOW_BROKER__URL": "redis://127.0.0.1:1",
        "WINNOW_ARTIFACTS__URL": str(tmp_path),
        "WINNOW_MODELS__FOLDER": str(tmp_path),
    }
    command = [sys.executable, "-m", "celery", "-A", "worker.celery_app", "worker", "-P", "threads", "-c", "1"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == os.EX_CONFIG, ended.stderr
    assert "kernels 0.18.2 is installed" in ended.stderr
    assert "transformers 5.2.0 is older than 5.3" in ended.stderr


def test_every_attack_that_the_documentation_lists_is_made_by_a_test() -> None:
    named = re.findall(
        r"`(tests/[\w/]+/test_\w+\.py)::(?:(\w+)::)?(test_\w+)`", (ROOT / "docs/security.md").read_text()
    )
    assert len(named) > 20
    for file, _, test in named:
        tree = ast.parse((ROOT / file).read_text())
        assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"
