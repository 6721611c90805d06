"""Parts of a model that text never goes through: the towers of other senses, and what joins them to the text model.

transformers gives every model within a model ``input_modalities`` and ``main_input_name``. One that takes no text is a
tower. Some models take text and more, and hold a model that takes text alone. The inner one does all the work on text
then; what stands beside it, such as a projector, works on what the towers return.
"""

from collections.abc import Iterable

from torch import nn


def textless_parts(model: nn.Module) -> list[str]:
    """Return the names of the outermost modules that text never goes through; most models have none."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not name or inside(name, found):
            continue
        senses = _senses(module)
        if senses and "text" not in senses:
            found.append(name)
        elif len(senses) > 1 and any(_senses(child) == {"text"} for child in module.children()):
            found += [f"{name}.{key}" for key, child in module.named_children() if _senses(child) != {"text"}]
    return [name for name in found if any(True for _ in model.get_submodule(name).parameters())]


def inside(name: str, parts: Iterable[str]) -> bool:
    """Say whether a module or parameter is one of these modules or belongs to one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def left_out_in_words(model: nn.Module) -> str | None:
    """Return one line on the parts that text never goes through, with their share of the model, or None.

    Args:
        model: one with whole parameters, on the meta device too.
    """
    parts = textless_parts(model)
    if not parts:
        return None
    number = sum(value.numel() for name, value in model.named_parameters() if inside(name, parts))
    total = sum(value.numel() for value in model.parameters())
    return (
        f"text model only: {', '.join(parts)} stay as they are, {number:,} of {total:,} parameters"
        f" ({number / total:.1%}) that rows of text never pass"
    )


def _senses(module: nn.Module) -> set[str]:
    """Return what a model within the model takes; nothing for any other module."""
    first_input = getattr(module, "main_input_name", None)
    if first_input is None:
        return set()
    if str(first_input).startswith(("pixel_", "input_features", "input_values")):
        return {str(first_input)}  # a model's own code may not say its modalities
    modalities = getattr(module, "input_modalities", "text")
    return {modalities} if isinstance(modalities, str) else set(modalities)
