"""Formats of rows: each function reads a row of one format and makes its examples with a ``Renderer``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lossfns.errors import LossInputError
from lossfns.train import conversions
from lossfns.train.examples import Demonstration, Example, Labelled, Preference, Problem, sequences
from lossfns.train.files import key_of_rows, write_list
from lossfns.train.messages import MEDIA, read_dialogue, read_messages, read_tools, shown_field, text_of, unread_of
from lossfns.train.render import Renderer, weight_of
from lossfns.train.values import Row, plain, quoted, shown

Messages = list[dict[str, Any]]


class Format(NamedTuple):
    """A format of rows.

    Attributes:
        name: how the terminal names it.
        keys: the fields by which it is recognised.
        read: makes the examples of a row.
        also: further fields that it reads if they are there.
    """

    name: str
    keys: tuple[str, ...]
    read: Callable[[Row, Renderer], Sequence[Example]]
    also: tuple[str, ...] = ("tools", "functions")


# Chats


def messages(row: Row) -> Messages:
    """``{"messages": [{"role", "content"}, ...]}``."""
    return read_messages(row, "messages")


def sharegpt(row: Row) -> Messages:
    """``{"conversations": [{"from", "value"}, ...]}``, with an optional text ``system``."""
    return system(row) + read_messages(row, "conversations")


def alpaca(row: Row) -> Messages:
    """``{"instruction", "input", "output"}``: the instruction and the input are one message of the user."""
    request = text_of(row, "instruction")
    if row.fields.get("input") is not None:
        context = text_of(row, "input", empty=True)
        request = f"{request}\n{context}" if context else request
    return [*system(row), user(request), assistant(text_of(row, "output"))]


def question_and_answer(row: Row) -> Messages:
    """``{"question", "answer"}``, GSM8K's fields: the whole answer, with its reasoning."""
    return [user(text_of(row, "question")), assistant(text_of(row, "answer"))]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(row: Row) -> Messages:
    """Return the message of the system, if the row has its text."""
    return [{"role": "system", "content": text_of(row, "system")}] if row.fields.get("system") else []


def untrained(before: Messages) -> Messages:
    """Return messages of a prompt, with weight 0."""
    return [each | {"weight": 0.0} for each in before]


def check_answers(row: Row, key: str, chat: Messages) -> None:
    """Refuse a chat without a trained answer, or with an empty one."""
    trained = [each for each in chat if weight_of(each)]
    if not trained:
        fix = "There is nothing to train on: leave this row out, or set a weight."
        row.refuse(f"an answer of the assistant under {key!r} that is trained", "none", fix)
    if any(not each["content"].strip() and not each.get("tool_calls") for each in trained):
        row.refuse(f"text in each answer under {key!r}", "''", "An answer must not be empty.")


# Demonstrations


def demonstrated(read: Callable[[Row], Messages], key: str) -> Callable[[Row, Renderer], Sequence[Example]]:
    """Return a reader of the answers of a chat as demonstrations."""

    def examples(row: Row, renderer: Renderer) -> Sequence[Example]:
        chat = read(row)
        check_answers(row, key, chat)
        return renderer.answers(chat, read_tools(row))

    return examples


def prompt_and_completion(row: Row, renderer: Renderer) -> list[Demonstration]:
    """``{"prompt", "completion"}``: two texts as they are, or two lists of messages."""
    if not isinstance(row.fields.get("prompt"), list):
        refuse_tools(row)
        return [renderer.completion(text_of(row, "prompt", empty=True), text_of(row, "completion"))]
    before = read_messages(row, "prompt")
    if isinstance(row.fields.get("completion"), str):
        after = [assistant(text_of(row, "completion"))]
    else:
        after = read_messages(row, "completion")
    check_answers(row, "completion", after)
    return renderer.answers(untrained(before) + after, read_tools(row))


def without_label(row: Row, renderer: Renderer) -> list[Demonstration]:
    """``{"prompt", "completion"}``, if there is no label: an answer with one may be bad."""
    if label_of(row) is not None:
        fix = f"Train on the good ones: {conversions.good_ones(row)}"
        row.refuse("demonstrations", "a label, which losses of unpaired preference read", fix)
    if row.fields.get("label") not in (None, ""):
        fix = f"Leave out bad answers. If it says nothing of good and bad: {conversions.without(row, 'label')}"
        row.refuse("demonstrations without a label", f"the label {shown_field(row, 'label')}", fix)
    return prompt_and_completion(row, renderer)


