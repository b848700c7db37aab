"""The runner of the golden vectors on programs of any behaviour: what it reads, what it says, and what it ends."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lossfns import LossInputError
from lossfns.cli import main
from lossfns.testing.vectors import load, run
from lossfns.testing.vectors.program import MAX_LINE, one_line
from lossfns.testing.vectors.runner import VectorReport, evaluate
from lossfns.testing.vectors.vector import FOLDER, encode

ANSWERS = """
answers = json.load(open(os.path.join(os.path.dirname(__file__), "answers.json")))
def say(reply): print(json.dumps(reply), flush=True)
"""


def program(folder: Path, text: str) -> str:
    """Return the command of a Python program. ``answers`` has the right replies by id; ``say`` writes a reply."""
    replies = {v.id: encode({"id": v.id, **v.answer}) for v in load()}
    (folder / "answers.json").write_text(json.dumps(replies))
    path = folder / "program.py"
    path.write_text("import json, os, subprocess, sys, time\n" + ANSWERS + text)
    return f"'{sys.executable}' -S '{path}'"


def fly(folder: Path, text: str, loss: Any = "dpo", **options: Any) -> VectorReport:
    return run(program(folder, text), loss=loss, **options)


# No answer


SILENT = {
    "crash": "sys.exit('no licence')",
    "killed": "os.kill(os.getpid(), 11)",
    "ended": "pass",
    "silent": "time.sleep(60)",
    "reads and is silent": "sys.stdin.read(); time.sleep(60)",
    "echo": "for line in sys.stdin: print(line, end='', flush=True)",
    "echo in another form": "for line in sys.stdin: say(json.loads(line))",
    "garbage": "while True: print('y')",
    "no newline": "print('{', end='', flush=True); time.sleep(60)",
    "closed output": "os.close(1); time.sleep(60)",
    "a list": "for line in sys.stdin: print('[1]', flush=True)",
}


@pytest.mark.parametrize("text", SILENT.values(), ids=SILENT)
def test_no_bug_is_named_for_a_program_that_gave_no_answer_and_the_report_is_one_sentence(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lossfns.testing.vectors.program.PATIENCE", 0.5)
    report = fly(tmp_path, text, loss=None, timeout=0.5)
    assert not report.ok and report.likely() == [] and report.as_dict()["likely_bugs"] == []
    assert len(report.no_reply) == len(report.results)
    sentence, *stderr = report.table().splitlines()
    assert report.complaint.splitlines()[0] in sentence
    assert report.table().endswith(f"none of {len(report.results)} vectors has a reply")
    assert len(stderr) <= 3 and "852 failures" not in sentence


@pytest.mark.parametrize("reply", ['"error": "no"', '"answer": 3', '"loss": 1.0'])
def test_no_bug_is_named_for_replies_without_an_answer(tmp_path: Path, reply: str) -> None:
    text = f"for line in sys.stdin: print('{{\"id\": \"' + json.loads(line)['id'] + '\", {reply}}}', flush=True)"
    report = fly(tmp_path, text)
    assert not report.ok and report.likely() == []
    assert "likely bugs" not in report.table() and report.no_reply == []


def test_an_echo_is_stopped_soon(tmp_path: Path) -> None:
    """It is not waited for: the time-out is an hour."""
    report = fly(tmp_path, "for line in sys.stdin: print(line, end='', flush=True)\ntime.sleep(60)", timeout=3600)
    assert report.complaint == "it repeats the requests and answers none"


def test_a_program_that_shows_its_requests_before_it_replies_is_understood(tmp_path: Path) -> None:
    text = "for line in sys.stdin: print(line, end=''); say(answers[json.loads(line)['id']])"
    report = fly(tmp_path, text)
    assert report.ok and "it wrote a line that is no reply" in report.complaint


def test_bugs_are_named_by_the_answers_of_a_program_that_crashes_later(tmp_path: Path) -> None:
    """It exchanges the sides, and ends after ten requests."""
    text = """
for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    reply = answers[request["id"]]
    if number == 10: sys.exit(3)
    if "loss" in reply and len(reply["grad"]) == 2: reply["grad"] = [[-x for x in row] for row in reply["grad"]]
    say(reply)
