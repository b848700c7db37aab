"""Formats of rows: each function turns a row of one format into the texts that a method trains on.

Chats have one plain rendering, as the byte model has no template of its own: each message is a line ``role: text``, and
an answer follows ``assistant: ``. Only the answers of the assistant are trained, each as a completion of all that
stands before it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lossfns.train.files import Row, key_of_rows, quoted, shown, write_list

Texts = list[tuple[str, ...]]
"""The examples of a row: (prompt, completion), (prompt, chosen, rejected) or (prompt, answer)."""

Message = tuple[str, str]
"""The role (system, user or assistant) and the text."""

CHAT, DIALOGUE = "assistant: ", "\n\nAssistant:"
"""The ends of the prompts of chats and of hh-rlhf's dialogues."""


class Format(NamedTuple):
    """A format of rows.

    Attributes:
        name: how the terminal names it.
        keys: the fields by which it is recognised.
        also: further fields that it reads if they are there.
        read: turns a row into its examples.
    """

    name: str
    keys: tuple[str, ...]
    read: Callable[[Row], Texts]
    also: tuple[str, ...] = ()


# Chats

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
}

WITHOUT_TOOLS = """jq -c 'select([.. | objects | has("tool_calls") or .role == "tool"] | any | not)' IN > rows.jsonl"""


def render(messages: Sequence[Message]) -> str:
    """Return the messages as lines ``role: text``.

    >>> render([("system", "Add."), ("user", "2+2")])
    'system: Add.\\nuser: 2+2\\n'
    """
    return "".join(f"{role}: {text}\n" for role, text in messages)


def answers(row: Row, messages: Sequence[Message], key: str, first: int = 0) -> Texts:
    """Return each answer of the assistant, from message ``first`` on, with all that stands before it as its prompt."""
    examples: Texts = []
    for i, (role, text) in enumerate(messages):
        if role == "assistant" and i >= first:
            if not text:
                row.refuse(f"text under '{key}[{i - first}]'", "''", "An answer must not be empty.")
            examples.append((render(messages[:i]) + CHAT, text))
    if not examples:
        row.refuse(f"an answer of the assistant under {key!r}", "none", "There is nothing to train on.")
    return examples


def message_list(row: Row, key: str) -> list[Message]:
    """Read a list of messages: ``role`` and ``content`` as OpenAI has them, or ShareGPT's ``from`` and ``value``."""
    value = row.fields.get(key)
    if not isinstance(value, list) or not value:
        row.refuse(f"a list of messages under {key!r}", shown_field(row, key), "Each message has a role and a content.")
    return [message(row, f"{key}[{i}]", each) for i, each in enumerate(value)]


def message(row: Row, name: str, value: Any) -> Message:
    """Read one message; refuse tools and images by their name."""
    if not isinstance(value, dict):
        row.refuse(f"a message under {quoted(name)}", shown(value), "Each message has a role and a content.")
    file = file_of(row)
    role_key, text_key = ("from", "value") if "from" in value else ("role", "content")
    role, text = value.get(role_key), value.get(text_key)
    if role in ("tool", "function", "ipython", "observation", "function_call") or any(
        value.get(key) for key in ("tool_calls", "function_call")
    ):
        fix = f"Tools are not read. Keep the other rows: {WITHOUT_TOOLS.replace('IN', file)}"
        row.refuse(f"text under {quoted(name)}", "a call of a tool", fix)
    if not isinstance(role, str) or role.lower() not in ROLES:
        got = shown(role) if role_key in value else "nothing"
        row.refuse(f"system, user or assistant under '{name}.{role_key}'", got, "Rename the role.")
    if isinstance(text, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in text]
        if not all(isinstance(part, str) for part in parts) or not parts:
            fix = "Images and sounds are not read: leave such rows out."
            row.refuse(f"text under '{name}.{text_key}'", f"parts that are no text ({shown(text)})", fix)
        text = "".join(str(part) for part in parts)
    if not isinstance(text, str):
        got = shown(text) if text_key in value else "nothing"
        row.refuse(f"text under '{name}.{text_key}'", got, "A message has one text.")
    return ROLES[role.lower()], str(text)


def file_of(row: Row) -> str:
    """Return the path of the row's file, as a shell reads it."""
    return shlex.quote(row.place.rpartition(":")[0])


def shown_field(row: Row, key: str) -> str:
    """Show the value of a field in a few characters; "nothing" if it is missing."""
    return shown(row.fields[key]) if key in row.fields else "nothing"


def text_of(row: Row, key: str, empty: bool = False) -> str:
    """Return the text of a field. A number is read as it is written."""
    value = row.fields.get(key)
    if not isinstance(value, str) or not (value or empty):
        has = ", ".join(map(shown, row.fields)) or "no fields"
        row.refuse(f"text under {key!r}", shown_field(row, key), f"The row has {has}.")
    return str(value)


# Demonstrations: (prompt, completion)


