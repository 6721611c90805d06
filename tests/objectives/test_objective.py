"""An objective is one object: two that come along, and a toy one that nothing else has heard of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_models
import torch
from plain_engine import PlainEngine
from torch import Tensor, nn

from taso_ds.adapters.targets import MatrixShape, Target, Targets
from taso_ds.data.arguments import DataArguments
from taso_ds.data.batch_plan import BatchPlan
from taso_ds.data.collate import collate_head
from taso_ds.data.encode import EncodedRow
from taso_ds.data.task_data import TaskData
from taso_ds.data.tasks import Example, get_task
from taso_ds.errors import UserError
from taso_ds.objectives.batches import Batch, dealt_batches
from taso_ds.objectives.objective import Objective, make_objective
from taso_ds.reports.observer import Observer, StepMetrics
from taso_ds.scoring.score import ScoringSettings, score_regions
from taso_ds.training.arguments import BatchSizes, TrainArguments
from taso_ds.training.feed import Feed
from taso_ds.training.optim import Schedule, make_group, make_optimizer
from taso_ds.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("on_cpu")


def objective_of(task: str, *evaluation: Example, head: bool = False, **arguments: Any) -> Objective:
    data = TaskData(get_task(task), [], list(evaluation), "train rows", "evaluation rows")
    return make_objective(
        data, DataArguments(task=task, max_seq_length=64, **arguments), tiny_models.byte_tokenizer(), head=head,
        adapted=(), batch_size=2, max_new_tokens=4,
    )  # fmt: skip


def test_eos_ends_what_is_generated_but_no_option() -> None:
    tokenizer, example = tiny_models.byte_tokenizer(), Example("a", " b", (" b", " c"), 0)

    def last(task: str) -> int:
        return objective_of(task).encode([example], "mine")[0].labels[-1]

    assert last("boolq") == tokenizer(" b", add_special_tokens=False).input_ids[-1]
    assert last("gsm8k") == last("completion") == tokenizer.eos_token_id


def test_the_model_sees_options_prompts_and_answers() -> None:
    asked = Example("ab", " b", (" b", " cd"), 0)
    rows = list(objective_of("boolq", asked).rows())
    assert [row.num_supervised for row in rows] == [2, 3]
    answered, prompt = objective_of("gsm8k", asked).rows()
    assert (answered.num_supervised, prompt.num_supervised) == (3, 0)  # " b" and its end; nothing
    assert len(list(objective_of("completion", asked).rows())) == 1  # nothing is generated without a metric


@pytest.mark.parametrize(("task", "labels"), [("rte", 2), ("stsb", 1)])
def test_a_head_has_an_output_for_each_label(task: str, labels: int) -> None:
    assert objective_of(task, head=True).num_labels == labels
    assert objective_of(task).num_labels == 0


def test_what_a_head_cannot_do_is_refused() -> None:
    with pytest.raises(UserError, match="task gsm8k has no classification head"):
        objective_of("gsm8k", head=True).encode([], "mine")
    with pytest.raises(UserError, match="use_chat_template is for causal"):
        objective_of("rte", head=True, use_chat_template=True).encode([], "mine")


# A new objective ------------------------------------------------------------------------------------------------------


@dataclass
class TextLength:
    """Learns how long a text is."""

    evaluation: Sequence[Example]
    headline = "mean_error"
    num_labels = 1

    def encode(self, examples: Sequence[Example], source: str) -> list[EncodedRow]:
        return [EncodedRow(list(row.prompt.encode()), [], float(len(row.prompt))) for row in examples]

    def collate(self, rows: Sequence[EncodedRow]) -> Batch:
        return collate_head(rows, pad_id=0, is_regression=True)

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        counted = ~batch["labels"].isnan()
        errors = model(batch["input_ids"], batch["attention_mask"]) - batch["labels"].nan_to_num()
        return (errors**2 * counted).sum(), int(counted.sum())

    def check(self, positions: int | None) -> None:
        assert all(row.prompt for row in self.evaluation)

    def rows(self) -> Iterator[EncodedRow]:
        yield from self.encode(self.evaluation, "evaluation rows")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            loss, number = self.loss_sum(model, self.collate(list(self.rows())))
        return {"loss": float(loss) / number, "mean_error": (float(loss) / number) ** 0.5, "num_examples": number}


class ByteCounter(nn.Module):
    """Adds a number for every byte that is attended to."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.read = nn.Embedding(256, 8), nn.Linear(8, 1, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return (self.read(self.bytes(input_ids))[:, :, 0] * attention_mask).sum(1)  # (batch,)


def texts(number: int, *, start: int = 0) -> list[Example]:
    return [Example("text" + " and more" * (n % 3) + f" {n}", "") for n in range(start, start + number)]


def test_a_new_objective_trains_and_evaluates() -> None:
    objective: Objective = TextLength(texts(5, start=20))
    model, sizes = ByteCounter(), BatchSizes(2, 2, 1)
    rows = objective.encode(texts(11), "mine")
    training = TrainArguments(learning_rate=0.05)
    groups = [make_group(training, "weights", list(model.parameters()))]
    losses: list[float] = []

    class Losses(Observer):
        def on_step(self, metrics: StepMetrics) -> None:
            losses.append(metrics["loss"])

    trainer = Trainer(
        PlainEngine(make_optimizer(groups, training), sizes.grad_accum_steps, model),
        Feed(rows, BatchPlan(len(rows), sizes.global_batch_size, seed=0), sizes, objective.collate),
        loss_sum=objective.loss_sum, groups=groups, schedule=Schedule("linear", 60, 0), logging_steps=1,
        eval_steps=None, observer=Losses(),
    )  # fmt: skip
    objective.check(None)
    before = objective.evaluate(model)
    trainer.fit()
    after = objective.evaluate(model)
    assert after["num_examples"] == 5
    assert losses[-1] < 0.1 * losses[0]
    assert after[objective.headline] < 0.5 * before[objective.headline]


def test_a_new_objective_scores_a_base() -> None:
    objective: Objective = TextLength(texts(5))
    model = ByteCounter().requires_grad_(False)
    dealt = dealt_batches(list(objective.rows()), batch_size=2, collate=objective.collate)
    settings = ScoringSettings("importance", "signed_mean", (0.05,), 0)
    targets = Targets({"read": Target(model.read, MatrixShape(1, 8))})
    batches = [batch for _, batch in dealt]
    scores = score_regions(model, targets, batches, loss_sum=objective.loss_sum, settings=settings)
    assert scores["read"].col_importance.shape == (8,)
    assert scores["read"].row_importance.isfinite().all()
