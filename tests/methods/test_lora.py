"""PEFT's LoRA beside what else is trained."""

import tiny_models

from taso_ds.methods.lora import attach_lora, lora_parameters


def test_a_head_stays_trainable() -> None:
    """PEFT freezes whatever is not its own."""
    model = tiny_models.bert()
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    attach_lora(model, ["bert.encoder.layer.0.attention.self.query"], rank=2, scaling=1.0, transposed=False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {*lora_parameters(model), "classifier.weight", "classifier.bias"}
    assert len(lora_parameters(model)) == 2
