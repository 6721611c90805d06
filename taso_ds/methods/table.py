"""The methods by the name that ``--method`` gives them."""

from taso_ds.methods.full import Full
from taso_ds.methods.lora import Lora
from taso_ds.methods.method import Method
from taso_ds.methods.taso import Taso

METHODS: dict[str, type[Method]] = {"taso": Taso, "lora": Lora, "full": Full}
