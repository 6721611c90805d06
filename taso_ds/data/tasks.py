"""What a record of each task means: the prompt, the gold continuation, the options and the headline metric.

A task makes one ``Example`` of one record, which has the columns of the Hugging Face Hub or of a local file. No
tokenizer, no file and no model is known here, so a new task is one builder and one entry. Choice tasks are scored by
the likelihood of their continuations, so every option begins with its space.
"""

import hashlib
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from taso_ds.errors import UserError, nearest

Record = Mapping[str, Any]  # one row of a source: columns by name


@dataclass(frozen=True)
class Example:
    """One record as the model meets it.

    Attributes:
        prompt: read by the model, never supervised (decoder).
        completion: the gold continuation with its leading space; supervised.
        options: choice tasks: every continuation, in label order.
        target: the gold answer: option index (choice), score (regression), reference text (generation, completion).
        texts: one or two texts for an encoder; empty where the task has no classification head.
        place: where the record stands in its source, counted from 1; 0 where it has none.
    """

    prompt: str
    completion: str
    options: tuple[str, ...] = ()
    target: int | float | str = ""
    texts: tuple[str, ...] = ()
    place: int = 0


@dataclass(frozen=True)
class Task:
    """A data set together with how it is asked and scored.

    Attributes:
        name: what ``--task`` takes.
        kind: "choice", "generation" or "completion".
        metrics: names known to ``taso_ds.objectives.metrics``. The first is the headline; without any, the loss is.
        build: makes an example of a record; raises UserError where the record lacks what the task needs.
        labels: label names of a classification head; empty if the task has none.
        is_regression: the head has one output; a decoder predicts the likelihood-weighted mean of the options.
        hub: path and configuration name for ``datasets.load_dataset``; the path is empty where the Hub has none.
        folders: names to look for under a local data folder.
        eval_split: the split whose score the literature reports.
    """

    name: str
    kind: str
    metrics: tuple[str, ...]
    build: Callable[[Record], Example]
    labels: tuple[str, ...] = ()
    is_regression: bool = False
    hub: tuple[str, str | None] = ("", None)
    folders: tuple[str, ...] = ()
    eval_split: str = "validation"

    @property
    def num_labels(self) -> int:
        """Outputs of a classification head; 0 if the task has none."""
        return 1 if self.is_regression else len(self.labels)


