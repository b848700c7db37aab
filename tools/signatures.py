"""Compare the public members of the local client with those of the published SDK, and give each difference a reason.

    python -m tools.signatures           # prints the differences from the SDK that the page records
    python -m tools.signatures write     # records the installed `tinker` and writes docs/signatures.md
    python -m tools.signatures render    # writes the page again from its own record, after a change of the client
    python -m tools.signatures check     # exits 1 if the page does not match the installed SDK

The page keeps the record of the SDK: ``read_record`` reads it, and ``render`` writes the page from it.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from lossfns.backend import APIFuture, LocalSamplingClient, LocalTrainingClient, types
from lossfns.backend.client.service import GetServerCapabilitiesResponse, LocalServiceClient
from tools.laws import table

PAGE = Path("docs/signatures.md")

OURS: dict[str, type] = {
    "TrainingClient": LocalTrainingClient,
    "ServiceClient": LocalServiceClient,
    "SamplingClient": LocalSamplingClient,
    "APIFuture": APIFuture,
    "AdamParams": types.AdamParams,
    "SamplingParams": types.SamplingParams,
    "ForwardBackwardOutput": types.ForwardBackwardOutput,
    "OptimStepResponse": types.OptimStepResponse,
    "SaveWeightsResponse": types.SaveResponse,
    "SaveWeightsForSamplerResponse": types.SaveResponse,
    "LoadWeightsResponse": types.LoadWeightsResponse,
    "GetInfoResponse": types.GetInfoResponse,
    "SampleResponse": types.SampleResponse,
    "SampledSequence": types.SampledSequence,
    "GetServerCapabilitiesResponse": GetServerCapabilitiesResponse,
}
"""The local class for each class of the SDK, by the name of the latter."""

Surface = dict[str, str]
"""The public members of a class, as text: a method is ``"(data, loss_fn=None)"``, a field ``"= 0.9"`` or ``"="``."""


# Members of a class


def surface(of: type) -> Surface:
    """Return the members of a class: fields, properties, methods, and the constructor if there are no fields."""
    classes = [kind for kind in of.__mro__ if re.match(r"(tinker|lossfns)(?!\._)", kind.__module__)]
    names = {name: value for kind in reversed(classes) for name, value in vars(kind).items()}
    fields = dict(record_fields(of))
    constructor = {} if fields or "__init__" not in names else {"__init__": member_text(names["__init__"])}
    methods = {name: member_text(value) for name, value in names.items() if not name.startswith("_")}
    return constructor | {name: text for name, text in methods.items() if text and name not in fields} | fields


def record_fields(of: type) -> Iterator[tuple[str, str]]:
    """Yield the fields of a dataclass or of a pydantic model, with their defaults."""
    if dataclasses.is_dataclass(of):
        for field in dataclasses.fields(of):
            if not field.name.startswith("_"):
                default = field.default_factory() if callable(field.default_factory) else field.default
                yield field.name, "=" if default is dataclasses.MISSING else f"= {default!r}"
    for name, field in getattr(of, "model_fields", {}).items():
        yield name, "=" if field.is_required() else f"= {field.get_default(call_default_factory=True)!r}"


def member_text(value: Any) -> str:
    """Return the text of a method or property; an empty string for anything else."""
    if isinstance(value, (property, cached_property)):
        return "property"
    if isinstance(value, (staticmethod, classmethod)):
        return f"static {signature_text(value.__func__, skip=isinstance(value, classmethod))}"
    if not callable(value):
        return ""
    coroutine = any(map(inspect.iscoroutinefunction, (value, inspect.unwrap(value))))  # either may wrap the other
    return f"{'async ' if coroutine else ''}{signature_text(value, skip=True)}"


def signature_text(function: Any, skip: bool) -> str:
    """Return a signature without annotations; ``skip`` leaves out its first parameter."""
    parameters = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(bare[1:] if skip else bare))


def published() -> dict[str, Surface]:
    """Return the members of the SDK's classes as they are installed."""
    import tinker
    from tinker import types as sdk

    homes = (tinker, sdk)
    return {name: surface(next(getattr(h, name) for h in homes if hasattr(h, name))) for name in OURS}


