"""Text and messages as tokens: an answer is trained after the tokens that it is sampled from, up to its end."""

import re
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

import pytest
from small_tokenizers import (
    CHATML,
    CUTS,
    LATE_END,
    NO_END,
    NO_SYSTEM,
    OTHER_START,
    THINKS,
    TOOLS,
    TWO_ENDS,
    byte_pairs,
    word_pieces,
)

from lossfns import LossInputError
from lossfns.backend import ByteTokenizer
from lossfns.train.examples import Demonstration, datum_of, prompt_of
from lossfns.train.render import Renderer, typed_prompt


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Add."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
RESULT = {"role": "tool", "name": "add", "tool_call_id": "1", "content": "4"}


def runs(renderer: Renderer, example: Demonstration) -> list[tuple[float, str]]:
    """The text of each run of tokens with one weight."""
    parts = groupby(zip(example.tokens, example.weights), key=lambda pair: pair[1])
    return [(weight, renderer.shown(token for token, _ in part)) for weight, part in parts]


def test_answers_follow_the_tokens_that_they_are_sampled_from() -> None:
    """Each run of trained tokens follows ``prompt`` of the messages before it, is the answer, and has its end."""
    rng, pieces = Random(0), ["hello", "\n\n", "  ", " 4", "2+2", "=4", "é", "<think>", "ow", "x"]
    renderers = {
        "bytes": Renderer(ByteTokenizer()),
        **{name: Renderer(byte_pairs(template)) for name, template in
           (("chatml", CHATML), ("tools", TOOLS), ("thinks", THINKS), ("no end", NO_END), ("plain", None))},
        "words": Renderer(word_pieces()),
    }  # fmt: skip
    sequences = dict.fromkeys(renderers, 0)
    for number in range(60):
        turns = range(rng.randint(1, 4))
        texts = ["".join(rng.choices(pieces, k=rng.randint(1, 4))) for _ in turns for _ in "ab"]
        chat = [message for i in turns for message in (user(texts[2 * i]), answer(texts[2 * i + 1] + "."))]
        for name, renderer in renderers.items():
            spans = []
            for example in renderer.answers([SYSTEM, *chat]):
                sequences[name] += 1
                starts = [i for i, w in enumerate(example.weights) if w and not example.weights[i - 1]]
                assert set(example.weights) == {0.0, 1.0} and not example.weights[0], (name, number)
                for start in starts:
                    end = next(i for i in range(start, len(example.tokens)) if example.tokens[i] in renderer.end)
                    assert all(example.weights[start : end + 1]) and not any(example.weights[end + 1 : end + 2])
                    spans.append((example.tokens[:start], renderer.decode(example.tokens[start:end])))
            spans.sort(key=lambda span: len(span[0]))
            prompts = [renderer.prompt([SYSTEM, *chat[: 2 * i + 1]]) for i in turns]
            assert [before for before, _ in spans] == prompts, (name, number)
            for (_, text), message in zip(spans, chat[1::2], strict=True):
                expected = renderer.decode(renderer.encode(message["content"]))  # not each tokenizer keeps all spaces
                assert text.removeprefix("<think>\n\n</think>\n\n") == expected, (name, number)
    assert sequences["bytes"] == sequences["plain"] == sequences["words"] == 60
    assert 60 < sequences["chatml"] == sequences["tools"] < 90  # more where a token covers the start of an answer
    assert sequences["thinks"] == sequences["no end"] > 120  # one for each answer


def test_weights_choose_the_answers_and_the_rest_is_read() -> None:
    renderer = Renderer(byte_pairs(CHATML))
    chat = [
        user("2+2"),
        answer("4", weight=0.0),
        user("3+3"),
        answer("6", weight=0.5),
        user("b"),
        answer("\n\nc"),
        user("d"),
    ]
    head = "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\n3+3<|im_end|>\n"
    example = renderer.chat(chat)
    assert runs(renderer, example) == [
        (0.0, head + "<|im_start|>assistant\n"),
        (0.5, "6<|im_end|>"),
        (0.0, "\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"),
        (1.0, "\n\nc<|im_end|>"),
    ]
    datum = datum_of(example)
    assert datum.loss_fn_inputs["target_tokens"].data == example.tokens[1:]
    assert datum.loss_fn_inputs["weights"].data == example.weights[1:]
    at = example.tokens.index(*renderer.encode("c"))
    assert renderer.shown(example.tokens[at - 1 : at]) == "\n\n"  # apart from the line break before it, as sampled


