"""The local client's surface beside the published SDK's: every difference, and why.

    python tools/signatures.py           # prints the differences from what the page records
    python tools/signatures.py write     # records the installed `tinker`, writes docs/signatures.md
    python tools/signatures.py render    # writes it anew from its own record, for a client that changed
    python tools/signatures.py check     # exits 1 where the page says something else than the installed SDK

The page is the record: ``read`` takes the SDK's surface from it, ``page`` makes it of that again.
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
from lossfns.testing.matrix import table

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
"""The SDK's classes, and what stands in for each here."""

Surface = dict[str, str]
"""The public members of a class: ``"(data, loss_fn=None)"`` of a method, ``"= 0.9"`` or ``"="`` of a field."""


# What a class has


def surface(of: type) -> Surface:
    """Its fields, its properties, and its methods without their annotations; constructors of what is no record."""
    own = [kind for kind in of.__mro__ if re.match(r"(tinker|lossfns)(?!\._)", kind.__module__)]
    names = {name: value for kind in reversed(own) for name, value in vars(kind).items()}
    fields = dict(record(of))
    constructor = {} if fields or "__init__" not in names else {"__init__": member(names["__init__"])}
    methods = {name: member(value) for name, value in names.items() if not name.startswith("_")}
    return constructor | {name: text for name, text in methods.items() if text and name not in fields} | fields


def record(of: type) -> Iterator[tuple[str, str]]:
    """The fields of a dataclass or of a pydantic model, with their defaults."""
    if dataclasses.is_dataclass(of):
        for field in dataclasses.fields(of):
            if not field.name.startswith("_"):
                default = field.default_factory() if callable(field.default_factory) else field.default
                yield field.name, "=" if default is dataclasses.MISSING else f"= {default!r}"
    for name, field in getattr(of, "model_fields", {}).items():
        yield name, "=" if field.is_required() else f"= {field.get_default(call_default_factory=True)!r}"


def member(value: Any) -> str:
    """The text of a member; nothing for what is neither a method nor a property."""
    if isinstance(value, (property, cached_property)):
        return "property"
    if isinstance(value, (staticmethod, classmethod)):
        return f"static {signature(value.__func__, skip=isinstance(value, classmethod))}"
    if not callable(value):
        return ""
    coroutine = any(map(inspect.iscoroutinefunction, (value, inspect.unwrap(value))))  # either may wrap the other
    return f"{'async ' if coroutine else ''}{signature(value, skip=True)}"


def signature(function: Any, skip: bool) -> str:
    whole = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in whole.parameters.values()]
    return str(inspect.Signature(bare[1:] if skip else bare))


def published() -> dict[str, Surface]:
    """The SDK's classes as they are installed."""
    import tinker
    from tinker import types as sdk

    homes = (tinker, sdk)
    return {name: surface(next(getattr(h, name) for h in homes if hasattr(h, name))) for name in OURS}


# Differences


class Parameter(NamedTuple):
    """A parameter: where it stands, -1 if it goes by keyword only, and its default."""

    place: int
    default: str | None