"""
    report = fly(tmp_path, text)
    assert len(report.no_reply) == len(load("dpo")) - 10
    assert all(bug.vectors <= 10 for bug in report.likely())
    assert f"{len(report.no_reply)} vectors have no reply, the first is dpo-0011" in report.table()
    assert "it ended with exit status 3" in report.complaint
    assert report.table().count("no reply") == 1


# Unsupported


SKIPS = """
for line in sys.stdin:
    request = json.loads(line)
    skip = request["loss"] == "orpo" or request["config"].get("label_smoothing")
    say({"id": request["id"], "unsupported": "not written: " + request["loss"]} if skip else answers[request["id"]])
"""


def test_a_reply_that_says_unsupported_is_a_skip_counted_by_loss(tmp_path: Path) -> None:
    report = fly(tmp_path, SKIPS, loss=["dpo", "orpo"])
    smooth = sum(bool(v.config.get("label_smoothing")) for v in load("dpo"))
    assert report.ok and report.failures == [] and report.likely() == []
    assert smooth and report.count("skip", "dpo") == smooth and report.count("skip", "orpo") == len(load("orpo"))
    assert report.count("pass") == len(load("dpo")) - smooth
    heading, _, orpo_row, _ = (line.split() for line in report.table().splitlines()[:4])
    assert heading[2:] == ["pass", "fail", "skip", "total"]
    assert orpo_row == ["orpo", "0", "0", str(len(load("orpo"))), str(len(load("orpo")))]
    assert f"{report.count('skip')} vectors are not supported: not written: dpo; not written: orpo" in report.table()
    assert report.as_dict()["losses"]["dpo"]["skip"] == smooth
    assert report.as_dict()["skipped"][-1] == {"id": load("orpo")[-1].id, "reason": "not written: orpo"}


def test_strict_counts_a_skip_as_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = program(tmp_path, SKIPS)
    assert main(["vectors", "run", "--cmd", command, "--loss", "dpo"]) == 0
    assert main(["vectors", "run", "--cmd", command, "--loss", "dpo", "--strict"]) == 1
    right = program(tmp_path, "for line in sys.stdin: say(answers[json.loads(line)['id']])")
    assert main(["vectors", "run", "--cmd", right, "--loss", "dpo", "--strict"]) == 0
    assert "vectors are not supported" in capsys.readouterr().out


def test_a_program_that_supports_nothing_is_told_that_nothing_was_tested(tmp_path: Path) -> None:
    report = fly(tmp_path, "for line in sys.stdin: say({'id': json.loads(line)['id'], 'unsupported': True})")
    assert report.ok and "vectors are not supported: unsupported; nothing was tested" in report.table()


@pytest.mark.parametrize("beside", [{"error": "no"}, {"loss": 1.0, "grad": []}, {"advantages": []}])
def test_unsupported_beside_an_answer_is_a_mistake(beside: dict[str, Any]) -> None:
    for vector in (load("dpo")[0], next(v for v in load("dpo") if v.error)):
        result = evaluate(vector, {"id": vector.id, "unsupported": "x", **beside}, "float64", ())
        assert (result.verdict, result.wrong) == ("fail", "an answer and 'unsupported' at once")


def test_the_schema_has_unsupported() -> None:
    from jsonschema import Draft202012Validator

    schema = json.loads((FOLDER / "schema.json").read_text())
    validator = Draft202012Validator({"$ref": "#/$defs/reply", "$defs": schema["$defs"]})
    assert validator.is_valid({"id": "dpo-0001", "unsupported": "no pairs"})
    assert validator.is_valid({"id": "dpo-0001", "unsupported": True})
    assert not validator.is_valid({"id": "dpo-0001", "unsupported": ""})
    assert not validator.is_valid({"id": "dpo-0001", "unsupported": "no pairs", "error": "no"})


# Arguments


def test_loss_takes_several_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = program(tmp_path, "for line in sys.stdin: say(answers[json.loads(line)['id']])")
    for options in (
        ["--loss", "dro,orpo"],
        ["--loss", "dro", "--loss", "orpo"],
        ["--loss", "orpo, dro", "--loss", "dro"],
    ):
        assert main(["vectors", "run", "--cmd", command, *options]) == 0
        counts = dict(line.split()[::2][:2] for line in capsys.readouterr().out.splitlines()[1:] if line)
        assert set(counts) == {"dro", "orpo", "all"}
    assert len(run(command, loss=("dro", "dro")).results) == len(load("dro"))


def test_an_unknown_loss_is_answered_with_a_similar_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vectors", "run", "--cmd", "true", "--loss", "dpo,grop"]) == 2
    assert capsys.readouterr().err.strip().endswith("got 'grop'. Did you mean 'grpo'?")
    with pytest.raises(LossInputError, match="an empty list"):
        run("true", loss=[])


@pytest.mark.parametrize("seconds", ["inf", "-inf", "nan", "0", "-1", "1e300", "86401", "1e999"])
def test_a_timeout_that_is_none_is_refused_by_name(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vectors", "run", "--cmd", "true", f"--timeout={seconds}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("lossfns: timeout: expected seconds above 0, at most 86400 (a day), got ")


# Streams


def test_a_program_that_closes_its_input_is_told_so(tmp_path: Path) -> None:
    report = fly(tmp_path, "os.close(0); time.sleep(60)", loss=None, timeout=0.5)
    assert report.complaint == "it gave no reply for 0.5 s; it closed its input"


def test_a_line_without_an_end_is_told_and_at_the_end_of_output_it_is_a_line(tmp_path: Path) -> None:
    hanging = fly(tmp_path, "print('{\"id\"', end='', flush=True); time.sleep(60)", timeout=0.5)
    assert hanging.complaint == "it gave no reply for 0.5 s; it wrote 5 bytes without a newline"
    text = "print('\\n'.join(json.dumps(answers[json.loads(line)['id']]) for line in sys.stdin), end='')"
    assert fly(tmp_path, text).ok


def test_replies_in_parts_are_put_together(tmp_path: Path) -> None:
    text = """