def plain_text(row: Row, renderer: Renderer) -> list[Demonstration]:
    """``{"text"}``: trained from its first token to its end."""
    refuse_tools(row)
    return [renderer.text(text_of(row, "text"))]


def refuse_tools(row: Row) -> None:
    """Refuse tools beside texts, which have no place for them."""
    if read_tools(row):
        row.refuse("messages beside the tools", "text", "Write the prompt as messages, or leave the tools out.")


# Preferences and labels


def pair(row: Row, renderer: Renderer) -> list[Preference]:
    """``{"prompt", "chosen", "rejected"}``: texts as they are, or lists of messages.

    The chosen and rejected lists may repeat the prompt, as in UltraFeedback.
    """
    prompt = row.fields.get("prompt")
    if not isinstance(row.fields.get("chosen"), list) and not isinstance(row.fields.get("rejected"), list):
        texts = text_of(row, "chosen"), text_of(row, "rejected")
        if isinstance(prompt, list):
            before = read_messages(row, "prompt")
            return [preference(row, renderer, before, *([assistant(text)] for text in texts))]
        refuse_tools(row)
        before_text = text_of(row, "prompt", empty=True)
        return [different(row, *(renderer.completion(before_text, text) for text in texts))]
    return [split_pair(row, renderer, *(read_messages(row, key) for key in ("chosen", "rejected")))]


def implicit_pair(row: Row, renderer: Renderer) -> list[Preference]:
    """``{"chosen", "rejected"}``: two lists of messages with a common start, or two texts, as in hh-rlhf."""
    read = read_messages if isinstance(row.fields.get("chosen"), list) else read_dialogue
    return [split_pair(row, renderer, *(read(row, key) for key in ("chosen", "rejected")))]


def split_pair(row: Row, renderer: Renderer, chosen: Messages, rejected: Messages) -> Preference:
    """Make a preference of two chats. The messages at the start of both are the prompt."""
    common = common_length(chosen, rejected)
    if common == min(len(chosen), len(rejected)):
        common -= 1  # both sides give the same answer
    return preference(row, renderer, with_prompt(row, chosen[:common]), chosen[common:], rejected[common:])


def preference(row: Row, renderer: Renderer, before: Messages, chosen: Messages, rejected: Messages) -> Preference:
    """Make a preference of a prompt and the messages of both sides. Each side begins with an answer."""
    for key, side in (("chosen", chosen), ("rejected", rejected)):
        if not side or side[0]["role"] != "assistant":
            got = f"a message of the {side[0]['role']}" if side else "nothing"
            fix = "Both sides have the same messages, up to two answers of the assistant."
            row.refuse(f"an answer under {key!r} after the messages that both sides have", got, fix)
        check_answers(row, key, side)
    tools = read_tools(row)
    return different(row, *(renderer.chat(untrained(before) + side, tools) for side in (chosen, rejected)))


def different(row: Row, chosen: Demonstration, rejected: Demonstration) -> Preference:
    """Make a preference of two sides; refuse two sides with the same tokens."""
    if chosen == rejected:
        fix = f"There is nothing to prefer. Leave such rows out: {conversions.different(row)}"
        row.refuse("two different answers under 'chosen' and 'rejected'", "equal ones", fix)
    return Preference(chosen, rejected)


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the number of equal items at the start of two sequences."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def with_prompt(row: Row, common: Messages) -> Messages:
    """Return the messages before the answers: the prompt, and the messages at the start of both sides."""
    prompt = row.fields.get("prompt") or []
    if isinstance(prompt, str):
        before = [user(str(prompt))]
    else:
        before = read_messages(row, "prompt") if prompt else []
    if isinstance(prompt, str) and before[0] in common:
        return common
    if common[: len(before)] == before:
        return common
    if common and before:
        fix = "Leave out one of the two."
        row.refuse("the messages of the prompt at the start of 'chosen' and 'rejected'", "others", fix)
    return before + common


LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
"""The labels of all kinds of files, in small letters: a table may have TRUE, and 1.0 where others are missing."""


def label_of(row: Row) -> bool | None:
    """Return whether a row's label is true; None if it is neither true nor false, or missing."""
    label = row.fields.get("label")
    return LABELS.get(str(label).strip().lower()) if isinstance(label, (bool, str)) else None