def get_task(name: str) -> Task:
    """Return the task of this name, or raise a UserError with the nearest known one."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}{nearest(name, list(TASKS))}; known: {', '.join(TASKS)}")
    return TASKS[name]


_MOST_NAMES, _LONGEST_SHOWN = 12, 80  # of a record, in one line of an error

# Reading a record ----------------------------------------------------------------------------------------


def _require(record: Record, *names: str) -> None:
    missing = [name for name in names if name not in record]
    if missing:
        raise UserError(f"missing field(s) {_quoted(missing)}; the record has {_quoted(sorted(record))}")


def _text(record: Record, name: str) -> str:
    """Return a text field without the blanks around it, in which copies of one data set differ (SST-2)."""
    value = record[name]
    if not isinstance(value, str):
        raise UserError(f"field {name!r} must be text, found {_shown(value)}")
    return value.strip()


def _label(record: Record, num_labels: int, name: str = "label") -> int:
    value = record[name]
    if value == -1:  # how the Hub marks the test labels that GLUE and SuperGLUE never published
        raise UserError(f"field {name!r} is -1: this split has hidden test labels; use a labelled split")
    if not isinstance(value, int) or not 0 <= value < num_labels:
        raise UserError(f"field {name!r} must be an integer from 0 to {num_labels - 1}, found {_shown(value)}")
    return int(value)


def _quoted(names: Sequence[str]) -> str:
    shown = [_shown(name) for name in names[:_MOST_NAMES]]
    more = [f"and {len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else []
    return ", ".join(shown + more) or "no field"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


# Builders ------------------------------------------------------------------------------------------------


def _classification(
    fields: tuple[str, ...], template: str, options: tuple[str, ...], *, head: bool = True
) -> Callable[[Record], Example]:
    """Return the builder of a task whose label picks one of the same few words for every record."""

    def build(record: Record) -> Example:
        _require(record, *fields, "label")
        values = {name: _text(record, name) for name in fields}
        target = _label(record, len(options))
        texts = tuple(values.values()) if head else ()
        return Example(template.format(**values), options[target], options, target, texts)

    return build


def _boolq(record: Record) -> Example:
    # The gold is "answer" (true or false) on the Hub, and "label" (1 = yes) in local copies. The passage is optional
    # because commonsense suites ask the questions alone.
    gold = "label" if "label" in record else "answer"
    _require(record, "question", gold)
    question = _text(record, "question").removesuffix("?") + "?"
    passage = _text(record, "passage") if "passage" in record else ""
    prompt = (f"{passage}\n" if passage else "") + f"Question: {question}\nAnswer:"
    options = (" no", " yes")
    target = _label(record, len(options), gold)
    return Example(prompt, options[target], options, target, (question, passage) if passage else (question,))


def _stsb(record: Record) -> Example:
    _require(record, "sentence1", "sentence2", "label")
    first, second, score = _text(record, "sentence1"), _text(record, "sentence2"), record["label"]
    if score == -1:
        raise UserError("field 'label' is -1: this split has hidden test labels; use a labelled split")
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 5:
        raise UserError(f"field 'label' must be a similarity from 0 to 5, found {_shown(score)}")
    prompt = (
        f"Sentence 1: {first}\nSentence 2: {second}\n"
        "Question: How similar in meaning are the two sentences, from 0 to 5?\nAnswer:"
    )
    options = tuple(f" {rating}" for rating in range(6))
    nearest_rating = int(score + 0.5)  # half up; round() would send both 1.5 and 2.5 to 2
    return Example(prompt, options[nearest_rating], options, float(score), (first, second))


def _lettered(question: str, choices: Sequence[str], target: int, *, context: str = "") -> Example:
    letters = string.ascii_uppercase[: len(choices)]
    lines = [context] if context else []
    lines += [f"Question: {question}", *(f"{a}. {b}" for a, b in zip(letters, choices, strict=True)), "Answer:"]
    options = tuple(f" {letter}" for letter in letters)
    return Example("\n".join(lines), options[target], options, target)


def _arc(record: Record) -> Example:
    _require(record, "question", "choices")
    choices = record["choices"]
    if isinstance(choices, Mapping):  # the Hub: {"text": [...], "label": ["A", ...] or ["1", ...]} and answerKey
        _require(record, "answerKey")
        _require(choices, "text", "label")
        texts, keys, answer = choices["text"], choices["label"], record["answerKey"]
        if not isinstance(texts, list) or not isinstance(keys, list) or len(texts) != len(keys):
            raise UserError(f"field 'choices' must hold as many labels as texts, found {_shown(choices)}")
        if answer not in keys:
            raise UserError(f"field 'answerKey' must be one of {_quoted(keys)}, found {_shown(answer)}")
        target = keys.index(answer)
    else:
        _require(record, "label")
        if not isinstance(choices, list):
            raise UserError(f"field 'choices' must be a list of texts, found {_shown(choices)}")
        texts, target = choices, _label(record, len(choices))
    if not 2 <= len(texts) <= len(string.ascii_uppercase):
        raise UserError(f"field 'choices' must hold 2 to {len(string.ascii_uppercase)} texts, found {len(texts)}")
    return _lettered(_text(record, "question"), [str(text).strip() for text in texts], target)


def _sciq(record: Record) -> Example:
    names = ("correct_answer", "distractor1", "distractor2", "distractor3")
    _require(record, "question", "support", *names)
    question = _text(record, "question")

    def place(name: str) -> str:
        # The gold stands in a column of its own, so the order has to be made. A hash of the texts gives every
        # record its own order, the same on every machine and in every split of the data.
        return hashlib.sha256(f"{question}\0{_text(record, name)}".encode()).hexdigest()

    order = sorted(names, key=place)
    choices = [_text(record, name) for name in order]
    return _lettered(question, choices, order.index("correct_answer"), context=_text(record, "support"))


def _gsm8k(record: Record) -> Example:
    _require(record, "question", "answer")
    answer = _text(record, "answer")
    return Example(f"Question: {_text(record, 'question')}\nAnswer:", f" {answer}", target=answer)


def _completion(record: Record) -> Example:
    _require(record, "prompt", "completion")
    _text(record, "prompt")
    # Taken as written: blanks and line ends around a user's own texts are part of what is learned.
    return Example(record["prompt"], record["completion"], target=_text(record, "completion"))


# The table -----------------------------------------------------------------------------------------------

_NO_YES = (" no", " yes")

_ALL = (
    # GSM8K has no validation split; every paper reports test.
    Task("gsm8k", "generation", ("exact_match",), _gsm8k, hub=("openai/gsm8k", "main"), eval_split="test"),
    Task("boolq", "choice", ("accuracy",), _boolq, labels=("no", "yes"), hub=("google/boolq", None)),
    # SuperGLUE keeps the test labels of WiC (and BoolQ), so fine-tuning papers report validation.
    Task(
        "wic",
        "choice",
        ("accuracy",),
        _classification(
            ("word", "sentence1", "sentence2"),
            "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
            "Question: Does the word '{word}' have the same meaning in both sentences?\nAnswer:",
            _NO_YES,
            head=False,  # a pair classifier would not be told which word is meant
        ),
        hub=("aps/super_glue", "wic"),
    ),
    # The test labels of ARC and SciQ are public, and test is what papers and leaderboards report.
    Task(
        "arc_challenge",
        "choice",
        ("accuracy",),
        _arc,
        hub=("allenai/ai2_arc", "ARC-Challenge"),
        folders=("arc_challenge", "arc_c", "ARC-Challenge"),
        eval_split="test",
    ),
    Task(
        "arc_easy",
        "choice",
        ("accuracy",),
        _arc,
        hub=("allenai/ai2_arc", "ARC-Easy"),
        folders=("arc_easy", "arc_e", "ARC-Easy"),
        eval_split="test",
    ),
    Task("sciq", "choice", ("accuracy",), _sciq, hub=("allenai/sciq", None), eval_split="test"),
    # GLUE, with the Hub's labels: 0 = entailment for rte and qnli, 1 = equivalent, positive, acceptable.
    Task(
        "rte",
        "choice",
        ("accuracy",),
        _classification(
            ("sentence1", "sentence2"),
            "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:",
            (" True", " False"),
        ),
        labels=("entailment", "not_entailment"),
        hub=("nyu-mll/glue", "rte"),
    ),
    Task(
        "mrpc",
        "choice",
        ("accuracy", "f1"),
        _classification(
            ("sentence1", "sentence2"),
            "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
            "Question: Do both sentences mean the same thing?\nAnswer:",
            _NO_YES,
        ),
        labels=("not_equivalent", "equivalent"),
        hub=("nyu-mll/glue", "mrpc"),
    ),
    Task(
        "sst2",
        "choice",
        ("accuracy",),
        _classification(
            ("sentence",),
            "{sentence}\nQuestion: Is this sentence negative or positive?\nAnswer:",
            (" negative", " positive"),
        ),
        labels=("negative", "positive"),
        hub=("nyu-mll/glue", "sst2"),
    ),
    Task(
        "cola",
        "choice",
        ("matthews_correlation", "accuracy"),
        _classification(
            ("sentence",),
            "{sentence}\nQuestion: Is this sentence grammatically acceptable?\nAnswer:",
            _NO_YES,
        ),
        labels=("unacceptable", "acceptable"),
        hub=("nyu-mll/glue", "cola"),
    ),
    Task(
        "stsb",
        "choice",
        ("pearson", "spearman"),
        _stsb,
        is_regression=True,
        hub=("nyu-mll/glue", "stsb"),
    ),
    Task(
        "qnli",
        "choice",
        ("accuracy",),
        _classification(
            ("question", "sentence"),
            "{sentence}\nQuestion: {question}\nDoes the text above answer the question?\nAnswer:",
            (" yes", " no"),
        ),
        labels=("entailment", "not_entailment"),
        hub=("nyu-mll/glue", "qnli"),
    ),
    # A user's own records. The loss is always reported. A metric, of generated answers, is reported if it is asked for.
    Task("completion", "completion", (), _completion),
)


def _with_folder(task: Task) -> Task:
    """Let a task without other names be found in the folder of its own name."""
    return task if task.folders else replace(task, folders=(task.name,))


TASKS: dict[str, Task] = {task.name: _with_folder(task) for task in _ALL}
