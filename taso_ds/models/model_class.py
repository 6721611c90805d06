"""Which transformers class a base is loaded as. Its configuration decides that before anything else is read.

There are two: a causal language model, or a model with a classification head. transformers knows for every type of
configuration which of them it has.
"""

from typing import TYPE_CHECKING, Any

from taso_ds.errors import UserError
from taso_ds.models.arguments import ModelArguments

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LM_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def model_class(*, head: bool) -> Any:  # transformers types hold neither the pair it may return nor its table
    """Return the ``Auto`` class of transformers, which finds the class of a configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if head else AutoModelForCausalLM


def wants_head(arguments: ModelArguments, config: "PretrainedConfig") -> bool:
    """Say whether the base gets a classification head: the flag asks for it, or the base has no language-model head.

    Raises:
        UserError: when transformers has no such class for this configuration.
    """
    if arguments.head != "auto":
        head = arguments.head == "classification"
    elif arguments.gguf_file is not None:
        head = False  # the format holds language models, and does not name their class
    else:
        said = _said_by(config)
        head = (_exists(config, head=True) or not _exists(config, head=False)) if said is None else said
    _check(arguments, config, head=head)
    return head


def choice_in_words(arguments: ModelArguments, config: "PretrainedConfig") -> str | None:
    """Return one line on how the class was chosen; None where the flag or ``config.json`` says it."""
    if arguments.head != "auto" or arguments.gguf_file is not None or _said_by(config) is not None:
        return None
    named = f"names {_architectures(config)}" if _architectures(config) else "names no architectures"
    if not wants_head(arguments, config):
        return f"head: lm, for config.json {named} and transformers has no classification head for {config.model_type}"
    remedy = "" if _is_encoder(config) or not _exists(config, head=False) else "; --head lm trains a language model"
    return f"head: classification, for config.json {named}, which has no language-model head{remedy}"


def _said_by(config: "PretrainedConfig") -> bool | None:
    """Return whether the class in ``config.json`` has a classification head; None when it has neither head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = list(config.architectures or [])
    if any(name.endswith(_LM_SUFFIXES) or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in names):
        return False
    return True if any(name.endswith("ForSequenceClassification") for name in names) else None


def _check(arguments: ModelArguments, config: "PretrainedConfig", *, head: bool) -> None:
    what = f"model_name_or_path: {arguments.model_name_or_path} ({_architectures(config) or config.model_type})"
    if not head and getattr(config, "is_encoder_decoder", False) and "ForCausalLM" not in _architectures(config):
        raise UserError(f"{what} is an encoder-decoder, which is no causal language model{_other(config, head=head)}")
    if _exists(config, head=head):
        return
    if not _exists(config, head=not head):
        raise UserError(
            f"{what} cannot be trained on text: transformers loads it neither as a causal language model nor with a"
            " classification head"
        )
    lacking = "a classification head" if head else "a causal language model"
    raise UserError(f"{what} cannot be loaded as {lacking}{_other(config, head=head)}")


def _other(config: "PretrainedConfig", *, head: bool) -> str:
    """Return the remedy: the other head, where there is one."""
    if not _exists(config, head=not head):
        return ""
    return "; --head lm trains it as a language model" if head else "; --head classification gives it a head for labels"


def _exists(config: "PretrainedConfig", *, head: bool) -> bool:
    """Say whether transformers, or the code that comes with the checkpoint, has the class."""
    auto = model_class(head=head)
    return auto.__name__ in (getattr(config, "auto_map", None) or {}) or type(config) in auto._model_mapping


def _is_encoder(config: "PretrainedConfig") -> bool:
    from transformers import AutoModelForMaskedLM

    return type(config) in AutoModelForMaskedLM._model_mapping


def _architectures(config: "PretrainedConfig") -> str:
    return ", ".join(config.architectures or [])