def labelled(row: Row, renderer: Renderer) -> list[Labelled]:
    """``{"prompt", "completion", "label"}``: the label is true for a desirable completion."""
    label = label_of(row)
    if label is None:
        row.refuse("true or false under 'label'", shown_field(row, "label"), "true is a desirable completion.")
    examples = prompt_and_completion(row, renderer)
    if len(examples) > 1:
        fix = 'Train the last answer: give the others "weight": 0.'
        row.refuse("a completion in one sequence", f"{len(examples)}, by the chat template", fix)
    return [Labelled(examples[0], label)]


# Problems


def prompt_and_answer(row: Row, renderer: Renderer) -> list[Problem]:
    """``{"prompt", "answer"}``: the answer is a text or a number; the prompt is a text or a list of messages."""
    return [problem(row, renderer, text_of(row, "answer"))]


def prompt_alone(row: Row, renderer: Renderer) -> list[Problem]:
    """``{"prompt"}``, for rewards that need no answer."""
    if "answer" in row.fields:
        fix = "The first row has none: give every row an answer, or none."
        row.refuse("a prompt without an answer", "one with an answer", fix)
    return [problem(row, renderer, None)]


def problem(row: Row, renderer: Renderer, answer: str | None) -> Problem:
    """Make a problem of the row's prompt."""
    fields = plain(row.fields)
    if isinstance(row.fields.get("prompt"), list):
        return Problem(renderer.prompt(read_messages(row, "prompt"), read_tools(row)), answer, fields)
    refuse_tools(row)
    return Problem(renderer.prompt(text_of(row, "prompt", empty=True)), answer, fields)


def final_answer(row: Row, renderer: Renderer) -> list[Problem]:
    """``{"question", "answer"}``, as in GSM8K: the answer is the number after ``####``, without commas."""
    answer = text_of(row, "answer")
    if "####" in answer:
        answer = answer.rpartition("####")[2].strip().replace(",", "")
        if not answer:
            row.refuse("an answer after '####' under 'answer'", "nothing", "Leave this row out.")
    return [Problem(renderer.prompt([user(text_of(row, "question"))]), answer, plain(row.fields))]


def last_answer(read: Callable[[Row], Messages], key: str) -> Callable[[Row, Renderer], list[Problem]]:
    """Return a reader of the last answer of a chat as a problem."""

    def examples(row: Row, renderer: Renderer) -> list[Problem]:
        chat = read(row)
        last = max((i for i, each in enumerate(chat) if each["role"] == "assistant"), default=None)
        if last is None or not chat[last]["content"].strip():
            got = "none" if last is None else "one without text"
            row.refuse(f"an answer of the assistant under {key!r}", got, "It is what a sample is compared with.")
        return [Problem(renderer.prompt(chat[:last], read_tools(row)), chat[last]["content"], plain(row.fields))]

    return examples


FORMATS: dict[type[Example], tuple[Format, ...]] = {
    Demonstration: (
        Format("prompt and completion", ("prompt", "completion"), without_label),
        Format("messages", ("messages",), demonstrated(messages, "messages")),
        Format("ShareGPT conversations", ("conversations",), demonstrated(sharegpt, "conversations"),
               ("system", "tools", "functions")),
        Format("Alpaca instructions", ("instruction", "output"), demonstrated(alpaca, "output"), ("input", "system")),
        Format("question and answer", ("question", "answer"), demonstrated(question_and_answer, "answer"), ()),
        Format("text", ("text",), plain_text, ()),
    ),
    Preference: (
        Format("prompt, chosen and rejected", ("prompt", "chosen", "rejected"), pair),
        Format("chosen and rejected with a common start", ("chosen", "rejected"), implicit_pair,
               ("prompt", "tools", "functions")),
    ),
    Labelled: (Format("prompt, completion and label", ("prompt", "completion", "label"), labelled),),
    Problem: (
        Format("prompt and answer", ("prompt", "answer"), prompt_and_answer),
        Format("question and answer; what follows '####' is the answer", ("question", "answer"), final_answer, ()),
        Format("messages; the last answer", ("messages",), last_answer(messages, "messages")),
        Format("ShareGPT conversations; the last answer", ("conversations",), last_answer(sharegpt, "conversations"),
               ("system", "tools", "functions")),
        Format("Alpaca instructions; the output is the answer", ("instruction", "output"),
               last_answer(alpaca, "output"), ("input", "system")),
        Format("prompt without an answer", ("prompt",), prompt_alone),
    ),
}  # fmt: skip
"""The formats by the kind of example."""

