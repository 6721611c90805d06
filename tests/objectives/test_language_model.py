"""A model that has learned a few dialogues by heart says them again, and stops where its turn ends."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch

from taso_ds.data.arguments import DataArguments
from taso_ds.data.collate import collate
from taso_ds.data.encode import encode_completions, pad_token_id
from taso_ds.data.task_data import TaskData
from taso_ds.data.tasks import Example, Task, get_task
from taso_ds.distributed import comm
from taso_ds.errors import UserError
from taso_ds.objectives.language_model import LanguageModel
from taso_ds.objectives.loss import lm_loss_sum

PAIRS = {"sky": "blue", "grass": "green", "sun": "yellow"}
TEMPLATE = (  # of a family whose turns end with another token than the tokenizer's EOS
    "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}\n{{ m.content | trim }}<end_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


def dialogue_tokenizer() -> Any:
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<end_turn>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def objective(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LanguageModel]:
    monkeypatch.setattr(comm, "device", lambda: torch.device("cpu"))

    def make(task: Task, examples: list[Example]) -> LanguageModel:
        return LanguageModel(
            TaskData(task, [], examples, "", "mine"), DataArguments(max_seq_length=64, use_chat_template=True),
            dialogue_tokenizer(), adapted=(), batch_size=2, max_new_tokens=12,
        )  # fmt: skip

    return make


def measured(*metrics: str) -> Task:
    return replace(get_task("completion"), metrics=metrics)


def examples(**changes: str) -> list[Example]:
    return [Example(ask, f" {say}", target=say) for ask, say in (PAIRS | changes).items()]


@pytest.fixture(scope="module")
def learned() -> Any:
    tokenizer, model = dialogue_tokenizer(), tiny_models.llama()
    rows = encode_completions(
        tokenizer, examples(), max_seq_length=64, append_eos=True, use_chat_template=True, source="mine"
    )
    batch = collate(rows, pad_id=pad_token_id(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        total, units = lm_loss_sum(model, batch)
        (total / units).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_dialogues_learned_by_heart_are_generated_to_their_end(learned: Any, objective: Any) -> None:
    assert learned.generation_config.eos_token_id == 2  # which no dialogue holds: the end of a turn stops it
    scores = objective(measured("exact_match", "rouge"), examples()).evaluate(learned)
    assert (scores["exact_match"], scores["rouge"]) == (1.0, 1.0)
    wrong = objective(measured("exact_match"), examples(sky="black"))
    assert wrong.evaluate(learned)["exact_match"] == pytest.approx(2 / 3)
    assert (wrong.headline, objective(measured(), []).headline) == ("exact_match", "loss")


def test_generation_goes_no_further_than_the_end_of_the_turn(
    learned: Any, objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, lengths = learned.generate, []

    def watched(**settings: Any) -> Any:
        tokens = generate(**settings)
        lengths.append(tokens.shape[1] - settings["input_ids"].shape[1])
        return tokens

    monkeypatch.setattr(learned, "generate", watched)
    objective(measured("exact_match"), examples()).evaluate(learned)
    # Batches of two rows by length: "sky" and "sun", then "grass"; their bytes and the end of the turn.
    assert lengths == [len("yellow") + 1, len("green") + 1]


def test_generation_is_greedy_whatever_the_folder_says(learned: Any, objective: Any) -> None:
    """What a folder recommends for talking to its model is no measure: several answers, searched for or penalized."""
    from transformers import GenerationConfig

    recommended = {"num_beams": 3, "num_return_sequences": 3, "repetition_penalty": 9.0, "max_length": 20}
    said = GenerationConfig(eos_token_id=2, bad_words_ids=[[3 + ord("e") - ord("!")]], **recommended)
    before, learned.generation_config = learned.generation_config, said
    try:
        scores = objective(measured("exact_match"), examples()).evaluate(learned)
        assert learned.generation_config is said  # it is exported with a merged model
    finally:
        learned.generation_config = before
    assert scores["exact_match"] == 1.0


def test_without_a_metric_nothing_is_generated(learned: Any, objective: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "generate", None)
    assert objective(measured(), examples()).evaluate(learned).keys() == {"loss", "num_examples"}


def test_an_answer_needs_positions_too(objective: Any) -> None:
    asked = objective(measured("exact_match"), examples())
    longest = max(len(row.input_ids) for row in asked._prompts)
    asked.check(longest + 12)
    asked.check(None)
    with pytest.raises(
        UserError, match=rf"^max_new_tokens: 12 behind .* {longest} tokens, .* {longest + 11} positions"
    ):
        asked.check(longest + 11)
    objective(measured(), examples()).check(1)  # nothing is generated