def parameters(text: str) -> dict[str, Parameter]:
    """Those of a signature; fields, which are not called, have none."""
    if "(" not in text:
        return {}
    function = ast.parse(f"def f{text[text.index('(') :]}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    own = function.args
    defaults = [None] * (len(own.args) - len(own.defaults)) + [ast.unparse(x) for x in own.defaults]
    found = {a.arg: Parameter(i, default) for i, (a, default) in enumerate(zip(own.args, defaults))}
    keywords = zip(own.kwonlyargs, own.kw_defaults)
    found |= {a.arg: Parameter(-1, None if x is None else ast.unparse(x)) for a, x in keywords}
    rest = {f"{stars}{a.arg}": Parameter(-1, None) for stars, a in (("*", own.vararg), ("**", own.kwarg)) if a}
    return found | rest


def differences(theirs: Mapping[str, Surface], ours: Mapping[str, Surface]) -> dict[str, str]:
    """For each place in which the two differ, how: ``Class.method(parameter)`` or ``Class.member``."""
    found = {}
    for name, own in ours.items():
        for key in dict.fromkeys((*theirs[name], *own)):
            place = f"{name}.{key}"
            if key not in own:
                found[place] = "missing"
            elif key not in theirs[name]:
                found[place] = "more"
            elif place in WHY:
                found |= {} if theirs[name][key] == own[key] else {place: f"another: `{own[key]}`"}
            else:
                found |= {f"{place}{where}": how for where, how in unlike(theirs[name][key], own[key])}
    return found


def unlike(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    """How two members of one name differ: as a whole, ``""``, or in ``"(a parameter)"``."""
    kinds = [text.partition("(")[0].strip() for text in (theirs, ours)]
    if kinds[0] != kinds[1] and "property" not in kinds and not equal(*kinds):  # a property reads like a field
        yield "", f"`{kinds[0] or 'a method'}` there, `{kinds[1] or 'a method'}` here"
    a, b = parameters(theirs), parameters(ours)
    for name in dict.fromkeys((*a, *b)):
        where = f"({name})"
        if name not in b:
            yield where, "missing"
        elif name not in a:
            yield where, "more" if b[name].default is not None or name.startswith("*") else "more, and required"
        elif b[name].place == -1 != a[name].place:
            yield where, "by keyword only"
        elif a[name].place not in (-1, b[name].place):
            yield where, f"at position {b[name].place} instead of {a[name].place}"
        elif a[name].default != b[name].default:
            there, here = ((x.default and f"`{x.default}` by default") or "required" for x in (a[name], b[name]))
            yield where, f"{here}, {there} there"


def equal(theirs: str, ours: str) -> bool:
    """Whether two defaults are the same value: 1 is 1.0."""
    try:
        return bool(ast.literal_eval(theirs.strip("= ")) == ast.literal_eval(ours.strip("= ")))
    except (SyntaxError, ValueError):
        return False


NO_SERVICE = "There is no service behind it, and so no console, no telemetry, no session."
MADE = "There, the service makes one; here it is made of a model."
AT_ONCE = "A client is there at once; code that expects a future of it reads it all the same."
EMBEDDING = "Fireworks' losses over embeddings."
FIREWORKS = "Fireworks has it."
ONE_MODEL = "It may be left out where there is but one model."
NOT_SAMPLED = "The local sampler gives the logprobs of what it draws, and of the prompt; no others."
ARRAYS = "Lists are what is read; arrays are made of them in a line."
KIND = "Its type says what it is."
FILLED = "It is always there."
LOCAL = "What a local run wants to know besides."

WHY: dict[str, str] = {
    "TrainingClient.__init__": MADE,
    "TrainingClient.get_telemetry": NO_SERVICE,
    "TrainingClient.get_console_url": NO_SERVICE,
    "TrainingClient.forward(output)": EMBEDDING,
    "TrainingClient.forward(pooling)": EMBEDDING,
    "TrainingClient.forward_backward_custom(output)": EMBEDDING,
    "TrainingClient.forward_backward_custom(pooling)": EMBEDDING,
    "TrainingClient.optim_step(grad_accumulation_normalization)": "Fireworks' argument, in its place.",
    "TrainingClient.save_weights_external": "There is no bucket to export to: the file of `save_state` is one's own.",
    "TrainingClient.create_sampling_client(record_stability_info)": NO_SERVICE,
    "TrainingClient.save_weights_and_get_sampling_client(record_stability_info)": NO_SERVICE,
    "TrainingClient.save_weights_and_get_sampling_client(kind)": "It is always a snapshot, the default there.",
    "TrainingClient.reference": "The model without its adapters is there: no second copy.",
    "TrainingClient.result": AT_ONCE,
    "TrainingClient.result_async": AT_ONCE,
    "ServiceClient.__init__(models)": "The base models of this service, by name.",
    "ServiceClient.__init__(device)": "Where the models run.",
    "ServiceClient.__init__(dtype)": "What the models compute in.",
    "ServiceClient.__init__(memory_budget)": "What a request may take; a larger batch goes in micro-batches.",
    "ServiceClient.__init__(mesh)": "The processes that share a model.",
    "ServiceClient.__init__(profile)": "Which service is followed where the two differ.",
    "ServiceClient.__init__(user_metadata)": "The models come first.",
    "ServiceClient.__init__(project_id)": "The models come first.",
    "ServiceClient.__init__(display_name)": NO_SERVICE,
    "ServiceClient.__init__(default_headers_overrides)": NO_SERVICE,
    "ServiceClient.__init__(**kwargs)": "A name that means nothing is refused.",
    "ServiceClient.holder": NO_SERVICE,
    "ServiceClient.get_telemetry": NO_SERVICE,
    "ServiceClient.get_console_url": NO_SERVICE,
    "ServiceClient.create_rest_client": NO_SERVICE,
    "ServiceClient.close": NO_SERVICE,
    "ServiceClient.copy_weights": "A checkpoint is a file: copy it.",
    "ServiceClient.create_custom_loss": "`forward_backward_custom` takes any function, at the price of a built-in.",
    "ServiceClient.create_lora_training_client(base_model)": ONE_MODEL,
    "ServiceClient.create_lora_training_client(alpha)": FIREWORKS,
    "ServiceClient.create_training_client": f"{FIREWORKS} It trains all parameters.",
    "ServiceClient.create_reference_client": f"{FIREWORKS} It cannot move the model.",
    "SamplingClient.__init__": MADE,
    "SamplingClient.get_telemetry": NO_SERVICE,
    "SamplingClient.on_queue_state_change": NO_SERVICE,
    "SamplingClient.create": MADE,
    "SamplingClient.sample(topk_prompt_logprobs)": NOT_SAMPLED,
    "SamplingClient.sample(topk_sample_logprobs)": NOT_SAMPLED,
    "SamplingClient.sample(target_prompt_logprobs)": NOT_SAMPLED,
    "SamplingClient.sample(prompt_alt_tokens_k)": NOT_SAMPLED,
    "SamplingClient.sample(prompt_logprobs_last_n)": NOT_SAMPLED,
    "SamplingClient.compute_logprobs(prompt_logprobs_last_n)": NOT_SAMPLED,
    "SamplingClient.get_base_model": "It samples a snapshot, which has no name.",
    "SamplingClient.get_sampler_handle": NO_SERVICE,
    "SamplingClient.from_sampler_handle": NO_SERVICE,
    "SamplingClient.result": AT_ONCE,
    "SamplingClient.result_async": AT_ONCE,
    "SamplingClient.sample_batch": "Many prompts at once are much faster than one by one.",
    "SamplingParams.max_tokens": "None means so many.",
    "OptimStepResponse.metrics": FILLED,
    "LoadWeightsResponse.path": FILLED,
    "GetInfoResponse.is_lora": FILLED,
    "GetInfoResponse.lora_rank": FILLED,
    "GetInfoResponse.model_name": FILLED,
    "APIFuture.__init__": "There it is an interface.",
    "APIFuture.unread_failure": "For the worker, which loses no error.",
    "SaveWeightsResponse.type": KIND,
    "SaveWeightsResponse.get_console_url": NO_SERVICE,
    "SaveWeightsForSamplerResponse.type": KIND,
    "SaveWeightsForSamplerResponse.get_console_url": NO_SERVICE,
    "SaveWeightsForSamplerResponse.get_playground_url": NO_SERVICE,
    "LoadWeightsResponse.type": KIND,
    "LoadWeightsResponse.model_id": "It is the client's, in `get_info`.",
    "GetInfoResponse.type": KIND,
    "GetInfoResponse.optimizer_config": "It is AdamW.",
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
"""The reason of every difference; one for a method holds for its ``_async`` twin."""


def twin(place: str) -> str:
    """The place of a method whose ``_async`` twin this is of."""
    return place.replace("_async", "", 1)


def reason(place: str) -> str:
    """Why the two differ there; nothing if nobody has said so."""
    return WHY.get(place) or WHY.get(twin(place), "")


def unexplained(found: Mapping[str, str]) -> list[str]:
    return [f"{place}: {how}" for place, how in found.items() if not reason(place)]


def idle(found: Mapping[str, str]) -> list[str]:
    """Reasons for what does not differ."""
    used = {place if place in WHY else twin(place) for place in found}
    return [place for place in WHY if place not in used]


# The page


INTRODUCTION = """\
# The client's signatures beside the SDK's

Written by `python tools/signatures.py write`; do not edit. `docs/client.md` says how the client is used.

Every public method, parameter, default and field of `tinker` {version} that is not the same here, and every one that
is more here, each with its reason. What is not listed is the same, and what is said of a method holds for its `_async`
twin. Annotations are not compared: where the SDK wants its own classes, any with the same attributes will do."""

RECORD_HEAD = """\
## What was compared

The SDK's side, as it was installed: what the differences above are from."""


def page(theirs: Mapping[str, Surface], version: str) -> str:
    """The whole page, from the SDK's surface as it was recorded, and ours as it is."""
    found = differences(theirs, {name: surface(of) for name, of in OURS.items()})
    parts = (
        INTRODUCTION.format(version=version),
        summary(theirs, found),
        *(f"## {name}\n\nHere `{of.__name__}`.\n\n{rows(found, name)}" for name, of in OURS.items()),
        RECORD_HEAD,
        "```python\n" + "\n".join(lines(theirs)) + "\n```",
    )
    return "\n\n".join(parts) + "\n"


def summary(theirs: Mapping[str, Surface], found: Mapping[str, str]) -> str:
    """How many members each class has there, and how many places differ."""
    kinds = {name: Counter(map(kind_of, shown(found, name).values())) for name in OURS}
    body = ((f"`{name}`", len(theirs[name]), n["missing"], n["more"], n["other"]) for name, n in kinds.items())
    return table(("class", "members there", "missing here", "more here", "other differences"), body)


def kind_of(how: str) -> str:
    return how if how in ("missing", "more") else "other"


def shown(found: Mapping[str, str], name: str) -> dict[str, str]:
    """The differences of a class, without those that a twin shares."""
    own = {place: how for place, how in found.items() if place.startswith(f"{name}.")}
    return {place: how for place, how in own.items() if twin(place) == place or own.get(twin(place)) != how}


def rows(found: Mapping[str, str], name: str) -> str:
    own = shown(found, name).items()
    body = [(f"`{place.removeprefix(f'{name}.')}`", how, reason(place)) for place, how in own]
    return table(("where", "here", "why"), body) if body else "No difference."


def lines(theirs: Mapping[str, Surface]) -> Iterator[str]:
    for name, members in theirs.items():
        for key, text in members.items():
            yield f"{name}.{key} {text}"


LINE = re.compile(r"^(\w+)\.(\w+) (=.*|property|(?:async |static )?\(.*\))$", re.MULTILINE)


def read(text: str) -> tuple[dict[str, Surface], str]:
    """The SDK's surface and version that a page records."""
    theirs: dict[str, Surface] = {name: {} for name in OURS}
    for name, key, member in LINE.findall(text.partition(RECORD_HEAD)[2]):
        theirs[name][key] = member
    version = re.search(r"`tinker` (\S+) that", text)
    return theirs, version[1] if version else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python tools/signatures.py``; 1 if something is unexplained, idle or out of date."""
    p = argparse.ArgumentParser(prog="python tools/signatures.py", description="The client beside the SDK.")
    p.add_argument("action", choices=("show", "write", "render", "check"), nargs="?", default="show")
    p.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    args = p.parse_args(argv)
    was = args.page.read_text(encoding="utf-8") if args.page.exists() else ""
    theirs, version = installed() if args.action in ("write", "check") else read(was)
    text = page(theirs, version)
    found = differences(theirs, {name: surface(of) for name, of in OURS.items()})
    faults = [f"no reason: {x}" for x in unexplained(found)] + [f"no such difference: {x}" for x in idle(found)]
    if args.action in ("write", "render"):
        args.page.write_text(text, encoding="utf-8")
        print(f"wrote {args.page}")
    elif args.action == "show":
        print("\n".join(f"{place}: {how}. {reason(place)}" for place, how in found.items()))
    elif text != was:
        faults.append(f"{args.page} is out of date")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def installed() -> tuple[dict[str, Surface], str]:
    from importlib.metadata import version

    return published(), version("tinker")


if __name__ == "__main__":
    sys.exit(main())