def prompt_and_completion(row: Row) -> Texts:
    """``{"prompt", "completion"}``: two texts as they are, or two lists of messages."""
    if isinstance(row.fields.get("label"), bool):
        file = file_of(row)
        fix = f"Train on the good ones: jq -c 'select(.label) | {{prompt, completion}}' {file} > rows.jsonl"
        row.refuse("demonstrations", "a label: unpaired preferences, which no method reads", fix)
    if isinstance(row.fields.get("prompt"), list):
        before = message_list(row, "prompt")
        if isinstance(row.fields.get("completion"), str):
            return [(render(before) + CHAT, text_of(row, "completion"))]
        return answers(row, before + message_list(row, "completion"), "completion", len(before))
    return [(text_of(row, "prompt", empty=True), text_of(row, "completion"))]


def chat(row: Row) -> Texts:
    """``{"messages": [{"role", "content"}, ...]}``."""
    return answers(row, message_list(row, "messages"), "messages")


def sharegpt(row: Row) -> Texts:
    """``{"conversations": [{"from", "value"}, ...]}``, with an optional text ``system``."""
    before = [("system", text_of(row, "system"))] if row.fields.get("system") else []
    return answers(row, before + message_list(row, "conversations"), "conversations", len(before))


def alpaca(row: Row) -> Texts:
    """``{"instruction", "input", "output"}``: the instruction and the input are one message of the user."""
    before = [("system", text_of(row, "system"))] if row.fields.get("system") else []
    request = text_of(row, "instruction")
    if "input" in row.fields and row.fields["input"] is not None:
        given = text_of(row, "input", empty=True)
        request = f"{request}\n{given}" if given else request
    return [(render([*before, ("user", request)]) + CHAT, text_of(row, "output"))]


def question_and_answer(row: Row) -> Texts:
    """``{"question", "answer"}``, GSM8K's fields: the whole answer, with its reasoning."""
    return [(render([("user", text_of(row, "question"))]) + CHAT, text_of(row, "answer"))]


def plain_text(row: Row) -> Texts:
    """``{"text"}``: trained from its first byte to its end."""
    return [("", text_of(row, "text"))]


# Preferences: (prompt, chosen, rejected)


def pair(row: Row) -> Texts:
    """``{"prompt", "chosen", "rejected"}``: texts as they are, or lists of messages.

    The chosen and rejected lists may repeat the prompt, as in UltraFeedback.
    """
    chosen, rejected = row.fields.get("chosen"), row.fields.get("rejected")
    if not isinstance(chosen, list) and not isinstance(rejected, list):
        texts = text_of(row, "chosen"), text_of(row, "rejected")
        if isinstance(row.fields.get("prompt"), list):
            return [(render(message_list(row, "prompt")) + CHAT, *texts)]
        return [(text_of(row, "prompt", empty=True), *texts)]
    sides = [message_list(row, key) for key in ("chosen", "rejected")]
    common = sides[0][: common_length(*sides)]
    if len(common) == min(map(len, sides)):
        common = common[:-1]  # both sides give the same answer
    for key, side in zip(("chosen", "rejected"), sides):
        if [role for role, _ in side[len(common) :]] != ["assistant"] or not side[-1][1]:
            fix = "Both sides have the same messages, but for the last one: an answer of the assistant."
            row.refuse(f"one answer under {key!r} after the messages that both sides have", shown(side), fix)
    return [(render(with_prompt(row, common)) + CHAT, sides[0][-1][1], sides[1][-1][1])]


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the number of equal items (characters of a text) at the start of two sequences."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def with_prompt(row: Row, common: list[Message]) -> list[Message]:
    """Return the messages before the answers: those of the prompt, and those that both sides repeat or add."""
    prompt = row.fields.get("prompt", [])
    before = message_list(row, "prompt") if isinstance(prompt, list) and prompt else []
    if isinstance(prompt, str) and prompt:
        before = [("user", str(prompt))]
        if common and before[0] in common:
            return common
    if common[: len(before)] == before:
        return common
    if any(role == "user" for role, _ in common) and before:
        fix = "Leave out one of the two."
        row.refuse("the messages of the prompt at the start of 'chosen' and 'rejected'", "others", fix)
    return before + common


def transcripts(row: Row) -> Texts:
    """``{"chosen", "rejected"}``: two whole dialogues, as in hh-rlhf, that differ in the last answer; or two lists."""
    if isinstance(row.fields.get("chosen"), list):
        return pair(row)
    sides, mark = {key: text_of(row, key) for key in ("chosen", "rejected")}, DIALOGUE
    at = sides["chosen"].rfind(mark, 0, common_length(*sides.values()))
    if at < 0:
        fix = "Add the field 'prompt', or write whole dialogues."
        row.refuse(f"the same start under 'chosen' and 'rejected', with {mark!r}", shown(sides["chosen"]), fix)
    prompt = sides["chosen"][: at + len(mark)]
    texts = {key: side[len(prompt) :] for key, side in sides.items()}
    for key, text in texts.items():
        if not text.strip() or "\n\nHuman:" in text:
            got = "more turns" if text.strip() else "no answer"
            fix = (
                "The sides part before the last answer: leave this row out." if text.strip() else "Leave this row out."
            )
            row.refuse(f"one answer under {key!r} after the dialogue that both sides have", got, fix)
    return [(prompt, texts["chosen"], texts["rejected"])]