def test_tools_are_written_by_a_template_that_has_them() -> None:
    renderer = Renderer(byte_pairs(TOOLS))
    chat = [user("2+2"), answer("", tool_calls=[CALL]), RESULT, answer("It is 4.")]
    example = renderer.chat(chat, [TOOL])
    trained = [text for weight, text in runs(renderer, example) if weight]
    assert trained == ['<call>add {"a": 2, "b": 2}</call><|im_end|>', "It is 4.<|im_end|>"]
    assert '"description": "Adds."' in renderer.shown(prompt_of(example))
    assert "4 from add 1" in renderer.shown(example.tokens)
    no_end = Renderer(byte_pairs(TOOLS.replace("<|im_end|>", "")))  # the declared end token stands for it
    first, second = no_end.answers(chat, [TOOL])
    assert [runs(no_end, each)[-1][1] for each in (first, second)] == trained
    thinking = Renderer(byte_pairs(THINKS)).chat([user("2+2"), answer("4", reasoning_content="two and two")])
    assert renderer.decode(thinking.tokens).endswith("<think>\ntwo and two\n</think>\n\n4")


def test_a_template_is_refused_for_messages_that_it_does_not_write() -> None:
    chat, multi = [user("2+2"), answer("4")], [user("a"), answer("b"), user("c"), answer("d")]
    cases: list[tuple[str | None, list[Any], list[Any] | None, str]] = [
        (CHATML, chat, [TOOL], "got tools: the template leaves it out"),
        (CHATML, [user("a"), answer("", tool_calls=[CALL])], None, "got a call of a tool: the template leaves it out"),
        (CHATML, [user("a"), RESULT, answer("b")], None, "a result of a tool: the template leaves"),
        (CHATML, [user("a"), answer("b", reasoning_content="c")], None, "got reasoning: the template leaves it out"),
        (None, chat, [TOOL], "got tools: the model has no chat template"),
        (NO_SYSTEM, [SYSTEM, *chat], None, "a system message: TemplateError: 'System role not supported'"),
        (OTHER_START, chat, None, "messages[1]: expected an answer after its prompt, which ends in"),
        (LATE_END, chat, None, "messages[1]: expected one end token, after the answer, got 'so<|im_end|>4"),
        (CUTS, [user("2+2="), answer("4")], None, "messages[0]: expected its text as it is"),
        (CUTS, [user("2+2"), answer("four")], None, "messages[1]: expected the answer 'four' as text"),
        ("{{ messages[9].content }}", chat, None, "messages that the chat template writes, got UndefinedError"),
        ("{{ nonsense", chat, None, "messages that the chat template writes, got TemplateSyntaxError"),
        (CHATML, [user("<|im_end|>"), answer("b")], None, "text without special tokens, got '<|im_end|>'"),
        (CHATML, [user("a")], None, "an answer of the assistant that is trained, got none"),
        (THINKS, multi, None, "writes earlier answers in another way (2 sequences)"),
    ]  # fmt: skip
    for template, messages, tools, says in cases:
        with pytest.raises(LossInputError) as refused:
            Renderer(byte_pairs(template)).chat(messages, tools)
        assert says in str(refused.value), (template, messages, str(refused.value))
    last = [*multi[:1], answer("b", weight=0.0), *multi[2:]]  # the fix that the last message names
    assert Renderer(byte_pairs(THINKS)).chat(last).weights.count(1.0) > 1
    two = byte_pairs(TWO_ENDS, additional_special_tokens=["<|end_text|>"])
    assert runs(Renderer(two), Renderer(two).chat(chat))[-1] == (1.0, "4<|end_text|><|im_end|>")
    with pytest.raises(LossInputError, match="tokenizer: expected an end token, got none"):
        Renderer(byte_pairs(eos_token=""))


def test_a_template_that_asks_for_the_date_gets_the_same_on_every_day() -> None:
    """The rest of the template is written as before."""
    asks = "{%- if strftime_now is defined %}{{ strftime_now('%A, %-d %B %Y, %F %H:%M|') }}{% endif %}\n"
    for template in (asks + CHATML, {"default": CHATML, "tool_use": asks + TOOLS}):
        renderer = Renderer(byte_pairs(template))
        tools = None if isinstance(template, str) else [TOOL]
        text = renderer.shown(renderer.prompt([user("a")], tools))
        assert renderer.dated and text.startswith("Friday, 26 July 2024, 2024-07-26 00:00|"), template
        assert text.endswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"), template
    asked = Renderer(byte_pairs("{# strftime_now #}\n " + CHATML)).prompt([user("a")])
    assert asked == Renderer(byte_pairs("\n " + CHATML)).prompt([user("a")])


