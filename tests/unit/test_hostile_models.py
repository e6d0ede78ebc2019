"""Folders of models made to do harm: each ends in an error that says so, and nothing of them is run, followed or waited for."""

import json
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import make_tokenizer, turns

from service.datasets.storage import Sample
from service.models import dependency_check
from worker.errors import ModelError, UnusableRow
from worker.loading import folders, models
from worker.text import chat_templates, templates
from worker.text.chat_templates import ChatFormat

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "models/m"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it asks the network"))


def find(folder: Path, name: str = "m") -> folders.ModelFolder:
    return folders.find({"kind": "registered", "name": name}, folder.parent)


def load(folder: Path) -> object:
    return models.load_model(find(folder), torch.float32, CPU)


def change(folder: Path, file: str = "config.json", **changes: Any) -> None:
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **changes}))


@pytest.mark.parametrize(
    "config",
    [
        {"_attn_implementation": "evil/kernel"},
        {"attn_implementation": "evil/kernel"},
        {"_experts_implementation": "evil/kernel"},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"hidden_act": "os.system"},
        {"dtype": "evil"},
        {"hidden_size": -1},
        {"hidden_size": "x"},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 0},
        {"vocab_size": 10**12},
        {"head_dim": 10**9},
    ],
    ids=json.dumps,
)
def test_a_configuration_that_wants_more_than_a_model_is_refused(folder: Path, config: dict[str, Any]) -> None:
    """The kernels are those of CVE-2026-4372, by their public names."""
    change(folder, **config)
    with pytest.raises(ModelError, match=r"could not be (loaded|read)|is not usable"):
        load(folder)


def test_a_kernel_that_a_configuration_hides_is_not_fetched(folder: Path) -> None:
    change(folder, _attn_implementation_internal="evil/kernel", _attn_implementation_autoset=True)
    model: Any = load(folder)
    assert "evil" not in str(model.config._attn_implementation)


@pytest.mark.parametrize("shard", ["../../outside.safetensors", "/etc/passwd", "weights.bin", "gone.safetensors", 7])
def test_an_index_names_weights_of_its_own_folder_only(folder: Path, shard: object) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "weights.bin").write_bytes(b"pickle")
    shutil.copy(folder / "model-00001-of-00001.safetensors", folder.parent.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="not a safetensors file beside it"):
        find(folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "../x.safetensors", "pytorch_model.bin"])
def test_a_configuration_cannot_put_a_pickle_in_the_place_of_the_weights(
    folder: Path, tmp_path: Path, name: str
) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(ran), "w")

    torch.save({"lm_head.weight": Evil()}, folder / name)
    change(folder, transformers_weights=name)
    with pytest.raises(ModelError, match="not a safetensors file beside it"):
        load(folder)
    assert not ran.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        (2**62).to_bytes(8, "little") + b"{}",
        (2**20).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (9).to_bytes(8, "little") + b'{"a":null',
    ],
    ids=["nothing", "short", "header of exabytes", "header beyond the file", "no tensor", "cut header"],
)
def test_weights_with_a_lying_header_are_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError):
        load(folder)


@pytest.mark.parametrize(("shape", "end"), [([10**9, 10**5], 4 * 10**14), ([4], 2**63), ([2**40, 2**40], 16)])
def test_weights_that_claim_more_than_the_file_has_are_refused(folder: Path, shape: list[int], end: int) -> None:
    header = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ModelError, match="could not be loaded"):
        load(folder)


_BPE = '{{"version":"1.0","added_tokens":[],"model":{{"type":"BPE","vocab":{{"a":{id}}},"merges":{merges}}}}}'


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "null",
        "[" * 100_000,
        '{"version":"1.0"}',
        _BPE.format(id=10**11, merges="[]"),
        _BPE.format(id=0, merges='["x y"]'),
    ],
    ids=["nothing", "cut", "null", "nested", "no model", "an id beyond 32 bits", "a merge of nothing"],
)
def test_a_malformed_tokenizer_is_refused(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="tokenizer could not be loaded"):
        models.load_tokenizer(find(folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja", "vocab.txt"])
def test_a_file_that_is_too_large_to_be_parsed_is_not_read(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.truncate(folders.MAX_TEXT_BYTES + 1)  # sparse: it takes no room
    with pytest.raises(ModelError, match=rf"{name} has more than 134,217,728 bytes"):
        find(folder)


@pytest.mark.parametrize("name", ["..", "../m", "/etc", ".", "", "a/b", "outside"])
def test_no_name_leads_out_of_the_models_folder(folder: Path, name: str) -> None:
    shutil.copytree(folder, folder.parent.parent / "elsewhere")
    (folder.parent / "outside").symlink_to(folder.parent.parent / "elsewhere")
    with pytest.raises(ModelError, match=r"not a valid name of a registered model|link out of the models folder"):
        find(folder, name)


def rendered(template: str) -> str:
    sample = Sample(0, "s", None, turns("question", "answer"), None)
    return ChatFormat(make_tokenizer(template)).render(sample).text


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].environ }}",
        "{{ messages.append('x') }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception.__globals__ }}",
    ],
)
def test_a_chat_template_does_not_leave_its_sandbox(template: str) -> None:
    with pytest.raises(UnusableRow):
        rendered(template)


def test_a_chat_template_that_loops_for_ever_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_SAMPLE_SECONDS", 1.0)
    monkeypatch.setattr(chat_templates, "_MAX_SLOW", 1)
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    chat = ChatFormat(
        make_tokenizer(
            "{% if messages[0].content == 'loop' %}"
            + loop
            + "{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
        )
    )
    endless, other = (Sample(0, "s", None, turns(first, "answer"), None) for first in ("loop", "question"))
    with pytest.raises(UnusableRow) as row:
        chat.render(endless)
    assert row.value.reason == "template_too_slow"
    assert "answer" in chat.render(other).text
    with pytest.raises(ModelError, match="for each of 2 samples"):
        chat.render(endless)
    failed: list[BaseException] = []

    def elsewhere() -> None:
        try:
            rendered("{% for m in messages %}{{ m.content }}{% endfor %}")
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not failed, "only the main thread can be interrupted; another one renders all the same"


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"torch": "2.6.0+cu124", "transformers": "5.3.0"}, []),
        ({"torch": "2.10.1", "transformers": "10.0"}, []),
        ({}, []),
        ({"torch": "2.5.1", "transformers": "5.3.0"}, ["torch 2.5.1"]),
        ({"torch": "2.6", "transformers": "4.57.1"}, ["transformers 4.57.1"]),
        ({"torch": "2.6", "transformers": "5.3", "kernels": "0.1"}, ["kernels 0.1"]),
    ],
)
def test_packages_that_do_not_keep_the_promise_are_named(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], said: list[str]
) -> None:
    monkeypatch.setattr(dependency_check, "_version", versions.get)
    problems = dependency_check.unsafe_packages()
    assert len(problems) == len(said)
    assert all(problem.startswith(start) for problem, start in zip(problems, said, strict=True))


def test_the_packages_of_this_machine_keep_it() -> None:
    assert dependency_check.unsafe_packages() == []
