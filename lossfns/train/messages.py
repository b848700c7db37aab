"""Messages and tools of a row, in OpenAI's or ShareGPT's form, read into one form: ``render.Message``."""

from __future__ import annotations

import re
from typing import Any, NoReturn

from lossfns.train.files import DECODER, RepeatedKey, check_row
from lossfns.train.values import Number, Row, plain, quoted, shown

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""Roles by their names. A ``function_call`` is a message whose text is the call."""

MEDIA = ("images", "image", "videos", "video", "audio", "audios")
"""Fields of images, videos and sounds, in a row or a message. Such a row is refused: its text may depend on them."""

READ = {"role", "content", "reasoning_content", "from", "value", "weight", "train",
        "name", "tool_calls", "tool_call_id", "function_call"}  # fmt: skip
"""The fields of a message that are read."""

SMALLEST_WEIGHT = 1e-37
"""The smallest weight of a message that is trained. Weights are float32, in which much smaller ones are 0."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""The types of parts of a message that are its text."""


def read_messages(row: Row, key: str) -> list[dict[str, Any]]:
    """Read a list of messages: ``role`` and ``content`` as OpenAI has them, or ShareGPT's ``from`` and ``value``."""
    value = row.fields.get(key)
    if not isinstance(value, list) or not value:
        row.refuse(f"a list of messages under {key!r}", shown_field(row, key), "Each message has a role and a content.")
    return [read_message(row, f"{key}[{i}]", each) for i, each in enumerate(value)]


def read_message(row: Row, name: str, value: Any) -> dict[str, Any]:
    """Read one message: its text, its calls of tools, its reasoning, and the weight of its tokens."""
    if not isinstance(value, dict):
        row.refuse(f"a message under {quoted(name)}", shown(value), "Each message has a role and a content.")
    for key in MEDIA:
        if value.get(key):
            fix = "Leave it out if the text does not need it, or else the row."
            row.refuse(f"text only under {quoted(name)}", f"{key!r}, which is not read", fix)
    role_key, text_key = ("from", "value") if "from" in value else ("role", "content")
    written = value.get(role_key)
    if not isinstance(written, str) or written.lower() not in ROLES:
        got = shown(written) if role_key in value else "nothing"
        row.refuse(f"system, user, assistant or tool under '{name}.{role_key}'", got, "Rename the role.")
    role = ROLES[written.lower()]
    if written.lower() == "function_call":
        text, calls = "", [read_call(row, f"{name}.{text_key}", value.get(text_key))]
    else:
        calls = read_calls(row, name, value)
        text = read_content(row, f"{name}.{text_key}", value, text_key, empty=bool(calls))
    message: dict[str, Any] = {"role": role, "content": text}
    if calls and role != "assistant":
        row.refuse(f"calls of tools by the assistant under {quoted(name)}", f"some by the {role}", "Change the role.")
    if calls:
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id", "reasoning_content"):
        if value.get(key) is not None:
            if not isinstance(value[key], str):
                row.refuse(f"text under '{name}.{key}'", shown(value[key]), "Write it as text, or leave it out.")
            message[key] = str(value[key])
    if (weight := read_weight(row, name, value)) is not None:
        if weight and role != "assistant":
            fix = "Only answers of the assistant are trained: leave the weight out."
            row.refuse(f"weight 0 for the {role} under {quoted(name)}", f"{weight:g}", fix)
        message["weight"] = weight
    return message


def read_content(row: Row, name: str, value: dict[str, Any], key: str, empty: bool) -> str:
    """Read the text of a message: a string, or parts of text. With ``empty`` it may be missing."""
    text = value.get(key)
    if text is None and empty:
        return ""
    if isinstance(text, list):
        parts = [part.get("text") if is_text(part) else None for part in text]
        if not all(isinstance(part, str) for part in parts) or not parts:
            fix = "Only parts of the type 'text' are read, no images or sounds: leave such rows out."
            row.refuse(f"text under '{name}'", f"parts that are no text ({shown(text)})", fix)
        text = "".join(str(part) for part in parts)
    if not isinstance(text, str):
        row.refuse(f"text under '{name}'", shown(text) if key in value else "nothing", "A message has one text.")
    return str(text)


def is_text(part: Any) -> bool:
    """Return whether a part of a message is text."""
    return isinstance(part, dict) and (part.get("type") or "text") in TEXT_PARTS


def unread_of(key: str, chat: Any) -> list[str]:
    """Return the names of the fields of messages that have a value and are not read."""
    messages = [each for each in chat if isinstance(each, dict)] if isinstance(chat, list) else []
    return [f"{key}[].{name}" for each in messages for name, value in each.items() if value and name not in READ]