# Differences


class Parameter(NamedTuple):
    """A parameter: its position, or -1 if it is keyword-only, and its default."""

    position: int
    default: str | None


def parse_parameters(text: str) -> dict[str, Parameter]:
    """Parse the parameters of a member's text; a field has none."""
    if "(" not in text:
        return {}
    function = ast.parse(f"def f{text[text.index('(') :]}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    args = function.args
    required = len(args.args) - len(args.defaults)
    defaults = [None] * required + [ast.unparse(x) for x in args.defaults]
    parameters = {a.arg: Parameter(i, default) for i, (a, default) in enumerate(zip(args.args, defaults))}
    keywords = zip(args.kwonlyargs, args.kw_defaults)
    parameters |= {a.arg: Parameter(-1, None if x is None else ast.unparse(x)) for a, x in keywords}
    rest = {f"{stars}{a.arg}": Parameter(-1, None) for stars, a in (("*", args.vararg), ("**", args.kwarg)) if a}
    return parameters | rest


def differences(theirs: Mapping[str, Surface], ours: Mapping[str, Surface]) -> dict[str, str]:
    """Return how the two differ, by place: ``Class.method(parameter)`` or ``Class.member``."""
    found = {}
    for name, members in ours.items():
        for key in dict.fromkeys((*theirs[name], *members)):
            place = f"{name}.{key}"
            if key not in members:
                found[place] = "missing"
            elif key not in theirs[name]:
                found[place] = "added"
            elif place in WHY:
                found |= {} if theirs[name][key] == members[key] else {place: f"differs: `{members[key]}`"}
            else:
                found |= {f"{place}{where}": how for where, how in member_differences(theirs[name][key], members[key])}
    return found


def member_differences(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    """Yield how two members of one name differ: as a whole (``""``), or in a parameter (``"(its name)"``)."""
    kinds = [text.partition("(")[0].strip() for text in (theirs, ours)]
    if kinds[0] != kinds[1] and "property" not in kinds and not same_default(*kinds):  # a property is read like a field
        yield "", f"`{kinds[0] or 'a method'}` there, `{kinds[1] or 'a method'}` here"
    a, b = parse_parameters(theirs), parse_parameters(ours)
    for name in dict.fromkeys((*a, *b)):
        where = f"({name})"
        if name not in b:
            yield where, "missing"
        elif name not in a:
            yield where, "added" if b[name].default is not None or name.startswith("*") else "added, and required"
        elif b[name].position == -1 != a[name].position:
            yield where, "keyword-only"
        elif a[name].position not in (-1, b[name].position):
            yield where, f"at position {b[name].position} instead of {a[name].position}"
        elif a[name].default != b[name].default:
            their_default, our_default = (
                f"`{x.default}` by default" if x.default else "required" for x in (a[name], b[name])
            )
            yield where, f"{our_default}, {their_default} there"


def same_default(theirs: str, ours: str) -> bool:
    """Return whether two defaults have the same value, as 1 and 1.0 have."""
    try:
        return bool(ast.literal_eval(theirs.strip("= ")) == ast.literal_eval(ours.strip("= ")))
    except (SyntaxError, ValueError):
        return False


NO_SERVICE = "There is no service behind the client: no console, no telemetry, no session."
CREATED = "There, the service creates it; here, it is constructed from a model."
RESOLVED = "A client needs no waiting. Code that expects a future of it can read it as one."
EMBEDDING = "Fireworks has losses over embeddings."
FIREWORKS = "Fireworks has it."
ONE_MODEL = "It may be omitted if the service has one model alone."
NOT_SAMPLED = "The local sampler scores other tokens by calls of their own: target_logprobs and top_logprobs."
SCORES = "It scores a prompt without sampling; the SDK asks for these numbers with a sample."
ARRAYS = "Results are lists; numpy.array makes an array of one."
KIND = "Its class says the same."
ALWAYS_SET = "It is always set."
LOCAL = "It describes the local run."

WHY: dict[str, str] = {
    "TrainingClient.__init__": CREATED,
    "TrainingClient.get_telemetry": NO_SERVICE,
    "TrainingClient.get_console_url": NO_SERVICE,
    "TrainingClient.forward(output)": EMBEDDING,
    "TrainingClient.forward(pooling)": EMBEDDING,
    "TrainingClient.forward_backward_custom(output)": EMBEDDING,
    "TrainingClient.forward_backward_custom(pooling)": EMBEDDING,
    "TrainingClient.optim_step(grad_accumulation_normalization)": "Fireworks has it, in the same position.",
    "TrainingClient.save_weights_external": "There is no bucket to export from: `save_state` writes a local file.",
    "TrainingClient.create_sampling_client(record_stability_info)": NO_SERVICE,
    "TrainingClient.save_weights_and_get_sampling_client(record_stability_info)": NO_SERVICE,
    "TrainingClient.save_weights_and_get_sampling_client(kind)": "It is always a snapshot, which is the default there.",
    "TrainingClient.reference": "It gives a reference policy on the same weights, with the adapters switched off.",
    "TrainingClient.export": "It writes the model for `transformers` and `peft`.",
    "TrainingClient.result": RESOLVED,
    "TrainingClient.result_async": RESOLVED,
    "ServiceClient.__init__(models)": "It defines the base models of this service.",
    "ServiceClient.__init__(device)": "It says where the models run.",
    "ServiceClient.__init__(dtype)": "It sets the precision of the models.",
    "ServiceClient.__init__(memory_budget)": "It limits the memory of a request; larger batches are split.",
    "ServiceClient.__init__(mesh)": "It names the processes that share a model.",
    "ServiceClient.__init__(profile)": "It chooses the service to follow where the two differ.",
    "ServiceClient.__init__(user_metadata)": "`models` is the only positional argument.",
    "ServiceClient.__init__(project_id)": "`models` is the only positional argument.",
    "ServiceClient.__init__(display_name)": NO_SERVICE,
    "ServiceClient.__init__(default_headers_overrides)": NO_SERVICE,
    "ServiceClient.__init__(**kwargs)": "An unknown argument is refused.",
    "ServiceClient.holder": NO_SERVICE,
    "ServiceClient.get_telemetry": NO_SERVICE,
    "ServiceClient.get_console_url": NO_SERVICE,
    "ServiceClient.create_rest_client": NO_SERVICE,
    "ServiceClient.close": NO_SERVICE,
    "ServiceClient.copy_weights": "A checkpoint is a file, which can be copied.",
    "ServiceClient.create_custom_loss": "`forward_backward_custom` takes any function, at the cost of a built-in loss.",
    "ServiceClient.create_lora_training_client(base_model)": ONE_MODEL,
    "ServiceClient.create_lora_training_client(alpha)": FIREWORKS,
    "ServiceClient.create_training_client": f"{FIREWORKS} It trains all parameters.",
    "ServiceClient.create_reference_client": f"{FIREWORKS} It cannot change the weights.",
    "SamplingClient.__init__": CREATED,
    "SamplingClient.get_telemetry": NO_SERVICE,
    "SamplingClient.on_queue_state_change": NO_SERVICE,
    "SamplingClient.create": CREATED,
    "SamplingClient.sample(topk_prompt_logprobs)": NOT_SAMPLED,
    "SamplingClient.sample(topk_sample_logprobs)": NOT_SAMPLED,
    "SamplingClient.sample(target_prompt_logprobs)": NOT_SAMPLED,
    "SamplingClient.sample(prompt_alt_tokens_k)": NOT_SAMPLED,
    "SamplingClient.sample(prompt_logprobs_last_n)": NOT_SAMPLED,
    "SamplingClient.compute_logprobs(prompt_logprobs_last_n)": NOT_SAMPLED,
    "SamplingClient.get_base_model": "It samples from a copy of the weights, which has no name.",
    "SamplingClient.get_sampler_handle": NO_SERVICE,
    "SamplingClient.from_sampler_handle": NO_SERVICE,
    "SamplingClient.result": RESOLVED,
    "SamplingClient.result_async": RESOLVED,
    "SamplingClient.target_logprobs": SCORES,
    "SamplingClient.target_logprobs_async": SCORES,
    "SamplingClient.top_logprobs": SCORES,
    "SamplingClient.top_logprobs_async": SCORES,
    "SamplingClient.sample_batch": "It samples for many prompts at once, which is much faster than one by one.",
    "SamplingParams.max_tokens": "Its default limits the length of a sample.",
    "OptimStepResponse.metrics": ALWAYS_SET,
    "LoadWeightsResponse.path": ALWAYS_SET,
    "GetInfoResponse.is_lora": ALWAYS_SET,
    "GetInfoResponse.lora_rank": ALWAYS_SET,
    "GetInfoResponse.model_name": ALWAYS_SET,
    "APIFuture.__init__": "There it is an interface without a constructor.",
    "APIFuture.unread_failure": "The client uses it to raise an error that nobody has read.",
    "SaveWeightsResponse.type": KIND,
    "SaveWeightsResponse.get_console_url": NO_SERVICE,
    "SaveWeightsForSamplerResponse.type": KIND,
    "SaveWeightsForSamplerResponse.get_console_url": NO_SERVICE,
    "SaveWeightsForSamplerResponse.get_playground_url": NO_SERVICE,
    "LoadWeightsResponse.type": KIND,
    "LoadWeightsResponse.model_id": "The client has it, in `get_info`.",
    "GetInfoResponse.type": KIND,
    "GetInfoResponse.optimizer_config": "It is always AdamW.",
    "GetInfoResponse.parameters": LOCAL,
    "GetInfoResponse.device": LOCAL,
    "GetInfoResponse.dtype": LOCAL,
    "GetInfoResponse.steps": LOCAL,
    "GetInfoResponse.profile": LOCAL,
    "GetInfoResponse.attention": LOCAL,
    "SampleResponse.prompt_logprobs_np": ARRAYS,
    "SampleResponse.topk_prompt_logprobs": NOT_SAMPLED,
    "SampleResponse.topk_prompt_logprobs_np": NOT_SAMPLED,
    "SampleResponse.target_prompt_logprobs": NOT_SAMPLED,
    "SampleResponse.prompt_alt_tokens": NOT_SAMPLED,
    "SampleResponse.prompt_cache_hit_tokens": "Nothing is billed.",
    "SampledSequence.sequence_id": NO_SERVICE,
    "SampledSequence.tokens_np": ARRAYS,
    "SampledSequence.logprobs_np": ARRAYS,
    "SampledSequence.topk_logprobs": NOT_SAMPLED,
    "SampledSequence.topk_logprobs_np": NOT_SAMPLED,
}
"""The reason of every difference. The reason of a method holds for its ``_async`` method, too."""


def without_async(place: str) -> str:
    """Return the place of the method that an ``_async`` method belongs to."""
    return place.replace("_async", "", 1)


def reason(place: str) -> str:
    """Return the reason for a difference; an empty string if there is none."""
    return WHY.get(place) or WHY.get(without_async(place), "")


def unexplained(found: Mapping[str, str]) -> list[str]:
    """Return the differences without a reason."""
    return [f"{place}: {how}" for place, how in found.items() if not reason(place)]


def unused_reasons(found: Mapping[str, str]) -> list[str]:
    """Return the places that have a reason but no difference."""
    used = {place if place in WHY else without_async(place) for place in found}
    return [place for place in WHY if place not in used]


# The page


INTRODUCTION = """\
# Signatures of the client and of the SDK

Written by `python -m tools.signatures write`; do not edit. `docs/client.md` explains how to use the client.

Every public method, parameter, default and field in which the local client differs from the SDK, `tinker` {version}, is
listed with its reason. All others are the same. A difference of a method holds for its `_async` method, too.
Annotations are not compared: where the SDK wants its own classes, the client accepts any object with the same
attributes.

`missing` means that only the SDK has it, and `added` that only the client has it. `differs` is followed by the client's
own; `=` is a field without a default."""

RECORD_HEAD = """\
## Record of the SDK

The members of the installed SDK, which the tables above compare."""


def render(theirs: Mapping[str, Surface], version: str) -> str:
    """Return the page. It compares the record of the SDK with the present client."""
    found = differences(theirs, {name: surface(of) for name, of in OURS.items()})
    parts = (
        INTRODUCTION.format(version=version),
        summary(theirs, found),
        *(
            f"## {name}\n\nThe client has `{of.__name__}`.\n\n{difference_table(found, name)}"
            for name, of in OURS.items()
        ),
        RECORD_HEAD,
        "```python\n" + "\n".join(record_lines(theirs)) + "\n```",
    )
    return "\n\n".join(parts) + "\n"


def summary(theirs: Mapping[str, Surface], found: Mapping[str, str]) -> str:
    """Return a table with the number of the SDK's members and of differences for each class."""
    kinds = {name: Counter(map(kind_of, own_differences(found, name).values())) for name in OURS}
    body = ((f"`{name}`", len(theirs[name]), n["missing"], n["added"], n["other"]) for name, n in kinds.items())
    return table(("class", "members of the SDK", "missing", "added", "other differences"), body)


def kind_of(how: str) -> str:
    return how if how in ("missing", "added") else "other"


def own_differences(found: Mapping[str, str], name: str) -> dict[str, str]:
    """Return the differences of a class, without those that an ``_async`` method shares with its method."""
    of_class = {place: how for place, how in found.items() if place.startswith(f"{name}.")}
    return {
        place: how
        for place, how in of_class.items()
        if without_async(place) == place or of_class.get(without_async(place)) != how
    }


def difference_table(found: Mapping[str, str], name: str) -> str:
    """Return the table of a class: place, difference and reason."""
    items = own_differences(found, name).items()
    body = [(f"`{place.removeprefix(f'{name}.')}`", how, reason(place)) for place, how in items]
    return table(("where", "the client", "reason"), body) if body else "No difference."


def record_lines(theirs: Mapping[str, Surface]) -> Iterator[str]:
    """Yield the record of the SDK, one member a line."""
    for name, members in theirs.items():
        for key, text in members.items():
            yield f"{name}.{key} {text}"


LINE = re.compile(r"^(\w+)\.(\w+) (=.*|property|(?:async |static )?\(.*\))$", re.MULTILINE)


def read_record(text: str) -> tuple[dict[str, Surface], str]:
    """Return the SDK's members and version that a page records."""
    theirs: dict[str, Surface] = {name: {} for name in OURS}
    for name, key, member in LINE.findall(text.partition(RECORD_HEAD)[2]):
        theirs[name][key] = member
    version = re.search(r"`tinker` (\S+), is", text)
    return theirs, version[1] if version else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m tools.signatures``. Return 1 if a reason is missing or unused, or the page is out of date."""
    p = argparse.ArgumentParser(prog="python -m tools.signatures", description="Compare the local client with the SDK.")
    p.add_argument("action", choices=("show", "write", "render", "check"), nargs="?", default="show")
    p.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    args = p.parse_args(argv)
    old_text = args.page.read_text(encoding="utf-8") if args.page.exists() else ""
    theirs, version = installed() if args.action in ("write", "check") else read_record(old_text)
    text = render(theirs, version)
    found = differences(theirs, {name: surface(of) for name, of in OURS.items()})
    faults = [f"no reason: {x}" for x in unexplained(found)] + [
        f"reason without a difference: {x}" for x in unused_reasons(found)
    ]
    if args.action in ("write", "render"):
        args.page.write_text(text, encoding="utf-8")
        print(f"wrote {args.page}")
    elif args.action == "show":
        print("\n".join(f"{place}: {how}. {reason(place)}" for place, how in found.items()))
    elif text != old_text:
        faults.append(f"{args.page} is out of date")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def installed() -> tuple[dict[str, Surface], str]:
    """Return the members and the version of the installed SDK."""
    from importlib.metadata import version

    return published(), version("tinker")


if __name__ == "__main__":
    sys.exit(main())
