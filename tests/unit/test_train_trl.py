"""examples/train_trl.py: what it learns, and how weights count."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.preset_samples import SAMPLES
from support.tiny import save_model, turns
from train_trl import lines, selection, trainer

pytestmark = pytest.mark.filterwarnings("default")  # TRL's own

ROWS = [
    {"id": "short", "messages": turns("say 1", "yes"), "weight": 1.0},
    {"id": "twice", "messages": turns("say 2", "yes yes", "more", "done, and then some more"), "weight": 2.0},
    {"id": "long", "messages": turns("say 3", "yes yes yes, all of it, every word of it"), "weight": 3.0},
]


def rows(*which: str) -> Dataset:
    samples = [SAMPLES[name] for name in which]
    return Dataset.from_list([{"id": each.id, "messages": each.messages, "weight": 1.0} for each in samples])


def test_a_line_is_a_reply_that_counts_after_all_that_came_before() -> None:
    found = lines(rows("plain", "several", "mixed"))
    assert [line["completion"][0]["content"] for line in found] == ["A\n1", "b", "d", "b", "f"]
    assert [message["content"] for message in found[2]["prompt"]] == ["a", "b", "c"]
    assert {line["completion"][0]["role"] for line in found} == {"assistant"}
    assert "counts" not in str(found.features)


def test_a_text_is_refused_by_its_id() -> None:
    with pytest.raises(SystemExit, match="'essay'"):
        lines(Dataset.from_list([{"id": "essay", "text": "All of it counts.", "weight": 1.0}]))


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "Hello."}, *turns("say 1", "yes")],
        [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "yes", "counts": False}],
    ],
)
def test_what_has_no_line_is_refused_by_its_id(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(SystemExit, match="'odd'"):
        lines(Dataset.from_list([{"id": "odd", "messages": messages, "weight": 1.0}]))


def test_the_file_of_an_export_is_read(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(tmp_path / "train.parquet")
    assert lines(selection(str(tmp_path / "train.parquet")))["weight"] == [1, 2, 2, 3]


def test_a_reply_that_a_limit_cuts_away_is_an_error(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    data = lines(Dataset.from_list(ROWS))
    with pytest.raises(SystemExit, match=r"max_length=4 .* 4 lines"):
        trainer(str(tmp_path / "model"), data, str(tmp_path / "out"), max_length=4)


def trained(folder: Path, rows: list[dict[str, Any]], *, weighted: bool, **options: Any) -> torch.Tensor:
    """The parameters after two steps, each on all rows."""
    fixed = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    made = trainer(
        str(folder / "model"),
        lines(Dataset.from_list(rows)),
        str(folder / "out"),
        weighted=weighted,
        max_steps=2,
        **fixed,
        **options,
    )
    made.train()
    return torch.cat([parameter.detach().flatten() for parameter in made.model.parameters()])


def test_a_weight_counts_like_the_line_repeated(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    weighted = trained(tmp_path, ROWS, weighted=True, per_device_train_batch_size=4)
    in_parts = trained(tmp_path, ROWS, weighted=True, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    copies = [row for row in ROWS for _ in range(int(row["weight"]))]
    repeated = trained(tmp_path, copies, weighted=False, per_device_train_batch_size=8)
    alike = trained(tmp_path, ROWS, weighted=False, per_device_train_batch_size=4)
    torch.testing.assert_close(weighted, repeated, rtol=0, atol=1e-5)
    torch.testing.assert_close(in_parts, repeated, rtol=0, atol=1e-5)
    assert (weighted - alike).abs().max() > 0.01


def test_what_is_not_weighted_is_trained_on_alike(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    alike = [{**row, "weight": 1.0} for row in ROWS]
    plain = trained(tmp_path, ROWS, weighted=False, per_device_train_batch_size=4)
    torch.testing.assert_close(
        trained(tmp_path, alike, weighted=True, per_device_train_batch_size=4), plain, rtol=0, atol=1e-5
    )
