"""Text and messages as tokens: the one place that knows a tokenizer and its chat template.

The tokens of a prompt are those that the model gets when it is sampled. An answer is trained after exactly
these tokens, and up to the token that ends it. Whatever a chat template does not write is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from typing import Any

from lossfns.errors import LossInputError
from lossfns.train.examples import Demonstration, demonstration

Message = Mapping[str, Any]
"""A message as OpenAI has it: ``role``, ``content`` (text), ``tool_calls`` (arguments as objects), ``tool_call_id``,
``name``, ``reasoning_content``; and ``weight``, which is 1 for the assistant and 0 for others unless it is given."""

CACHED_PIECES, LONG_PIECE = 512, 10_000
"""The pieces of text that are cached with their tokens, and the length in characters from which none is cached."""

DATE = datetime(2024, 7, 26)
"""The present for a chat template that asks for it, so that the tokens are the same on every day.

The templates of Llama 3 have this date, too, where nobody tells them another.
"""

DATED = f"the chat template asks for the date: it gets {DATE:%d %b %Y} on every day"

DATE_CODES = {"%F": "%Y-%m-%d", "%D": "%m/%d/%y", "%T": "%H:%M:%S", "%R": "%H:%M", "%h": "%b", "%e": "%d"}
DATE_CODES |= {f"%{code}": DATE.strftime(f"%{code}") for code in "aAbBcdfGHIjmMpSuUVwWxXyYzZ"}
DATE_CODES |= {f"%-{code}": DATE_CODES[f"%{code}"].lstrip("0") or "0" for code in "dHIjmMSy"}
"""What to write in turn for each code of ``strftime``."""
DATE_MACRO = (
    "{% macro strftime_now(form) %}{{ form"
    + "".join(f".replace({json.dumps(code)}, {json.dumps(text)})" for code, text in DATE_CODES.items())
    + " }}{% endmacro +%}"
)
"""A function for chat templates that hides the one of the clock. transformers takes no function as an argument."""

MARK = "qvzx"
"""A word that no template has, to find out what a template writes."""

ASKED = {"role": "user", "content": "a"}
CALL = {"id": "callabcde", "type": "function", "function": {"name": MARK, "arguments": {"a": MARK}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "description": "b"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": MARK, "description": MARK, "parameters": SCHEMA}}
PROBES: dict[str, tuple[list[Message], list[Any] | None, int]] = {
    "a system message": ([{"role": "system", "content": MARK}, ASKED], None, 1),
    "tools": ([ASKED], [TOOL], 2),
    "a call of a tool": ([ASKED, CALLED], None, 2),
    "a result of a tool": (
        [ASKED, CALLED, {"role": "tool", "name": MARK, "tool_call_id": "callabcde", "content": MARK}],
        None,
        3,
    ),
    "reasoning": ([ASKED, {"role": "assistant", "content": "b", "reasoning_content": MARK}], None, 1),
}
"""Parts of a chat that only some templates write: messages and tools, and how often the text must have ``MARK``."""


class Renderer:
    """Text and messages as tokens of one tokenizer.

    With a chat template, messages are written by it. Without one they are plain lines ``role: text``, and the end token
    follows each text of the assistant.

    Args:
        tokenizer: a ``ByteTokenizer`` or a tokenizer of ``transformers``.
        vocabulary: the number of token ids of the model, which rows may not exceed; None if it is not known.
        context: the most tokens that the model reads; infinity if there is no limit, or none is known.

    Attributes:
        tokenizer, vocabulary, context: the arguments.
        template: its chat template; None if messages become plain lines.
        end: the ids that end an answer: first the one that is trained, then others that the tokenizer declares.
        start: the ids before a text that has no prompt.
        dated: whether the chat template asks for the date, which is then always ``DATE``.

    Raises:
        LossInputError: the tokenizer has no end token.

    >>> from lossfns.backend import ByteTokenizer
    >>> renderer = Renderer(ByteTokenizer())
    >>> chat = renderer.chat([{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}])
    >>> renderer.shown(chat.tokens), sum(chat.weights)
    ('user: 2+2\\nassistant: 4<|eos|>', 2.0)
    """

    def __init__(self, tokenizer: Any, vocabulary: int | None = None, context: float = math.inf) -> None:
        self.tokenizer, self.vocabulary, self.context = tokenizer, vocabulary, context
        self.template = getattr(tokenizer, "chat_template", None)
        self.dated = "strftime_now" in str(self.template)
        special = special_texts(tokenizer)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self._encode_cached = lru_cache(CACHED_PIECES)(self._encode)
        probe = "a b".join(["", *special[:50], " c\n"])
        # False for a tokenizer whose tokens of a piece depend on the pieces around it.
        self._has_pieces = self._encode_pieces(probe) == self._encode(probe)
        self._probed: dict[str, str | None] = {}
        bos = getattr(tokenizer, "bos_token_id", None)
        self._bos = [bos] if bos is not None and bos in tokenizer.encode("", add_special_tokens=True) else []
        eos = getattr(tokenizer, "eos_token_id", None)
        declared = [eos] if isinstance(eos, int) else list(eos or [])
        self._closing = self._write_closing() if self.template else ""
        self._turn_end = self._find_turn_end(declared)
        self.end = list(dict.fromkeys(self._turn_end + declared))
        if not self.end:
            fix = "Set tokenizer.eos_token: the model has to learn where an answer ends."
            raise LossInputError("tokenizer", "an end token", "none", fix)
        self._eos = (declared or self.end)[0]
        self.start = self._bos or [self._eos]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of text, without any before or after it."""
        return self._encode_pieces(text) if self._has_pieces else self._encode(text)

    def _encode_pieces(self, text: str) -> list[int]:
        """Return the tokens of text piece by piece. A piece begins at each special token.

        The tokens of recent short pieces are cached, since the prompts of one chat share most pieces.
        """
        borders = [0, *(found.start() for found in self._special.finditer(text)), len(text)]
        pieces = (text[a:b] for a, b in pairwise(borders) if a < b)
        return [i for piece in pieces for i in self._encode_piece(piece)]

    def _encode_piece(self, piece: str) -> list[int]:
        return self._encode_cached(piece) if len(piece) < LONG_PIECE else self._encode(piece)

    def _encode(self, text: str) -> list[int]:
        return [*self.tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return text without special tokens, such as the end token."""
        return str(self.tokenizer.decode([*ids], skip_special_tokens=True))

    def shown(self, ids: Iterable[int]) -> str:
        """Return text with its special tokens."""
        return str(self.tokenizer.decode([*ids], skip_special_tokens=False))

    # Texts

    def text(self, text: str) -> Demonstration:
        """Make a demonstration of a whole text, trained from its first token to the end token."""
        return self.completion("", text)

    def completion(self, prompt: str, completion: str) -> Demonstration:
        """Make a demonstration of a prompt and the text that follows it, both as they are. The end token follows."""
        before = self._before(prompt)
        ids, start = self._continue(prompt, completion)
        end = [] if ids[-1:] and ids[-1] in self.end else [self._eos]
        return demonstration([*before, *ids[:start]], [*ids[start:], *end])

    def answered(self, prompt: Sequence[int], answer: str) -> Demonstration:
        """Make a demonstration of the tokens of a prompt and the text of its answer."""
        return demonstration(prompt, [*self.encode(answer), self.end[0]])

    def opening(self, text: str) -> list[int]:
        """Return the tokens of the first words of a text that has no prompt."""
        return [*self.start, *self.encode(text)]

    def prompt(self, prompt: str | Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """Return the tokens from which an answer is sampled.

        Args:
            prompt: a text, or messages, after which the header of the assistant's message is written.
            tools: descriptions of the tools, as OpenAI has them.

        Raises:
            LossInputError: for messages or tools that the chat template does not write.
        """
        if isinstance(prompt, str):
            return [*self._before(prompt), *self.encode(prompt)]
        self._check(prompt, tools)
        if self.template is None:
            return self._lines(prompt)
        return self.encode(self._write(prompt, tools, header=True))

    def _before(self, text: str) -> list[int]:
        """Return the tokens before a text: the token that begins a sequence, unless the text begins with it."""
        if not text:
            return self.start
        return self._bos if self.encode(text)[:1] != self._bos else []

    def _continue(self, prompt: str, completion: str) -> tuple[list[int], int]:
        """Return the tokens of a prompt and its completion, and the number of them that are the prompt.

        They are the tokens of the whole text, unless a token spans the border. Then prompt and completion are
        tokenised apart, since the model is sampled from the tokens of the prompt alone.
        """
        before, whole = self.encode(prompt), self.encode(prompt + completion)
        if whole[: len(before)] == before:
            return whole, len(before)
        ids = [*before, *self.encode(completion)]
        if self.shown(ids) != self.shown(whole):
            expected = f"tokens of {shorten(completion)} that follow those of the prompt"
            got = f"other text ({shorten(self.shown(ids)[-40:])})"
            raise LossInputError("tokenizer", expected, got, "Move the white space between the two into the prompt.")
        return ids, len(before)

    # Messages

    def chat(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Demonstration:
        """Make one demonstration of a chat. The answers with a weight are trained, each to its end.

        Raises:
            LossInputError: as ``answers`` does, and if the template changes an answer once other messages follow it.
        """
        found = self.answers(messages, tools)
        if len(found) > 1:
            expected = "a chat whose trained answers stand in one sequence"
            got = f"a chat template that writes earlier answers in another way ({len(found)} sequences)"
            raise LossInputError("messages", expected, got, 'Train the last answer: give the others "weight": 0.')
        return found[0]

    def answers(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[Demonstration]:
        """Make demonstrations of the answers in a chat that have a weight.

        Each answer follows the tokens of its prompt. If another sequence begins with the same tokens, the answer is
        trained there, so most templates give one sequence.

        Raises:
            LossInputError: for messages or tools that the chat template does not write, for an answer that does not
                follow its prompt or has no end, and if no answer is trained.
        """
        self._check(messages, tools)
        found: list[Demonstration] = []
        for i in reversed(range(len(messages))):
            if weight := weight_of(messages[i]):
                ids, start = self._answer(messages[: i + 1], tools)
                place = next((each for each in found if each.tokens[: len(ids)] == ids), None)
                if place is None:
                    place = Demonstration(ids, [0.0] * len(ids))
                    found.append(place)
                place.weights[start : len(ids)] = [weight] * (len(ids) - start)
        if not found:
            fix = "There is nothing to train on: is every weight 0?"
            raise LossInputError("messages", "an answer of the assistant that is trained", "none", fix)
        return found[::-1]

    def _answer(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> tuple[list[int], int]:
        """Return the tokens of a chat up to the end of its last message, and the number of them that are the prompt."""
        content = messages[-1]["content"]
        if self.template is None:
            prompt = self._lines(messages[:-1])
            return [*prompt, *self.encode(content), self._eos], len(prompt)
        before, whole = self._write(messages[:-1], tools, header=True), self._write(messages, tools)
        place, answer = f"messages[{len(messages) - 1}]", whole[len(before) :]
        if not whole.startswith(before):
            at = next((i for i, (a, b) in enumerate(zip(before, whole)) if a != b), len(whole))
            expected = f"an answer after its prompt, which ends in {shorten(before[-40:])}"
            fix = "The model would be trained after other tokens than it is sampled from. Mend the chat template."
            raise LossInputError(place, expected, f"another text from {shorten(whole[at : at + 40])}", fix)
        if content.strip() not in answer:
            fix = "The answer would not be trained as it is. Mend the chat template, or the message."
            raise LossInputError(place, f"the answer {shorten(content)} as text", shorten(answer), fix)
        if not self._turn_end:
            ids, start = self._continue(before, answer.removesuffix(self._closing))
            return [*ids, self._eos], start
        ids, start = self._continue(before, answer)
        end = next((i for i in range(start, len(ids)) if ids[i] in self.end), len(ids))
        if end == len(ids) or self.shown(ids[end + 1 :]).strip():
            fix = "The model would not learn to stop there. Mend the chat template."
            raise LossInputError(place, "one end token, after the answer", shorten(answer[-40:]), fix)
        return ids[: end + 1], start

    def _lines(self, messages: Sequence[Message]) -> list[int]:
        """Return messages as plain lines, and the header of an answer. Each answer has its end token."""
        ids = list(self._bos)
        for message in messages:
            ids += self.encode(f"{message['role']}: ") + self.encode(message["content"])
            ids += ([self._eos] if message["role"] == "assistant" else []) + self.encode("\n")
        return ids + self.encode("assistant: ")

    def _write(self, messages: Sequence[Message], tools: Sequence[Any] | None, header: bool = False) -> str:
        """Write messages by the chat template, with the header of an answer if asked for.

        Refuse a result that lacks a text of the user or the system, apart from the white space around that text.
        """
        plain = [{key: value for key, value in each.items() if key != "weight"} for each in messages]
        try:
            dated = DATE_MACRO + self.tokenizer.get_chat_template(tools=tools or None) if self.dated else None
            text = self.tokenizer.apply_chat_template(
                plain, tools=tools or None, chat_template=dated, tokenize=False, add_generation_prompt=header
            )
        except Exception as error:  # a template is a program
            got = f"{type(error).__name__}: {shorten(str(error))}"
            fix = "Change the messages to what the template of this model expects."
            raise LossInputError("messages", "messages that the chat template writes", got, fix) from None
        for i, each in enumerate(messages):
            if each["role"] in ("user", "system") and each["content"].strip() not in text:
                fix = "Mend the chat template, or the message."
                raise LossInputError(f"messages[{i}]", "its text as it is", "another by the chat template", fix)
        return str(text)

    def _check(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> None:
        """Refuse parts that the template does not write, and texts that would become special tokens."""
        for place, value in [*((f"messages[{i}]", each) for i, each in enumerate(messages)), ("tools", tools)]:
            if found := self._special.search(json.dumps(value, ensure_ascii=False)):
                fix = "It would become the special token: write it in another way, or leave the row out."
                raise LossInputError(place, "text without special tokens", shorten(found[0]), fix)
        for part in parts_of(messages, tools):
            if part not in self._probed:
                self._probed[part] = self._probe(part)
            if missing := self._probed[part]:
                fix = "Leave such rows out, or take a model whose template writes it."
                raise LossInputError("messages", "what the chat template writes", f"{part}: {missing}", fix)

    def _probe(self, part: str) -> str | None:
        """Return why the chat template, or plain lines, do not write a part; None if they do."""
        if self.template is None:
            return None if part == "a system message" else "the model has no chat template, and plain lines lack it"
        messages, tools, count = PROBES[part]
        try:
            written = self._write(messages, tools).count(MARK)
        except LossInputError as error:
            return error.got
        return None if written >= count else "the template leaves it out"

    def _write_closing(self) -> str:
        """Return what the chat template writes after the text of an answer."""
        try:
            return self._write([ASKED, {"role": "assistant", "content": MARK}], None).rpartition(MARK)[2]
        except LossInputError:
            return ""

    def _find_turn_end(self, declared: list[int]) -> list[int]:
        """Return the token that ends an answer in the chat template: a declared end token, or the first special one."""
        special, closing = getattr(self.tokenizer, "added_tokens_decoder", {}), self.encode(self._closing)
        return ([i for i in closing if i in declared] or [i for i in closing if i in special])[:1]


def special_texts(tokenizer: Any) -> list[str]:
    """Return the texts that a tokenizer takes for special tokens, longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts = {str(token) for token in added if token.special} | set(getattr(tokenizer, "all_special_tokens", []))
    return sorted(texts - {""}, key=len, reverse=True)


def weight_of(message: Message) -> float:
    """Return the weight of a message's tokens: by default 1 for the assistant's, and 0 for others."""
    return float(message.get("weight", message["role"] == "assistant"))


def parts_of(messages: Sequence[Message], tools: Sequence[Any] | None) -> list[str]:
    """Return which keys of ``PROBES`` messages and tools have, in their order."""
    present = {
        "a system message": any(each["role"] == "system" for each in messages),
        "tools": bool(tools),
        "a call of a tool": any(each.get("tool_calls") for each in messages),
        "a result of a tool": any(each["role"] == "tool" for each in messages),
        "reasoning": any(each.get("reasoning_content") for each in messages),
    }
    return [part for part in PROBES if present[part]]


def shorten(text: str) -> str:
    """Show a text in at most 40 printable characters."""
    return ascii(text if len(text) <= 36 else f"{text[:20]}...{text[-13:]}")


def typed_prompt(renderer: Renderer, style: str, text: str) -> list[int]:
    """Return the prompt for a text that a person has typed, in the style of a task's prompts.

    Args:
        renderer: makes the tokens.
        style: ``"chat"``, ``"text"`` or ``"passage"``: texts that have no prompt.
        text: becomes a message of the user in a chat, and is continued otherwise.

    >>> from lossfns.backend import ByteTokenizer
    >>> renderer = Renderer(ByteTokenizer())
    >>> [renderer.shown(typed_prompt(renderer, style, "a")) for style in ("chat", "text", "passage")]
    ['user: a\\nassistant: ', 'a', '<|eos|>a']
    """
    if style == "chat":
        return renderer.prompt([{"role": "user", "content": text}])
    return renderer.opening(text) if style == "passage" else renderer.prompt(text)