KINDS: dict[type[Example], str] = {
    Demonstration: "supervised methods (sft)",
    Preference: "preference methods (dpo, orpo)",
    Labelled: "methods of unpaired preference (kto)",
    Problem: "policy methods (grpo, dapo, gspo-token)",
}
"""The methods that train on each kind of example."""


def matching(row: Row, formats: Sequence[Format]) -> Format | None:
    """Return the first format whose fields a row has."""
    return next((each for each in formats if all(key in row.fields for key in each.keys)), None)


def recognise(row: Row, kind: type[Example]) -> Format:
    """Return the format of a row, among the formats of one kind of example.

    Raises:
        LossInputError: if the row has another format. The error names this format and says how to convert it.
    """
    formats = FORMATS[kind]
    if (row_format := matching(row, formats)) is not None:
        return row_format
    names = ", ".join(map(shown, row.fields)) or "no fields"
    keys = formats[0].keys
    missing = next((key for key in keys if key not in row.fields), keys[0])
    reads = "; ".join(", ".join(each.keys) for each in formats)
    readers = KINDS[kind].capitalize()
    found = ((each, other) for other, others in FORMATS.items() if (each := matching(row, others)))
    others = [(each, other) for each, other in found if each.keys != ("prompt",)]
    if others:
        other_format, other = max(others, key=lambda pair: len(pair[0].keys))
        name = other_format.name.split(";")[0]
        fix = f"The row is of the format {name}, which {KINDS[other]} read. {readers} read {reads}."
        row.refuse(f"text under {missing!r}", "nothing", fix)
    path = conversions.path_of(row)
    if (key := key_of_rows(row.fields)) is not None and conversions.is_json(path):
        row.refuse(f"text under {missing!r}", "nothing", write_list(path, quoted(key)[1:-1]))
    fix = f"The row has {names}. {readers} read {reads}. {conversions.renamed(row, keys)}"
    row.refuse(f"text under {missing!r}", "nothing", fix)


def examples_of(row: Row, row_format: Format, renderer: Renderer) -> Sequence[Any]:
    """Make the examples of a row of a format; refuse images and sounds, and tokens that the model does not have.

    Raises:
        LossInputError: with the place of the row.
    """
    for key in MEDIA:
        if row.fields.get(key) and row.fields[key] not in ("[]", "{}", "null"):
            fix = f"If the texts do not need them: {conversions.without(row, key)}"
            row.refuse("text only", f"{key!r}, which are not read", fix)
    try:
        examples = row_format.read(row, renderer)
    except LossInputError as error:
        if error.field == row.place:
            raise
        row.refuse(f"{error.expected} ({error.field})", error.got, error.fix)
    check_vocabulary(row, examples, renderer)
    return examples


def unread(rows: Sequence[Row], row_format: Format) -> list[str]:
    """Return the names of the fields of rows, and of those of their messages, that a format does not read."""
    fields = [name for row in rows for name in row.fields if name not in row_format.keys + row_format.also]
    inside = [name for row in rows for key in row_format.keys for name in unread_of(key, row.fields.get(key))]
    return [*dict.fromkeys(fields + inside)]


def check_vocabulary(row: Row, examples: Sequence[Example], renderer: Renderer) -> None:
    """Refuse a row with a token that the model does not have."""
    limit = renderer.vocabulary
    if limit is None:
        return
    largest = max((max(tokens, default=0) for example in examples for tokens in tokens_of(example)), default=0)
    if largest >= limit:
        fix = "The tokenizer has tokens that the model lacks: take the model's own tokenizer, or a larger model."
        row.refuse(f"token ids in [0, {limit}), those of the model", f"{largest} ({renderer.shown([largest])!r})", fix)


def tokens_of(example: Example) -> list[list[int]]:
    """Return the tokens of each sequence of an example; for a problem, of its prompt."""
    return [example.prompt] if isinstance(example, Problem) else [each.tokens for each in sequences(example)]


def prompt_style(row: Row, row_format: Format) -> str:
    """Return the style of a row's prompt: ``"chat"``, ``"text"``, or ``"passage"`` for a text without a prompt."""
    prompt = row.fields.get("prompt", "") if row_format.keys[0] in ("prompt", "text") else None
    if isinstance(prompt, str) and not isinstance(row.fields.get("chosen"), list):
        return "text" if prompt else "passage"
    return "chat"