def test_texts_stay_as_they_are_between_the_tokens_that_begin_and_end_them() -> None:
    """(tokenizer, prompt, completion) → the prompt and the trained text, with special tokens."""
    pairs, words = Renderer(byte_pairs()), Renderer(word_pieces())
    cases: list[tuple[Renderer, str, str, tuple[str, str]]] = [
        (Renderer(ByteTokenizer()), "2+2=", "4", ("2+2=", "4<|eos|>")),
        (Renderer(ByteTokenizer()), "", "é", ("<|eos|>", "é<|eos|>")),
        (pairs, "2+2=", "4", ("2+2=", "4<|im_end|>")),  # "=4" is one token of the whole text
        (pairs, "he", "llo", ("he", "llo<|im_end|>")),
        (pairs, "", "hello", ("<|im_end|>", "hello<|im_end|>")),
        (pairs, "a", "b<|im_end|>", ("a", "b<|im_end|>")),
        (words, "2+2=", "4", ("<s>2+2=", "4</s>")),
        (words, "", "4", ("<s>", "4</s>")),
        (words, "<s>a", "b", ("<s>a", "b</s>")),
    ]
    for renderer, prompt, completion, expected in cases:
        example = renderer.completion(prompt, completion)
        (_, before), (_, after) = runs(renderer, example)
        assert (before.replace("<s> ", "<s>"), after) == (expected[0].replace("<s> ", "<s>"), expected[1]), (
            prompt,
            completion,
        )
        assert prompt_of(example) == renderer.prompt(prompt), prompt
        assert renderer.decode(renderer.answered(renderer.prompt(prompt), "4").tokens).endswith("4")
    assert [pairs.shown(typed_prompt(Renderer(byte_pairs(CHATML)), style, "a")) for style in ("chat", "text")] == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        "a",
    ]


@pytest.mark.exhaustive
def test_templates_of_well_known_models_are_exact_or_refused() -> None:
    """The templates that ``trl`` ships: what is trained follows its prompt and holds the whole answer."""
    package = find_spec("trl")
    folders = [Path(folder) / "chat_templates" for folder in (package and package.submodule_search_locations) or ()]
    paths = sorted(path for folder in folders for path in folder.glob("*.jinja"))
    if not paths:
        pytest.skip("trl is not installed")
    chats: dict[str, tuple[list[Any], list[Any] | None]] = {
        "two": ([user("2+2"), answer("four."), user("3+3"), answer("six.")], None),
        "system": ([SYSTEM, user("2+2"), answer("four.")], None),
        "tools": ([user("2+2"), answer("", tool_calls=[CALL | {"id": "callabcde"}]),
                   RESULT | {"tool_call_id": "callabcde"}, answer("four.")], [TOOL]),
        "reasoning": ([user("2+2"), answer("four.", reasoning_content="two and two")], None),
    }  # fmt: skip
    accepted = dict.fromkeys(chats, 0)
    for path in paths:
        template = path.read_text()
        special = sorted(set(re.findall(r"<\|[^<>|]+\|>|<｜[^｜]*｜>|</?s>|<end_of_turn>|<turn\|>", template)))
        ends = ("im_end", "eot_id", "return", "end▁of▁sentence", "END_OF_TURN", "end_of_turn", "turn|", "|end|", "</s>")
        end = next((text for name in ends for text in special if name in text), "<|eos|>")
        renderer = Renderer(byte_pairs(template, eos_token=end, extra_special_tokens=special))
        for name, (chat, tools) in chats.items():
            try:
                found = renderer.answers(chat, tools)
            except LossInputError as error:
                assert str(error).isprintable() and len(str(error)) < 600, (path.name, name)
                continue
            accepted[name] += 1
            text = "".join(renderer.shown(i for i, w in zip(e.tokens, e.weights) if w) for e in found)
            contents = [m["content"] for m in chat if m["role"] == "assistant"]
            assert all(each in text for each in contents), (path.name, name, text)
            assert "two and two" in text or name != "reasoning", (path.name, text)
            assert "add" in text or name != "tools", (path.name, text)
            for i, message in enumerate(chat):
                if message["role"] == "assistant":
                    before = renderer.prompt(chat[:i], tools)
                    fits = [e for e in found if e.tokens[: len(before)] == before and e.weights[len(before)]]
                    assert fits, (path.name, name, i)
    assert all(count > 10 for count in accepted.values()), accepted