# Problems: (prompt, answer)


def prompt_and_answer(row: Row) -> Texts:
    """``{"prompt", "answer"}``: the answer is a text or a number; the prompt is a text or a list of messages."""
    if isinstance(row.fields.get("prompt"), list):
        return [(render(message_list(row, "prompt")) + CHAT, text_of(row, "answer"))]
    return [(text_of(row, "prompt", empty=True), text_of(row, "answer"))]


def final_answer(row: Row) -> Texts:
    """``{"question", "answer"}``, as in GSM8K: the answer is the number after ``####``, without commas."""
    ((prompt, answer),) = question_and_answer(row)
    if "####" in answer:
        answer = answer.rpartition("####")[2].strip().replace(",", "")
        if not answer:
            row.refuse("an answer after '####' under 'answer'", "nothing", "Leave this row out.")
    return [(prompt, answer)]


def last_answer(read: Callable[[Row], Texts]) -> Callable[[Row], Texts]:
    """Return a reader of the last demonstration of a row as a problem."""
    return lambda row: read(row)[-1:]


DEMONSTRATIONS = (
    Format("prompt and completion", ("prompt", "completion"), prompt_and_completion),
    Format("messages", ("messages",), chat),
    Format("ShareGPT conversations", ("conversations",), sharegpt, ("system",)),
    Format("Alpaca instructions", ("instruction", "output"), alpaca, ("input", "system")),
    Format("question and answer", ("question", "answer"), question_and_answer),
    Format("text", ("text",), plain_text),
)
PREFERENCES = (
    Format("prompt, chosen and rejected", ("prompt", "chosen", "rejected"), pair),
    Format("dialogues, chosen and rejected", ("chosen", "rejected"), transcripts),
)
PROBLEMS = (
    Format("prompt and answer", ("prompt", "answer"), prompt_and_answer),
    Format("question and answer; what follows '####' is the answer", ("question", "answer"), final_answer),
    Format("messages; the last answer", ("messages",), last_answer(chat)),
    Format("ShareGPT conversations; the last answer", ("conversations",), last_answer(sharegpt), ("system",)),
    Format("Alpaca instructions", ("instruction", "output"), last_answer(alpaca), ("input", "system")),
)
READERS = {"sft": DEMONSTRATIONS, "dpo or orpo": PREFERENCES, "grpo, dapo or gspo-token": PROBLEMS}
"""The formats by the methods that read them."""

UNREAD = ("images", "image", "videos", "video", "audio", "audios", "tools", "functions")
"""Fields that a text depends on, and that are not read."""


def recognise(row: Row, formats: Sequence[Format]) -> Format:
    """Return the format of a row, of those that a method reads.

    Raises:
        LossInputError: if it is another format. The error says which one, and how to convert it.
    """
    for known in formats:
        if all(key in row.fields for key in known.keys):
            return known
    names = ", ".join(map(shown, row.fields)) or "no fields"
    mine = formats[0].keys
    missing = next((key for key in mine if key not in row.fields), mine[0])
    reads = "; ".join(", ".join(each.keys) for each in formats)
    file = file_of(row)
    for methods, others in READERS.items():
        for other in others:
            if all(key in row.fields for key in other.keys):
                kind = other.name.split(";")[0]
                fix = f"The row is of the format {kind}, which {methods} reads. This method reads {reads}."
                row.refuse(f"text under {missing!r}", "nothing", fix)
    if (key := key_of_rows(row.fields)) is not None:
        row.refuse(f"text under {missing!r}", "nothing", write_list(row.place.rpartition(":")[0], quoted(key)[1:-1]))
    recipe = ", ".join(f"{key}: .FIELD" for key in mine)
    fix = f"The row has {names}. This method reads {reads}. Rename the fields: jq -c '{{{recipe}}}' {file} > rows.jsonl"
    row.refuse(f"text under {missing!r}", "nothing", fix)


def refuse_unread(row: Row) -> None:
    """Refuse a row with images, sounds or tools."""
    for key in UNREAD:
        if row.fields.get(key) and row.fields[key] not in ("[]", "{}", "null"):
            file = file_of(row)
            fix = f"If the texts do not need them: jq -c 'del(.{key})' {file} > rows.jsonl"
            row.refuse("text only", f"{key!r}, which are not read", fix)


def prompt_style(prompt: str) -> str:
    """Return how prompts are written, by one of them: as a chat, a dialogue, a text, or a passage if empty.

    A passage starts after the end of another text, also if a person gives its first words.
    """
    if not prompt:
        return "passage"
    return "chat" if prompt.endswith(CHAT) else "dialogue" if prompt.endswith(DIALOGUE) else "text"


def prompt_for(style: str, text: str) -> str:
    """Return the prompt of a style for a text that a person has typed.

    >>> prompt_for("chat", "hello"), prompt_for("text", "47+8=")
    ('user: hello\\nassistant: ', '47+8=')
    """
    written = {"chat": render([("user", text)]) + CHAT, "dialogue": f"\n\nHuman: {text}{DIALOGUE}"}
    return written.get(style, text)
