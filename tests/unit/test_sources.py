"""What `winnow submit` takes for a pool and a target, in every spelling."""

from pathlib import Path

import pytest

from winnow.sources import Dataset, File, HubSplit, Preset, read_source

HUB_ID = "allenai/tulu-v2.5_mix"
COMMIT = "740312add88f781978c0658806c59bc2815b9866"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ds_0193a1b2c3d4e5f60718293a4b5c6d7e", Dataset("ds_0193a1b2c3d4e5f60718293a4b5c6d7e")),
        (f"{HUB_ID}:train", HubSplit(HUB_ID, "train")),
        (f"{HUB_ID}:main:train", HubSplit(HUB_ID, "train", "main")),
        (f"{HUB_ID}@{COMMIT}:train", HubSplit(HUB_ID, "train", revision=COMMIT)),
        (f"{HUB_ID}@refs/pr/12:20231101.en:train_sft", HubSplit(HUB_ID, "train_sft", "20231101.en", "refs/pr/12")),
        (f"{HUB_ID}@v1.0:default:train", HubSplit(HUB_ID, "train", "default", "v1.0")),
        ("preset:gsm8k", Preset("gsm8k")),
        ("preset:gsm8k:48", Preset("gsm8k", 48)),
    ],
)
def test_each_spelling_is_read(text: str, expected: object) -> None:
    assert read_source(text, of_target=True) == expected
    if not isinstance(expected, Preset):
        assert read_source(text, of_target=False) == expected


@pytest.mark.parametrize("name", ["pool.jsonl", "ds_1", "a/b:train", "preset:gsm8k"])
def test_a_file_that_is_there_comes_first(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).touch()
    for of_target in (False, True):
        assert read_source(name, of_target=of_target) == File(Path(name))


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("pool.jsonl", "can be a file, the id of a dataset"),
        ("/nowhere/at/all.jsonl", "No such file"),
        ("org/name", "add its split: org/name:train"),
        ("org/name@main", "add its split: org/name@main:train"),
        ("org/name:", "@revision][:config]:split"),
        ("org/name@:train", "@revision][:config]:split"),
        ("org/name:a:b:c", "@revision][:config]:split"),
        ("https://huggingface.co/datasets/org/name", "@revision][:config]:split"),
        ("", "@revision][:config]:split"),
        (".", "name one of its files"),
        ("preset:", "`winnow targets` lists them"),
        ("preset:gsm8k:", "preset:gsm8k:48"),
        ("preset:gsm8k:0", "preset:gsm8k:48"),
        ("preset:gsm8k:many", "preset:gsm8k:48"),
        ("preset:gsm8k:\u0664", "preset:gsm8k:48"),
    ],
)
def test_what_is_none_is_refused_with_what_to_write(text: str, advice: str) -> None:
    with pytest.raises(ValueError) as error:
        read_source(text, of_target=True)
    assert advice in str(error.value)
    assert str(error.value).startswith(f"{text}: ")


def test_a_preset_is_no_pool() -> None:
    with pytest.raises(ValueError, match="preset:gsm8k: presets are targets"):
        read_source("preset:gsm8k", of_target=False)
    with pytest.raises(ValueError) as error:
        read_source("nowhere", of_target=False)
    assert "preset:" not in str(error.value)
