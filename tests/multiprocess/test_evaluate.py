"""Evaluation on two ranks, at stage 0 and 3: the numbers of one process, which are those of plain transformers."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from forked import ForkServer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from taso_ds.config import parse_run_config
from taso_ds.data.tasks import get_task
from taso_ds.distributed import comm
from taso_ds.objectives import classification, inference, language_model, metrics
from taso_ds.objectives.metrics import final_number
from taso_ds.runs import finished

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]

ROWS = 13  # batches of 4, 4, 4 and 1
Found = dict[str, Any]

# On the ranks ---------------------------------------------------------------------------------------------------------

TASKS = {"arc_easy": "lm", "boolq": "lm", "gsm8k": "lm", "completion": "lm", "sst2": "classification"}  # and their head
STAGES = (0, 3)
BATCH_SIZE, MAX_NEW_TOKENS = 4, 6


def config_of(folder: Path, task: str, stage: int) -> Any:
    rows = str(folder / f"{task}.jsonl")
    flags = ["--model_name_or_path", str(folder / task), "--task", task, "--train_file", rows, "--eval_file", rows]
    flags += ["--no_bf16", "--max_seq_length", "128", "--max_new_tokens", str(MAX_NEW_TOKENS), "--head", TASKS[task]]
    flags += ["--per_device_eval_batch_size", str(BATCH_SIZE), "--ds_config", f"zero{stage}.json"]
    if task == "completion":
        flags += ["--eval_metric", "rouge"]
    return parse_run_config(flags)


@contextmanager
def watched() -> Iterator[dict[str, list[Any]]]:
    """Yield what an evaluation deals to this rank, batch by batch, and what it compares."""
    seen: dict[str, list[Any]] = {"dealt": [], "compared": []}
    deal, compute = inference.dealt_batches, metrics.compute_metrics

    def dealt(*args: Any, **options: Any) -> Any:
        batches = deal(*args, **options)
        seen["dealt"].append([ids for ids, _ in batches])
        return batches

    def compared(names: Any, predictions: Any, references: Any) -> Any:
        seen["compared"].append([list(predictions), list(references)])
        return compute(names, predictions, references)

    def replace(deal: Any, compute: Any) -> None:
        inference.dealt_batches = deal
        classification.compute_metrics = language_model.compute_metrics = compute

    replace(dealt, compared)
    try:
        yield seen
    finally:
        replace(deal, compute)


def evaluate_task(folder: Path, task: str, stage: int) -> dict[str, Any]:
    with watched() as seen:
        found = finished.evaluate(config_of(folder, task, stage), None)
    scores = {name: value for name, value in found.items() if name not in ("run", "task")}
    return {"scores": scores, "compared": seen["compared"], "dealt": comm.gather_objects(seen["dealt"])}


def evaluate_all(folder: Path) -> dict[str, Any]:
    return {f"{task} {stage}": evaluate_task(folder, task, stage) for stage in STAGES for task in TASKS}


# The models -----------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_of(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


def model_of(folder: Path, *, head: bool = False) -> Any:
    model_class: Any = AutoModelForSequenceClassification if head else AutoModelForCausalLM
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()


def counting_llama() -> Any:
    """A Llama that says digits only, or nothing more."""
    model, tokenizer = tiny_models.llama(), tiny_models.byte_tokenizer()
    said = [*tokenizer.convert_tokens_to_ids(list("0123456789")), tokenizer.eos_token_id]
    with torch.no_grad():
        silent = torch.ones(tiny_models.VOCABULARY, dtype=torch.bool)
        silent[said] = False
        model.lm_head.weight[silent] = 0.0
    return model


def continuation(model: Any, prompt: str) -> str:
    """Greedy decoding by hand, one row, no cache and no padding."""
    tokenizer = tiny_models.byte_tokenizer()
    ids = tokenizer(prompt).input_ids
    start = len(ids)
    while len(ids) < start + MAX_NEW_TOKENS and ids[-1] != tokenizer.eos_token_id:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


@pytest.fixture(scope="module")
def folder(llama_folder: Path, bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of several lengths, and a model for each task."""
    path = tmp_path_factory.mktemp("evaluation")
    for task in ("arc_easy", "boolq", "completion"):
        shutil.copytree(llama_folder, path / task)
    shutil.copytree(bert_folder, path / "sst2")
    lettered = tiny_models.byte_tokenizer()
    lettered.add_tokens([" A", " B", " C"])  # options of one token, read off one forward
    lettered.save_pretrained(path / "arc_easy")
    counting = counting_llama()
    tiny_models.save(counting, path / "gsm8k")
    texts = [f"{'very ' * (n % 5)}number {n}" for n in range(ROWS)]
    write(
        path / "arc_easy.jsonl",
        [{"question": text, "choices": ["a", "b", "c"], "label": n % 3} for n, text in enumerate(texts)],
    )
    write(path / "boolq.jsonl", [{"question": text, "label": n % 2} for n, text in enumerate(texts)])
    write(path / "completion.jsonl", [{"prompt": text, "completion": f" is {n}"} for n, text in enumerate(texts)])
    write(path / "sst2.jsonl", [{"sentence": text, "label": n % 2} for n, text in enumerate(texts)])
    # Every third answer is what the model will say; the others are what it cannot: too many digits.
    said = [final_number(continuation(counting, f"Question: {text}\nAnswer:")) or "0" for text in texts]
    answers = [said[n] if n % 3 == 0 else "12345678" for n in range(ROWS)]
    rows = [{"question": text, "answer": f"#### {answer}"} for text, answer in zip(texts, answers, strict=True)]
    write(path / "gsm8k.jsonl", rows)
    return path