def read_weight(row: Row, name: str, value: dict[str, Any]) -> float | None:
    """Read the weight of a message's tokens: a number from 0 to 1 under ``weight``, or ``train``, which is a bool."""
    weight, train = value.get("weight"), value.get("train")
    if train is not None and not isinstance(train, bool):
        row.refuse(f"true or false under '{name}.train'", shown(train), "A number stands under 'weight'.")
    if weight is None:
        return None if train is None else float(train)
    if not isinstance(weight, Number) or not 0 <= float(weight) <= 1:
        row.refuse(f"a number from 0 to 1 under '{name}.weight'", shown(weight), "0 leaves the message untrained.")
    if 0 < float(weight) < SMALLEST_WEIGHT:
        expected = f"0, or at least {SMALLEST_WEIGHT:g}, under '{name}.weight'"
        row.refuse(expected, shown(weight), "It would be 0 in float32: write 0 to leave the message untrained.")
    if train is not None and train != (float(weight) > 0):
        row.refuse(f"one answer under '{name}.weight' and '{name}.train'", "two", "Leave one of them out.")
    return float(weight)


# Tools


def read_calls(row: Row, name: str, value: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the calls of a message, under ``tool_calls`` and under ``function_call``."""
    calls, single = value.get("tool_calls") or [], value.get("function_call")
    if isinstance(calls, str):
        calls = read_json(row, f"{name}.tool_calls", calls)
    if not isinstance(calls, list):
        row.refuse(f"a list of calls under '{name}.tool_calls'", shown(calls), "Each call has a function.")
    read = [read_call(row, f"{name}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    return read + ([read_call(row, f"{name}.function_call", single)] if single else [])


def read_call(row: Row, name: str, value: Any) -> dict[str, Any]:
    """Read a call: the name of the function and its arguments. Both the call and the arguments may be JSON text."""
    call = read_json(row, name, value) if isinstance(value, str) else value
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        row.refuse(f"a call with the name of a function under {quoted(name)}", shown(value), "OpenAI has its form.")
    if "arguments" not in function and "parameters" in function:
        fix = "Rename 'parameters', which the description of a tool has."
        row.refuse(f"the arguments of the call under '{name}.arguments'", "nothing", fix)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = read_json(row, f"{name}.arguments", arguments)
    if not isinstance(arguments, dict):
        row.refuse(f"an object of arguments under '{name}.arguments'", shown(arguments), "OpenAI has its form.")
    known = {"id": str(call["id"])} if isinstance(call.get("id"), str) else {}
    return known | {
        "type": "function",
        "function": {"name": str(function["name"]), "arguments": plain(arguments)},
    }


def read_tools(row: Row) -> list[Any] | None:
    """Read the descriptions of the tools under ``tools`` or ``functions``: a list, or one as JSON text."""
    keys = [key for key in ("tools", "functions") if row.fields.get(key) and row.fields[key] not in ("[]", "null")]
    if not keys:
        return None
    if len(keys) > 1:
        row.refuse("descriptions under 'tools' or 'functions'", "both", "Write all of them under 'tools'.")
    key = keys[0]
    tools = row.fields[key]
    if isinstance(tools, str):
        tools = read_json(row, key, tools)
    if not isinstance(tools, list):
        row.refuse(f"a list of tools under {key!r}", shown(tools), "OpenAI has its form.")
    functions = []
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            row.refuse(f"a tool with the name of a function under '{key}[{i}]'", shown(tool), "OpenAI has its form.")
        functions.append({"type": "function", "function": plain(function)})
    return functions


def read_json(row: Row, name: str, text: str) -> Any:
    """Read JSON text inside a row, by the rules for the row itself."""
    try:
        value = DECODER.decode(text)
    except RepeatedKey as error:
        row.refuse(f"the key {shown(str(error))} once under {quoted(name)}", "it twice", "Keep one of them.")
    except (ValueError, RecursionError):
        row.refuse(f"JSON under {quoted(name)}", shown(text), "OpenAI has calls and tools as JSON.")
    check_row(Row(row.place, {name: value}))
    return value


# Dialogues as one text


def read_dialogue(row: Row, key: str) -> list[dict[str, Any]]:
    r"""Read a dialogue of hh-rlhf, one text with "\n\nHuman:" and "\n\nAssistant:" before the messages."""
    text = text_of(row, key)
    before, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if before.strip() or not parts:
        fix = "Add the field 'prompt', or write whole dialogues."
        row.refuse(f"a dialogue of 'Human:' and 'Assistant:' under {key!r}", shown(text), fix)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": part.strip()} for role, part in zip(parts[::2], parts[1::2])]


# Fields


def shown_field(row: Row, key: str) -> str:
    """Show the value of a field in a few characters; "nothing" if it is missing."""
    return shown(row.fields[key]) if key in row.fields else "nothing"


def text_of(row: Row, key: str, empty: bool = False) -> str:
    """Return the text of a field. A number is read as it is written."""
    value = row.fields.get(key)
    if not isinstance(value, str) or not (value or empty):
        refuse_text(row, key)
    return str(value)


def refuse_text(row: Row, key: str) -> NoReturn:
    """Refuse a row whose field is no text."""
    has = ", ".join(map(shown, row.fields)) or "no fields"
    row.refuse(f"text under {key!r}", shown_field(row, key), f"The row has {has}.")
