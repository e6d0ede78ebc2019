"""Fine-tunes a model with TRL on what a job has selected, on the replies alone, which is what Winnow measured.

pip install winnow-select datasets trl
python examples/train_trl.py job_... --model HuggingFaceTB/SmolLM2-135M-Instruct --out trained

The job may also be the Parquet file of `winnow export job_... train.parquet`. `--weighted` multiplies the loss of each sample by
its weight (`selection: weighted`; the weights of the other selections are all alike).
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import DataCollator
from trl import SFTConfig, SFTTrainer

from winnow import Winnow


def selection(job: str) -> Dataset:
    """The selected rows of a job, or of the Parquet file that was exported from it."""
    if Path(job).is_file():
        return load_dataset("parquet", data_files=job, split="train")
    with Winnow() as winnow:
        return winnow.results(job).to_dataset()


def lines(rows: Dataset) -> Dataset:
    """A line for each reply that counts: the messages before it as `prompt`, itself as `completion`, and the sample's weight.

    SFTTrainer learns the completion of such lines and nothing else. Of `messages` it would learn every token, unless the model's
    chat template marks what the assistant says (`assistant_only_loss=True`), which most do not.
    """

    def replies() -> Iterator[dict[str, Any]]:
        for row in rows:
            if not row.get("messages"):
                raise SystemExit(f"{row['id']!r} is a text, of which every token counts: train on it as `text`")
            messages = [
                {key: value for key, value in message.items() if value is not None} for message in row["messages"]
            ]
            learnt = [
                i
                for i, message in enumerate(messages)
                if message["role"] == "assistant" and message.pop("counts", True)
            ]
            if not learnt or learnt[0] == 0:
                raise SystemExit(f"{row['id']!r} has no reply that counts, or nothing before it: leave the sample out")
            for i in learnt:
                yield {
                    "prompt": messages[:i],
                    "completion": [messages[i]],
                    "tools": row.get("tools"),
                    "weight": row.get("weight", 1.0),
                }

    return Dataset.from_list(list(replies()))


class WithWeights:
    """A collator that adds the samples' weights, (batch,) float32, to what another makes of them."""

    def __init__(self, collate: DataCollator) -> None:
        self.collate = collate

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.collate(samples), "weight": torch.tensor([sample["weight"] for sample in samples])}


class WeightedTrainer(SFTTrainer):
    """SFTTrainer whose loss counts each line as often as its weight says; with whole weights it is that of lines repeated.

    Needs `remove_unused_columns=False`, so that the weights arrive, and no packing.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.data_collator = WithWeights(self.data_collator)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The batches of a step, and what their loss is divided by: the tokens that count, each by its line's weight."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        total = sum((_predicted(batch["labels"]).sum(1) * batch["weight"]).sum() for batch in batches)
        return batches, self.accelerator.gather(total.to(device)).sum()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weight = inputs.pop("weight")
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        logits = outputs.logits[:, :-1].float().transpose(1, 2)
        losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:], reduction="none")  # 0 where nothing counts
        # The gradients of processes are averaged, and each has divided by the tokens of all.
        loss = (losses.sum(1) * weight).sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def _predicted(labels: torch.Tensor) -> torch.Tensor:
    """Which tokens count: (batch, length - 1)."""
    return labels[:, 1:] != -100


def _has_bfloat16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def trainer(model: str, data: Dataset, out: str, *, weighted: bool = False, **options: Any) -> SFTTrainer:
    """What trains the model on the lines and saves it to the folder `out`; `options` are those of SFTConfig."""
    made = (WeightedTrainer if weighted else SFTTrainer)(
        model=model,
        train_dataset=data,
        args=SFTConfig(
            output_dir=out,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=not weighted,
            **{"use_cpu": not torch.accelerator.is_available(), "bf16": _has_bfloat16(), "max_length": None, **options},
        ),
    )
    if lost := len(data) - len(made.train_dataset):
        raise SystemExit(f"max_length={made.args.max_length} leaves nothing of the reply of {lost} lines; raise it")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", help="its id, or the Parquet file of its selection")
    parser.add_argument("--model", required=True, help="a folder, or a name on the hub")
    parser.add_argument("--out", required=True, help="the folder of the trained model")
    parser.add_argument("--weighted", action="store_true", help="multiply the loss of each sample by its weight")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, help="tokens at which a line is cut; by default none is")
    given = parser.parse_args()
    made = trainer(
        given.model,
        lines(selection(given.job)),
        given.out,
        weighted=given.weighted,
        num_train_epochs=given.epochs,
        learning_rate=given.learning_rate,
        per_device_train_batch_size=given.batch,
        max_length=given.max_length,
        logging_steps=1,
    )
    made.train()
    made.save_model()


if __name__ == "__main__":
    main()