@pytest.fixture(scope="module")
def two_ranks(fork_server: ForkServer, folder: Path) -> Any:
    return fork_server.run_on_ranks(evaluate_all, 2, folder)


tasks = pytest.mark.parametrize("task", TASKS)


@tasks
@pytest.mark.usefixtures("on_cpu")
def test_two_ranks_find_the_numbers_of_one_process(two_ranks: Found, folder: Path, task: str) -> None:
    alone = evaluate_task(folder, task, 0)
    assert alone["scores"]["num_examples"] == ROWS
    for stage in STAGES:
        found = two_ranks[f"{task} {stage}"]
        assert found["compared"] == alone["compared"], stage
        # Stage 3 computes on gathered copies: the same sums, but another kernel may take them in another order.
        assert found["scores"] == (alone["scores"] if stage == 0 else pytest.approx(alone["scores"], rel=1e-6))


@tasks
def test_every_row_is_dealt_once(two_ranks: Found, task: str) -> None:
    for stage in STAGES:
        ranks = two_ranks[f"{task} {stage}"]["dealt"]
        assert len(ranks) == 2
        for parts in zip(*ranks, strict=True):  # one pass over the rows; generation makes two
            assert len(parts[0]) == len(parts[1])  # equally many forwards on both ranks
            ids = [row for part in parts for batch in part for row in batch]
            number = ROWS * (2 if task == "boolq" else 1)  # each of two options of several tokens takes a row
            assert sorted(ids) == list(range(number))


def log_likelihood(model: Any, prompt: str, completion: str, *, eos: bool) -> tuple[float, int]:
    """Sum over the completion's tokens, and their number; one row, no padding."""
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    head, tail = tokenizer(prompt).input_ids, tokenizer(completion, add_special_tokens=False).input_ids
    tail = [*tail, tokenizer.eos_token_id] if eos else tail
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(tail)[:, None]).sum()), len(tail)


@pytest.mark.parametrize("task", ["arc_easy", "boolq"])
def test_choices_are_those_of_the_highest_likelihood(two_ranks: Found, folder: Path, task: str) -> None:
    model, examples = model_of(folder / task), [get_task(task).build(row) for row in rows_of(folder, task)]
    scored = [[log_likelihood(model, one.prompt, option, eos=False) for option in one.options] for one in examples]
    chosen = [max(range(len(options)), key=lambda n: options[n][0]) for options in scored]
    golds = [options[int(one.target)] for options, one in zip(scored, examples, strict=True)]
    for stage in STAGES:
        found = two_ranks[f"{task} {stage}"]
        assert found["compared"] == [[chosen, [one.target for one in examples]]]
        right = sum(choice == one.target for choice, one in zip(chosen, examples, strict=True))
        assert found["scores"]["accuracy"] == right / ROWS
        loss = -sum(value for value, _ in golds) / sum(number for _, number in golds)
        assert found["scores"]["loss"] == pytest.approx(loss, rel=1e-5)


def test_loss_of_completions_is_the_mean_over_their_tokens(two_ranks: Found, folder: Path) -> None:
    model = model_of(folder / "completion")
    scored = [
        log_likelihood(model, row["prompt"], row["completion"], eos=True) for row in rows_of(folder, "completion")
    ]
    loss = -sum(value for value, _ in scored) / sum(number for _, number in scored)
    said = [continuation(model, row["prompt"]) for row in rows_of(folder, "completion")]
    for stage in STAGES:
        found = two_ranks[f"completion {stage}"]
        assert found["scores"]["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["compared"] == [[said, [row["completion"].strip() for row in rows_of(folder, "completion")]]]


def test_generated_answers_are_those_of_greedy_decoding(two_ranks: Found, folder: Path) -> None:
    model = model_of(folder / "gsm8k")
    said = [
        final_number(continuation(model, f"Question: {row['question']}\nAnswer:")) for row in rows_of(folder, "gsm8k")
    ]
    assert len(set(said)) > ROWS // 2  # the model has something to say
    for stage in STAGES:
        found = two_ranks[f"gsm8k {stage}"]
        ((predictions, references),) = found["compared"]
        assert predictions == said
        right = [n for n in range(ROWS) if predictions[n] == references[n]]
        assert right == list(range(0, ROWS, 3))
        assert found["scores"]["exact_match"] == len(right) / ROWS


def test_a_head_has_the_last_word(two_ranks: Found, folder: Path) -> None:
    model, tokenizer = model_of(folder / "sst2", head=True), tiny_models.byte_tokenizer(types=True)
    rows = rows_of(folder, "sst2")
    with torch.no_grad():
        logits = [model(**tokenizer(row["sentence"], return_tensors="pt")).logits[0] for row in rows]
    chosen, golds = [int(values.argmax()) for values in logits], [row["label"] for row in rows]
    loss = -sum(float(values.log_softmax(-1)[gold]) for values, gold in zip(logits, golds, strict=True)) / ROWS
    for stage in STAGES:
        found = two_ranks[f"sst2 {stage}"]
        assert found["compared"] == [[chosen, golds]]
        assert found["scores"]["loss"] == pytest.approx(loss, rel=1e-5)