for line in sys.stdin:
    reply = json.dumps(answers[json.loads(line)["id"]]) + "\\n"
    for part in (reply[:7], reply[7:40], reply[40:]): print(part, end="", flush=True)
"""
    assert fly(tmp_path, text).ok


def test_bytes_that_are_no_utf8_are_quoted(tmp_path: Path) -> None:
    text = "sys.stdout.buffer.write(b'\\xff\\xfe\\x1b[31m\\n'); sys.stdout.flush()\n"
    report = fly(tmp_path, text + "for line in sys.stdin: say(answers[json.loads(line)['id']])")
    assert (report.ok and report.complaint.endswith(r"'\ufffd\ufffd\x1b[31m'")) or "��" in report.complaint
    assert "\x1b" not in report.table()


def test_a_second_reply_is_told_and_the_first_one_counts(tmp_path: Path) -> None:
    text = """
for line in sys.stdin:
    reply = answers[json.loads(line)["id"]]
    say(reply); say({"id": reply["id"], "error": "again"})
"""
    report = fly(tmp_path, text)
    right = [r for r in report.results if r.vector.error is None]
    assert all(r.verdict == "pass" for r in right) and "is no reply to any open request" in report.complaint


def test_replies_in_reverse_order_are_right(tmp_path: Path) -> None:
    assert fly(tmp_path, "for line in reversed(list(sys.stdin)): say(answers[json.loads(line)['id']])").ok


def test_output_after_the_last_reply_changes_nothing(tmp_path: Path) -> None:
    text = "for line in sys.stdin: say(answers[json.loads(line)['id']])\nwhile True: print('bye')"
    report = fly(tmp_path, text)
    assert report.ok and report.complaint == ""


def peak(folder: Path, text: str, **options: Any) -> tuple[VectorReport, int]:
    """Return the report and the largest memory of the runner, in bytes."""
    command = program(folder, text)
    load()
    tracemalloc.start()
    try:
        return run(command, **options), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


FLOODS = {
    "stderr": ("for _ in range(300): sys.stderr.buffer.write(b'e' * 2**20)\nsys.exit('\\nlast words')", "last words"),
    "stdout": ("for _ in range(300): sys.stdout.buffer.write(b'o' * 2**20)", "it wrote a line of more than 1048576"),
    "lines": ("while True: print('l' * 2**18)", "1000 lines were no reply"),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_megabytes_of_output_are_not_held_in_memory(tmp_path: Path, flood: str) -> None:
    text, words = FLOODS[flood]
    report, most = peak(tmp_path, text, loss="dpo")
    assert words in report.complaint and most < 20 * MAX_LINE


def test_large_replies_are_not_held_in_memory(tmp_path: Path) -> None:
    """Each reply has half a megabyte. All together have 70."""
    text = "for line in sys.stdin: say({'id': json.loads(line)['id'], 'error': 'x' * 2**19})"
    report, most = peak(tmp_path, text, loss=["dpo", "orpo"])
    assert report.no_reply == [] and most < 24 * MAX_LINE
    assert all(len(result.wrong) <= 200 for result in report.results)


# Processes


CHILD = """
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
with open(os.path.join(os.path.dirname(__file__), "child"), "w") as file: file.write(str(child.pid))
"""


def is_dead(folder: Path) -> bool:
    """Wait for the grandchild to be gone, or to be left as a zombie that nobody reaps."""
    pid = int((folder / "child").read_text())
    for _ in range(200):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("time.sleep(60)", {"timeout": 0.5}),
        ("sys.exit(1)", {"timeout": 0.5}),
        ("for line in sys.stdin: say(answers[json.loads(line)['id']])", {}),
        ("while True: print('y')", {}),
    ],
)
def test_a_grandchild_does_not_survive(tmp_path: Path, text: str, options: dict[str, Any]) -> None:
    fly(tmp_path, CHILD + text, **options)
    assert is_dead(tmp_path)


def test_a_program_that_ended_is_told_although_its_child_holds_the_output_open(tmp_path: Path) -> None:
    report = fly(tmp_path, CHILD + "sys.exit(7)", timeout=0.5)
    assert report.complaint == "it ended with exit status 7"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_is_quiet_and_ends_the_process_group(tmp_path: Path, number: int, status: int) -> None:
    command = program(tmp_path, CHILD + "time.sleep(600)")
    arguments = [sys.executable, "-m", "lossfns", "vectors", "run", "--cmd", command, "--timeout", "600"]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdout=pipe, stderr=pipe) as process:
        while process.poll() is None and not ((tmp_path / "child").exists() and (tmp_path / "child").read_text()):
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (status, b"", b"")
    assert is_dead(tmp_path)


def test_a_closed_pipe_is_quiet_and_the_exit_status_is_the_verdict(tmp_path: Path) -> None:
    for text, status in (("for line in sys.stdin: say(answers[json.loads(line)['id']])", 0), ("sys.exit(1)", 1)):
        command = [sys.executable, "-m", "lossfns", "vectors", "run", "--loss", "dro", "--cmd", program(tmp_path, text)]
        reads, writes = os.pipe()
        os.close(reads)
        with subprocess.Popen(command, stdout=writes, stderr=subprocess.PIPE) as process:
            os.close(writes)
            _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (status, b"")


# Replies of any form


def test_text_for_one_line_has_no_control_characters_and_can_be_encoded() -> None:
    assert one_line("a\nb\x1b[31m\ud800ü") == "a\\nb\\x1b[31m\\ud800ü"
    assert len(one_line("x" * 10**6)) == 200


def odd_value(rng: Random, depth: int = 3) -> Any:
    plain = [None, True, 0, -1, 1e308, 10**400, -(10**400), float("nan"), "nan", "inf", "", "\ud800\x1b", [], {}]
    kind = rng.randint(0, 3) if depth else 0
    if kind == 1:
        return [odd_value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    if kind == 2:
        return {str(i): odd_value(rng, depth - 1) for i in range(rng.randint(0, 2))}
    return rng.choice(plain)


def try_odd_replies(seeds: range) -> None:
    vectors = load()
    for seed in seeds:
        rng = Random(seed)
        vector = rng.choice(vectors)
        reply: dict[str, Any] = {"id": vector.id, **vector.answer}
        for name in rng.sample(["loss", "grad", "advantages", "metrics", "error", "unsupported"], rng.randint(1, 3)):
            reply[name] = odd_value(rng)
        report = VectorReport("x", "float64", [evaluate(vector, reply, "float64", ())])
        report.table().encode()
        json.dumps(report.as_dict(), ensure_ascii=False).encode()


def test_replies_with_odd_values_are_judged() -> None:
    try_odd_replies(range(300))
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    for vector in (load("ppo")[0], next(v for v in load("ppo") if v.kind == "kink")):
        assert evaluate(vector, {"id": vector.id, "loss": 1.0, "grad": deep}, "float64", ()).verdict == "fail"


@pytest.mark.exhaustive
def test_thousands_of_replies_with_odd_values_are_judged() -> None:
    try_odd_replies(range(300, 6000))
