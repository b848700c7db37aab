"""Names of tensors in a checkpoint.

Weights have the names that Hugging Face gives them, and those of adapters the names of ``peft``, so that other programs
find them. The rest of a state is under ``optimizer/`` and ``random/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lossfns.errors import LossInputError

OPTIMIZER, RANDOM = "optimizer/", "random/"


def public_names(model: nn.Module) -> dict[str, str]:
    """Map the name of each tensor of a model to its name in a checkpoint.

    A model of transformers is found within ``CausalLM`` by its ``prefix``. A weight is named as if it had no adapter.

    Raises:
        LossInputError: for a model in which two tensors would have one name.
    """
    prefix = getattr(model, "prefix", "")
    names = {name: public_name(name.removeprefix(prefix)) for name in model.state_dict()}
    taken = {public: name for name, public in names.items()}
    wrong = next((x for x in names if taken[names[x]] != x or names[x].startswith((OPTIMIZER, RANDOM))), None)
    if wrong is not None:
        fix = "Rename its module."
        raise LossInputError("model", "parameters that a checkpoint can tell apart", f"{wrong} as {names[wrong]}", fix)
    return names


def public_name(name: str) -> str:
    """Return the name of a tensor as transformers and ``peft`` write it.

    >>> public_name("layers.0.q_proj.base_layer.weight"), public_name("layers.0.q_proj.lora_A.default.weight")
    ('layers.0.q_proj.weight', 'base_model.model.layers.0.q_proj.lora_A.weight')
    """
    if ".lora_" in name:
        return f"base_model.model.{name.replace('.default', '')}"
    return name.replace(".base_layer.", ".")


def renamed(
    model: nn.Module, tensors: Mapping[str, Tensor], data: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the data of a checkpoint of ``model`` by today's names.

    Until 2026-11 names were ``model.NAME``, ``optim.KEY.NAME`` and ``random.DEVICE``, with the names of the modules
    here. Checkpoints since then say that their names are "public". Other names are left for the checks to refuse.
    """
    if data.get("names") == "public":
        return dict(tensors), dict(data)
    public = public_names(model)

    def new_name(name: str) -> str:
        kind, _, rest = name.partition(".")
        if kind == "optim":
            key, _, parameter = rest.partition(".")
            return f"{OPTIMIZER}{key}/{public.get(parameter, parameter)}"
        return public.get(rest, name) if kind == "model" else f"{RANDOM}{rest}" if kind == "random" else name

    stepped = data.get("stepped")
    if isinstance(stepped, list):
        stepped = sorted(public.get(name, name) for name in map(str, stepped))
    return {new_name(name): x for name, x in tensors.items()}, {**data, "stepped": stepped, "names": "public"}
