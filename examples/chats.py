"""Write small files of chats to train a small model on: python examples/chats.py FOLDER

    python.jsonl    {messages}                  what the functions of Python's standard library do, by their docstrings
    concise.jsonl   {prompt, chosen, rejected}  the same answers, preferred to those with phrases around them
    sums.jsonl      {prompt, answer}            the sum of two numbers below 21
    larger.jsonl    {prompt, answer}            the larger one of two numbers below 51

The files depend only on the version of Python. docs/train.md shows what a model of 135 million parameters learns from
them.
"""

import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

MODULES = """
argparse ast asyncio base64 bisect builtins calendar collections copy csv datetime decimal difflib email
fractions functools glob gzip hashlib heapq html inspect io itertools json logging math os os.path pathlib
pickle platform queue random re secrets shutil socket sqlite3 statistics string struct subprocess sys tarfile
tempfile textwrap threading time timeit tokenize traceback types unicodedata urllib.parse uuid zipfile zlib
"""

QUESTIONS = ("What does {} do in Python?", "Explain {} in one sentence.", "What is {} for?", "When do I use {}?")

OPENINGS = (
    "Great question!", "Sure, I can help with that.", "Thank you for asking.", "Of course!", "Certainly!",
    "I'd be happy to explain.", "That is a very interesting topic.", "As an AI assistant, I can tell you about this.",
)  # fmt: skip
CLOSINGS = (
    "I hope this helps!", "Let me know if you have any other questions.", "Feel free to ask for more details.",
    "Is there anything else you would like to know?", "Have fun with Python!", "I hope that answers your question.",
)  # fmt: skip


def functions() -> Iterator[tuple[str, str]]:
    """Yield the functions and methods of the modules by name, each with the first sentence of its docstring."""
    seen = set()
    for module in map(importlib.import_module, MODULES.split()):
        prefix = "" if module.__name__ == "builtins" else f"{module.__name__}."
        for name, value in sorted(vars(module).items()):
            members = sorted(vars(value).items()) if inspect.isclass(value) else []
            for path, member in [(name, value), *((f"{name}.{key}", each) for key, each in members)]:
                sentence = first_sentence(getattr(member, "__doc__", None))
                if callable(member) and "_" not in (path[0], path.rpartition(".")[2][0]) and sentence not in seen:
                    seen.add(sentence)
                    if sentence:
                        yield prefix + path, sentence


def first_sentence(text: object) -> str:
    """Return the first sentence of a docstring in prose, on one line; an empty string if it has none."""
    paragraphs = [" ".join(p.split()) for p in inspect.cleandoc(text).split("\n\n")] if isinstance(text, str) else []
    for paragraph in paragraphs[:2]:
        sentence = re.match(r"[A-Z][a-z]+ [^<>|\[\]{}*]{20,140}?\.(?= |$)", paragraph)
        if sentence and sentence[0].isascii():
            return sentence[0]
    return ""


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(0)
    named = rng.sample(list(functions()), 1000)
    chats = [(user(rng.choice(QUESTIONS).format(name)), sentence) for name, sentence in named]
    write(folder / "python.jsonl", [{"messages": [*prompt, assistant(answer)]} for prompt, answer in chats])
    write(folder / "concise.jsonl", [
        {"prompt": prompt, "chosen": [assistant(answer)], "rejected": [assistant(wordy(answer, rng))]}
        for prompt, answer in rng.sample(chats, 600)
    ])  # fmt: skip
    pairs = [(a, b) for a in range(1, 51) for b in range(1, 51) if a != b]
    write(folder / "larger.jsonl", [
        {"prompt": asked(f"Which is larger, {a} or {b}?"), "answer": str(max(a, b))} for a, b in rng.sample(pairs, 400)
    ])  # fmt: skip
    pairs = [(a, b) for a in range(1, 21) for b in range(1, 21)]
    write(folder / "sums.jsonl", [
        {"prompt": asked(f"What is {a} + {b}?"), "answer": str(a + b)} for a, b in rng.sample(pairs, 400)
    ])  # fmt: skip


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Answer with one number."}, *user(question)]


def first_number(problem: Any, text: str) -> float:
    """Reward a sample whose first number is the answer, by --reward examples/chats.py:first_number.

    The last number, which the reward ``number`` takes, would also reward "13 is larger than 22", and a model learns it.
    """
    found = re.search(r"\d+", text)
    return float(found is not None and found[0] == problem.answer)


def wordy(answer: str, rng: Random) -> str:
    """Return an answer with a phrase before it, after it, or both."""
    opening, closing = rng.choice([(1, 0), (0, 1), (1, 1)])
    return " ".join([rng.choice(OPENINGS)] * opening + [answer] + [rng.choice(CLOSINGS)] * closing)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
