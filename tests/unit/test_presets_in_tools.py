"""The presets of an export, read by the tools that they are for; the configurations in examples/, by the tools' validators."""

import json
import logging
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from datasets import load_dataset
from support.preset_samples import SAMPLES, TOOLS
from support.tiny import make_tokenizer, save_model

from service.results.presets import LINES, Preset
from service.results.presets.conversations import Unsuitable
from service.results.presets.stream import stream
from winnow.companions import companion

EXAMPLES = Path(__file__).parents[2] / "examples"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def llamafactory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be imported, with other versions of libraries than it asks for, and without the one for sound, which it loads."""
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    sound = ModuleType("torchaudio")
    sound.__spec__ = ModuleSpec("torchaudio", None)
    monkeypatch.setitem(sys.modules, "torchaudio", sound)


def suitable(preset: Preset) -> list[str]:
    names = []
    for name, sample in SAMPLES.items():
        try:
            LINES[preset](sample)
        except Unsuitable:
            continue
        names.append(name)
    return names


def write(folder: Path, preset: Preset, names: list[str]) -> Path:
    """The file as an export has it, and what goes beside it."""
    path = folder / "train.jsonl"
    path.write_bytes(b"".join(stream(lambda: [(SAMPLES[name], 1.0) for name in names], preset, repeated=False)))
    if (beside := companion(preset.value, path)) is not None:
        beside.path.write_text(beside.content)
    return path


@pytest.mark.parametrize("preset", Preset)
def test_datasets_reads_all_lines(preset: Preset, tmp_path: Path) -> None:
    names = suitable(preset)
    path = write(tmp_path, preset, names)
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    lines = [LINES[preset](SAMPLES[name]) for name in names]
    assert set(data.column_names) == {column for line in lines for column in line}
    assert [without_none(row) for row in data] == [without_none(line) for line in lines]


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_none(each) for name, each in value.items() if each is not None}
    return [without_none(each) for each in value] if isinstance(value, list) else value


@pytest.mark.filterwarnings("default")  # TRL's own
@pytest.mark.parametrize(
    ("preset", "names", "options", "learnt"),
    [
        (Preset.TRL, ["plain", "last"], {}, ["A\n1", "d"]),
        (Preset.TRL_MESSAGES, ["several"], {"assistant_only_loss": True}, ["b d"]),
    ],
)
def test_trl_trains_on_replies_alone(
    preset: Preset, names: list[str], options: dict[str, Any], learnt: list[str], tmp_path: Path
) -> None:
    from trl import SFTConfig, SFTTrainer

    path = write(tmp_path, preset, names)
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    fixed = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False}
    trainer = SFTTrainer(
        model=str(save_model(tmp_path / "model")),
        processing_class=tokenizer,
        train_dataset=data,
        args=SFTConfig(output_dir=str(tmp_path / "out"), **fixed, **options),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    found = [learnt_text(tokenizer, labels.tolist()) for labels in batch["labels"]]
    assert sorted(found) == sorted(learnt)
    assert trainer.train().training_loss > 0


def learnt_text(tokenizer: Any, labels: list[int]) -> str:
    """The text of runs of labels, without the tokens that end a turn."""
    runs = "".join("\0" if label == -100 else tokenizer.decode([label]) for label in labels).split("\0")
    return " ".join(run.replace("<|im_end|>", "").strip() for run in runs if run.strip())


def test_axolotl_reads_the_file_by_its_entry(tmp_path: Path) -> None:
    from axolotl.prompt_strategies.chat_template import load
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.datasets import SFTDataset

    names = suitable(Preset.AXOLOTL)
    path = write(tmp_path, Preset.AXOLOTL, names)
    (entry,) = yaml.safe_load(path.with_suffix(".axolotl.yaml").read_text())["datasets"]
    assert SFTDataset(**entry).message_field_training == "train"
    data = load_dataset(entry["ds_type"], data_files=entry["path"], split="train", cache_dir=str(tmp_path / "cache"))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    cfg = DictDefault({"sequence_len": 512, "train_on_inputs": False, "eot_tokens": ["<|im_end|>"]})
    strategy = load(tokenizer, cfg, DictDefault({**entry, "chat_template": "tokenizer_default"}))
    by_name = dict(zip(names, data, strict=True))
    for name, learnt in {"plain": "A\n1", "last": "d", "several": "b d", "mixed": "b f", "trailing": "b"}.items():
        labels = strategy.tokenize_prompt(by_name[name])["labels"]
        assert learnt_text(tokenizer, labels) == learnt
    assert strategy._get_tools(by_name["calls"]) == TOOLS


@pytest.mark.usefixtures("llamafactory")
@pytest.mark.parametrize("preset", [Preset.LLAMAFACTORY, Preset.LLAMAFACTORY_ALPACA])
def test_llama_factory_reads_the_file_by_its_entry(
    preset: Preset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import get_dataset_list
    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams import DataArguments

    names = suitable(preset)
    path = write(tmp_path, preset, names)
    (attributes,) = get_dataset_list(["train"], str(tmp_path))
    assert attributes.dataset_name == path.name
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    converter = get_dataset_converter(attributes.formatting, attributes, DataArguments())
    with caplog.at_level(logging.WARNING):
        found = {name: converter(row) for name, row in zip(names, data, strict=True)}
    assert not caplog.records
    assert all(len(row["_response"]) == 1 for row in found.values())
    assert found["plain"]["_system"] == "Be brief."
    said = [message["content"] for message in found["several"]["_prompt"] + found["several"]["_response"]]
    assert said == ["a", "b", "c", "d"]
    if preset is Preset.LLAMAFACTORY:
        tokenizer = make_tokenizer()
        row = found["calls"]
        pairs = TEMPLATES["qwen"].encode_multiturn(
            tokenizer, row["_prompt"] + row["_response"], row["_system"], row["_tools"]
        )
        texts = [tokenizer.decode(ids) for pair in pairs for ids in pair]
        assert all(part in "".join(texts) for part in ("tide", "Brest", "04:12", "At 04:12."))


@pytest.mark.usefixtures("llamafactory")
def test_version_1_of_llama_factory_reads_the_file(tmp_path: Path) -> None:
    from llamafactory.v1.core.data_engine import DataEngine

    names = [name for name in suitable(Preset.LLAMAFACTORY_V1) if name not in ("reasoning", "calls", "parallel")]
    engine = DataEngine(str(write(tmp_path, Preset.LLAMAFACTORY_V1, names)))
    rows = {name: engine[i] for i, name in enumerate(names)} if len(engine) == len(names) else None
    if rows is None:  # later versions make an entry of each reply that counts
        assert len(engine) > len(names)
    else:
        assert [message["loss_weight"] for message in rows["mixed"]["messages"]] == [0, 1, 0, 0, 0, 1]


def test_axolotl_accepts_the_configuration_of_the_examples() -> None:
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    config = yaml.safe_load((EXAMPLES / "axolotl.yaml").read_text())
    beside = companion("axolotl", Path("train.jsonl"))
    assert beside is not None
    assert config["datasets"] == yaml.safe_load(beside.content)["datasets"]
    accepted = validate_config(DictDefault(config))
    assert (accepted.num_epochs, accepted.excess_length_strategy) == (1, "raise")
    with pytest.raises(ValueError, match="roles_to_train"):
        validate_config(DictDefault({**config, "datasets": [{**config["datasets"][0], "roles_to_train": 1}]}))


@pytest.mark.filterwarnings("default")  # its own
@pytest.mark.usefixtures("llamafactory")
def test_llama_factory_accepts_the_configuration_of_the_examples(tmp_path: Path) -> None:
    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams import get_train_args

    config = yaml.safe_load((EXAMPLES / "llamafactory.yaml").read_text())
    _, data, training, finetuning, _ = get_train_args({**config, "output_dir": str(tmp_path)})
    assert (data.dataset, finetuning.stage, training.num_train_epochs) == (["train"], "sft", 1)
    assert config["template"] in TEMPLATES
    with pytest.raises(ValueError, match="learning_speed"):
        get_train_args({**config, "output_dir": str(tmp_path), "learning_speed": 1})


def test_an_entry_joins_those_that_are_there(tmp_path: Path) -> None:
    info = tmp_path / "dataset_info.json"
    info.write_text('{"mine": {"file_name": "mine.json"}}')
    write(tmp_path, Preset.LLAMAFACTORY, ["plain"])
    assert json.loads(info.read_text()).keys() == {"mine", "train"}
    info.write_text("[]")
    with pytest.raises(ValueError, match=r"dataset_info\.json"):
        companion("llamafactory", tmp_path / "train.jsonl")
    assert companion("trl", tmp_path / "train.jsonl") is None
