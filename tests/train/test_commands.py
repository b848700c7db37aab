"""``lossfns train`` at its edges, and ``lossfns plot`` and ``lossfns sample``."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lossfns.cli import main
from lossfns.errors import LossWarning, warn
from lossfns.terminal import console_on
from lossfns.train import sample_command
from lossfns.train.defaults import complete_options
from lossfns.train.display import LiveDisplay, PlainDisplay
from lossfns.train.outcome import print_samples
from lossfns.train.record import EMPTY
from lossfns.train.render import Renderer
from lossfns.train.report import samples
from lossfns.train.run import EVALUATIONS, METRICS, RESULT, Run

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
    ENVIRONMENT.pop(name, None)


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(folder: Path, count: int = 12, answer: str = "4") -> str:
    row = {"completion": answer, "answer": answer, "chosen": answer, "rejected": "5"}
    return written(folder / "rows.jsonl", [{"prompt": f"{i}: 2+2=", **row} for i in range(count)])


def small(folder: Path, method: str = "sft", *more: str) -> list[str]:
    return ["train", method, "--data", sums(folder), "--out", str(folder / "run"), "--batch", "3", *more]


def wait_for(happened: Callable[[], bool], process: "subprocess.Popen[Any]") -> None:
    deadline = time.monotonic() + 60
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def steps_done(run: Path) -> int:
    return (run / METRICS).read_bytes().count(b"\n") if (run / METRICS).exists() else 0


# Options


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--threads", "100000"], "--threads: expected a whole number from 1 to"),
        (["--threads", "0"], "--threads: expected a whole number of at least 1, got 0"),
        (["--batch", "1000000000000"], "--batch: expected a whole number from 1 to 65536"),
        (["--steps", str(10**30)], "--steps: expected a whole number from 1 to"),
        (["--warmup-steps", str(10**30)], "--warmup-steps: expected a"),
        (["--seed", str(2**64)], "--seed: expected a whole number from 0 to"),
        (["--save-every", str(10**400)], "--save-every: expected a whole number from 1 to"),
        (["--lr", "1e308"], "--lr: expected a learning rate of at most 1"),
        (["--lr", "inf"], "--lr: expected a finite number above 0"),
        (["--max-length", "100"], "--max-length: expected --data with it"),
        (["--lora", "2"], "--lora: expected a pretrained model with it: --model or --init, got neither"),
        (["--out", "a\0b"], r"--out: expected text in UTF-8 that is not empty and has no NUL, got 'a\x00b'"),
        (["--data", "a\0b"], "--data: expected text in UTF-8 that"),
        (["--init", "\udcff"], "--init: expected text in UTF-8 that"),
        (["--out", ""], "--out: expected text in UTF-8 that"),
        (["--device", "cpu\0"], "--device: expected text in UTF-8 that"),
    ],
)
def test_absurd_options_are_refused_by_name(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["train", "orpo", *arguments])
    assert ended.value.code == 2 and says in capsys.readouterr().err
    assert not os.listdir(tmp_path)


FAILING = """
def raises(data, logprobs_list):
    return logprobs_list[0].sum() / {}["x"], {}

def constant(data, logprobs_list):
    return 1.0, {}

def later(data, logprobs_list):
    if len(data) == 3 and data[0].model_input.length > 6:
        raise RuntimeError("two\\nlines")
    weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
    return -sum((w * lp).sum() for w, lp in zip(weights, logprobs_list)) / sum(w.sum() for w in weights), {}

CALLS = []
def in_the_trial(logprobs, mask):
    CALLS.append(1)
    if len(CALLS) >= 7:
        raise RuntimeError("oops")
    return -(logprobs * mask).sum() / mask.sum()

def nan_later(data, logprobs_list):
    return sum(map(sum, logprobs_list)) * (float("nan") if len(data) == 3 else 1.0), {}
"""


def test_what_ones_own_loss_raises_is_one_line_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss is tried before the run folder is made. One that fails later has made the folder, to be resumed."""
    mine = tmp_path / "failing_losses.py"
    mine.write_text(FAILING)
    for name, says, folder in [
        ("raises", f"--loss raises: expected a loss for each batch, got KeyError: 'x' ({mine}:3)", False),
        ("constant", "loss: expected a 0-d tensor, got a float", False),
        ("later", f"got RuntimeError: two lines ({mine}:10). Correct it there.", True),
        ("in_the_trial", f"got RuntimeError: oops ({mine}:18). Correct it there, or give its settings values", False),
        ("nan_later", f"--loss nan_later ({mine}:21): loss: expected a finite value, got nan", True),
    ]:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert main(small(tmp_path, f"{mine}:{name}", "--steps", "1")) == 2, name
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("lossfns: ") and says in last and (tmp_path / "run").exists() == folder, (name, last)


def test_a_run_with_code_of_ones_own_names_its_folder_as_given_and_says_that_the_code_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("elsewhere").mkdir()
    code = "import os\nos.chdir('elsewhere')\ndef mine(data, rows):\n    return -sum(map(sum, rows)), {}\n"
    Path("mine.py").write_text(code)
    assert main(small(Path(), "mine.py:mine", "--steps", "1")) == 0
    shown = capsys.readouterr().out
    assert "\ncheckpoint  run/checkpoint.safetensors\n" in shown and "\nreport      run/report.html\n" in shown
    seconds = json.loads((tmp_path / "run" / RESULT).read_text())["seconds"]
    assert f"\n1 step; {seconds:.1f} s in all, with the measurements\n" in shown
    assert f"<dt>time</dt><dd>{seconds:.1f} s</dd>" in (tmp_path / "run" / "report.html").read_text()
    for changed in (False, True):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "run" / RESULT).unlink()
        if changed:
            Path("mine.py").write_text(code + "\n")
        assert main(["train", "--resume", "run"]) == 0
        output = capsys.readouterr()
        assert "\ntry it      lossfns sample run PROMPT\n" in output.out
        said = f"lossfns: {tmp_path}/mine.py has changed since: the run may not continue bit for bit\n"
        assert (said in output.err) == changed


IN_THE_WAY = """
from pathlib import Path

def in_the_way(data, logprobs_list):
    if RUN.exists():
        (RUN / "checkpoint.safetensors" / "full").mkdir(parents=True, exist_ok=True)
    return -sum(lp.sum() for lp in logprobs_list), {}
"""


def test_an_error_of_the_system_that_is_not_a_lack_of_room_is_told_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss makes a folder where the checkpoint is to be written."""
    mine, run = tmp_path / "losses.py", tmp_path / "run"
    mine.write_text(IN_THE_WAY.replace("RUN", f"Path({str(run)!r})"))
    assert main(small(tmp_path, f"{mine}:in_the_way", "--steps", "1")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"lossfns: run {run}: expected no error of the system, got ") and "room" not in last
    assert last.endswith(f"Mend its cause, and continue with lossfns train --resume {run}.")


def test_groups_that_cannot_be_sampled_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "grpo", "--batch", "65536", "--group", "4096"])
    assert "--group: expected --batch times --group of at most 65536, got 268435456" in capsys.readouterr().err


def test_a_group_of_one_is_refused_where_samples_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    """Its advantage is 0, and its win rate is always ½. A loss that compares with the reference learns from it."""
    for loss in ("grpo", "reinforce", "sppo"):
        with pytest.raises(SystemExit):
            main(["train", loss, "--group", "1"])
        assert "--group: expected at least 2 samples of each problem, got 1" in capsys.readouterr().err, loss
    assert complete_options({"loss": "prime_ref_kl", "group": 1}).group == 1


def test_a_warning_is_one_plain_line_and_comes_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def twice() -> int:
        for text in ("a", "a", "b"):
            warn(text)
        return 0

    monkeypatch.setattr("lossfns.cli.show_overview", twice)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main([]) == 0
        assert capsys.readouterr().err == "lossfns: warning: a\nlossfns: warning: b\n"
        with pytest.warns(LossWarning):
            warn("others show it as before")


def test_a_run_that_is_stopped_in_its_warm_up_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lossfns.train.recipes.warm_up", lambda run, job: setattr(run, "stopping", True))
    assert main(small(tmp_path, "dpo", "--steps", "2", "--warmup-steps", "2")) == 0
    shown = capsys.readouterr().err
    assert "before training\n" in shown and "→" not in shown and "stopped before the first step of dpo" in shown
    assert len((tmp_path / "run" / EVALUATIONS).read_text().splitlines()) == 1


@pytest.mark.parametrize("command", [["train", "--resume"], ["plot"], ["sample"]])
def test_a_run_folder_with_a_nul_in_its_path_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        assert main([*command, "a\0b", *(["x"] if command == ["sample"] else [])]) == 2
    assert "text in UTF-8 that is not empty and has no NUL" in capsys.readouterr().err


# Closed pipes and interrupts


@pytest.mark.parametrize("closed", ["stdout", "both"])
def test_a_closed_pipe_ends_quietly_with_everything_saved(closed: str, tmp_path: Path) -> None:
    """``| head -0`` reads nothing at all. If the progress goes there too, the run stops after its step."""
    reader, writer = os.pipe()
    os.close(reader)
    steps = "3" if closed == "stdout" else "100000"
    errors = subprocess.PIPE if closed == "stdout" else writer
    command = [sys.executable, "-m", "lossfns", *small(tmp_path, "sft", "--steps", steps)]
    process = subprocess.Popen(command, stdout=writer, stderr=errors, env=ENVIRONMENT, text=True)
    os.close(writer)
    _, shown = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in (shown or "") and "Error" not in (shown or "")
    result = json.loads((tmp_path / "run" / RESULT).read_text())
    assert result["stopped_early"] is (closed == "both")
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("moment", ["in a step", pytest.param("before the run", marks=pytest.mark.exhaustive)])
def test_a_second_ctrl_c_ends_at_once_and_quietly(moment: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "lossfns", *small(tmp_path, "sft", "--steps", "100000", "--save-every", "2")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True)
    if moment == "in a step":
        wait_for(lambda: steps_done(run) >= 3, process)
    else:
        wait_for(lambda: (run / "config.json").exists(), process)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130, (shown, errors)
    assert "Traceback" not in errors and f"continue with lossfns train --resume {run}" in errors
    if moment == "in a step":
        return
    again = subprocess.Popen(
        [sys.executable, "-m", "lossfns", "train", "--resume", str(run)], stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    done = steps_done(run)
    wait_for(lambda: steps_done(run) > done, again)
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=60)
    assert again.returncode == 0


# A terminal of 80 columns


def on_a_terminal(arguments: list[str], columns: int) -> tuple[int, str]:
    """Run a command on a terminal; return its exit status and all that it writes."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.execve(sys.executable, [sys.executable, "-m", "lossfns", *arguments], ENVIRONMENT)
    output = b""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            part = os.read(terminal, 65536)
        except OSError:
            break
        if not part:
            break
        output += part
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    return status, output.decode()


def screen(output: str, columns: int) -> tuple[list[str], int]:
    """Return the lines of a terminal after this output, and how often a line was too long for it."""
    lines, row, column, wraps = [""], 0, 0, 0
    for escape, code, character in re.findall(r"\x1b\[([?\d;]*)([A-Za-z])|([\s\S])", output):
        if code == "A":
            row -= int(escape or 1)
        elif code == "K":
            lines[row] = ""
        elif character == "\r":
            column = 0
        elif character == "\n":
            row += 1
        elif character:
            if column == columns:
                row, column, wraps = row + 1, 0, wraps + 1
            lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row].ljust(column)[:column] + character + lines[row][column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines], wraps


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("columns", [80, pytest.param(60, marks=pytest.mark.exhaustive)])
def test_progress_takes_one_line_a_phase_and_three_below_on_a_terminal(columns: int, tmp_path: Path) -> None:
    more = ["--steps", "12", "--warmup-steps", "12", "--group", "3"]
    status, output = on_a_terminal(small(tmp_path, "grpo", *more), columns)
    progress = output[output.index("measuring on") : output.rindex("\x1b[?25h")]  # paths in other lines may be longer
    lines, wraps = screen(progress, columns)
    assert status == 0 and wraps == 0, output
    assert sum("warm-up" in line for line in lines) == 1
    assert sum("12/12" in line for line in lines) == 2
    assert len(lines) <= 8


def test_the_bar_fits_with_long_metrics_and_many_steps(terminal: io.StringIO, tmp_path: Path) -> None:
    with Run(tmp_path, terminal=terminal) as run:
        for step in run.steps("gspo-token", 100_000, Random(0)):
            run.log(step, {"loss": -1234.567, "reward": 0.5, "accuracy": 0.25})
            if step == 60:
                run.stopping = True
    lines, wraps = screen(terminal.getvalue().replace("\n", "\r\n"), 80)
    assert wraps == 0 and sum("gspo-token" in line for line in lines) == 1


def test_a_slow_phase_gets_a_line_before_its_first_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display = PlainDisplay(stream)
    display.begin_phase("sft", 0, 1000)
    for step in range(1, 41):
        now[0] += 4.0
        display.show_step(step, {"loss": 1.0})
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == [f"{n}/1000" for n in range(3, 40, 3)]


def test_an_evaluation_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch, terminal: io.StringIO) -> None:
    """Plain text gets a line every ten seconds, also before the first phase. A terminal shows the newest number."""
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display = PlainDisplay(stream)
    for done in range(0, 60, 10):
        display.show_measured(done, 50)
        now[0] += 6.0
    shown = stream.getvalue().splitlines()
    assert shown == ["measured 20 of 50 held-out examples", "measured 40 of 50 held-out examples"]
    live = LiveDisplay(console_on(terminal))  # type: ignore[arg-type]
    live.plan({"warm-up": 3, "sft": 5}, {"warm-up": 3})
    live.show_measured(30, 50)
    live.live.refresh()
    live.close()
    text = terminal.getvalue()
    assert "held out: 30 of 50 measured" in text and "3/3" in text and "0/5" in text


# Warnings


def test_a_reward_that_cannot_rise_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GSM8K renamed to prompt and answer: no sample is ever the whole solution."""
    rows = [
        {"prompt": f"How many are {i} and {i}?", "answer": f"It is {i}+{i}=<<{2 * i}>>.\n#### {2 * i}"}
        for i in range(9)
    ]
    data = written(tmp_path / "rows.jsonl", rows)
    options = ["--steps", "6", "--warmup-steps", "1", "--batch", "2", "--group", "2", "--out", str(tmp_path / "run")]
    assert main(["train", "grpo", "--data", data, "--reward", "exact", *options]) == 0
    said = capsys.readouterr().err
    assert said.count("warning: all rewards of the first 5 steps are 0, so nothing is learned") == 1
    before, _, _ = said.partition("grpo 1/6")  # it is said before the first step, too
    assert "warning: all samples of 1 held-out problem have reward 0: nothing is learned" in before
    assert "With --reward exact a sample must be the bare answer. --reward number reads the last number" in before


def test_answers_that_no_sample_can_be_are_refused_or_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{i}", "answer": "yes" if i else "no"} for i in range(6)]
    data = written(tmp_path / "rows.jsonl", rows)
    options = ["--steps", "1", "--warmup-steps", "0", "--batch", "2", "--group", "2", "--data", data]
    assert main(["train", "grpo", *options, "--max-tokens", "2", "--out", str(tmp_path / "a")]) == 2
    assert "--max-tokens: expected at least 3, the tokens of the shortest answer, got 2" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert main(["train", "grpo", *options, "--max-tokens", "3", "--out", str(tmp_path / "b")]) == 0
    assert "warning: 5 of 6 answers are longer than --max-tokens 3: reward 0" in capsys.readouterr().err


# lossfns plot, lossfns sample


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a chat."""
    folder = tmp_path_factory.mktemp("chat")
    turns = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}] for i in range(12)]
    data = written(folder / "rows.jsonl", [{"messages": each} for each in turns])
    options = ["--steps", "60", "--batch", "8", "--data", data, "--out", str(folder / "run")]
    assert main(["train", "sft", *options]) == 0
    return folder / "run"


def test_curves_are_shown_and_the_report_is_written_later(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    assert main(["plot", str(run)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"sft loss +5\.\d+  █.*▁  0\.\d+\n", shown) and f"report      {run}/report.html" in shown
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert all(len(line) <= 80 for line in shown.splitlines()[:-1])


def test_a_run_without_whole_metrics_is_plotted_as_far_as_it_goes(tmp_path: Path, run: Path) -> None:
    for name in ("config.json", METRICS):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"phase": "sft", "st')
    assert main(["plot", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a run with metrics, got none"),
        ("{nonsense\n", "metrics.jsonl:1: expected a row of metrics, got a damaged one"),
        ('{"phase": "sft", "step": 1, "loss": "x"}\n', "metrics.jsonl:1: expected a row of metrics"),
        ('{"phase": "sft", "step": 1e400, "seconds": 1}\n', "metrics.jsonl:1: expected a row of metrics"),
        ('{"phase": "sft", "step": 1, "seconds": NaN}\n', "metrics.jsonl:1: expected a row of metrics"),
        ('{"phase": "sft", "step": 1, "loss": 1}\n', "metrics.jsonl:1: expected a row of metrics"),
        (f'{{"phase": "sft", "step": 1, "seconds": 1, "loss": 1{"0" * 400}}}\n', "metrics.jsonl:1: expected a row"),
    ],
)
def test_metrics_that_cannot_be_plotted_are_named(
    text: str, says: str, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    (tmp_path / METRICS).write_text(text)
    assert main(["plot", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


def test_what_does_not_go_into_one_picture_is_refused_with_the_way(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, says in [
        (
            ["kl", "weighings"],
            "expected one of kl, weighings, advantages alone, got kl and weighings. Draw them",
        ),
        (["kl", "grpo"], "got kl and grpo"),
        ([str(run), str(run.parent)], f"got {run} and {run.parent}. lossfns compare {run} {run.parent} shows several"),
        ([str(run), "grpo"], "NAME: expected one run alone, or losses"),
        (
            [str(run), "--out", "a.svg"],
            f"--out: expected losses to draw with it, got a.svg and the run {run}. Leave",
        ),
        ([str(run), "--parts", "policy"], "--parts: expected losses to draw with it"),
        (["grpo", "--parts", "policy"], "--parts: expected no NAME with it, got grpo"),
    ]:
        assert main(["plot", *arguments]) == 2
        assert says in capsys.readouterr().err, arguments


@pytest.mark.parametrize(
    ("name", "part", "value"),
    [
        (RESULT, "seconds", "x"),
        (RESULT, "samples", ["x"]),
        (RESULT, "samples", [{"prompt": 1}]),
        (RESULT, "nll", {}),
        (RESULT, "nll", {"before": "x", "after": 1}),
        ("batch.json", "tokens", 1),
        ("batch.json", "loss", "x"),
        ("batch.json", "sequences", "x"),
        ("batch.json", "step", None),
    ],
)
def test_a_result_or_a_batch_that_was_changed_by_hand_is_left_out(
    name: str, part: str, value: object, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    content = json.loads((folder / name).read_text()) | {part: value}
    if value is None:
        del content[part]
    (folder / name).write_text(json.dumps(content))
    assert main(["plot", str(folder)]) == 0 and main(["compare", str(folder), str(run)]) == 0
    says = "<dd>not ended</dd>" if name == RESULT else "batch.json is damaged"
    assert says in (folder / "report.html").read_text()


def test_a_config_that_was_changed_by_hand_is_refused(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"machine": 5}))
    assert main(["plot", str(folder)]) == 2
    assert "config.json, which is damaged" in capsys.readouterr().err


def test_names_from_files_do_not_control_the_terminal(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(run, tmp_path / "run \x1b[31m")
    with (folder / METRICS).open("a") as file:
        for step in (1, 2, 3):
            row = {"phase": "\x1b[31m", "step": step, "seconds": 1e3, "loss": step}
            file.write(json.dumps(row) + "\n")
    rows = written(tmp_path / "\x1b[31m.jsonl", [{"text": "a"}, {"text": "b"}])
    assert main(["compare", str(folder), str(run)]) == 0 and main(["data", rows]) == 0
    assert main(["data", str(tmp_path / "\x1b[32m")]) == 2
    assert main(["train", "sft", "--data", rows, "--steps", "1", "--out", str(tmp_path / "out")]) == 0
    assert main(["plot", str(folder)]) == 0
    output = capsys.readouterr()
    assert "\\x1b[31m loss" in output.out
    assert "\x1b" not in output.out + output.err


def test_samples_before_and_after_are_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(small(tmp_path, "sft", "--steps", "60")) == 0
    shown = capsys.readouterr().out
    (sample,) = json.loads((tmp_path / "run" / RESULT).read_text())["samples"]
    assert re.fullmatch(r"\d+: 2\+2=", sample["prompt"]) and sample["before"] != sample["after"] == "4"
    assert "  after   4\n" in shown and "  before  " in shown


def test_samples_of_a_policy_run_are_as_long_as_those_that_are_rewarded(tmp_path: Path) -> None:
    """A byte is a token. Before training an end token is rare: of six samples, some have all 70 or 4 bytes."""
    for most in (70, 4):
        run = tmp_path / f"run{most}"
        options = ["--warmup-steps", "0", "--steps", "1", "--batch", "1", "--group", "2", "--max-tokens", str(most)]
        options += ["--reward", "regex:.", "--data", sums(tmp_path, 40), "--out", str(run)]
        assert main(["train", "grpo", *options]) == 0
        samples = json.loads((run / RESULT).read_text())["samples"]
        lengths = [len(each[when]) for each in samples for when in ("before", "after")]
        assert 0.5 * most < max(lengths) <= most


def test_an_empty_sample_is_said_to_be_empty(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    print_samples([{"prompt": "", "before": "", "after": "a"}])
    assert f"  prompt  \n  before  {EMPTY}\n  after   a\n" in capsys.readouterr().out
    assert samples([{"prompt": "", "before": ""}]).count(EMPTY) == 1
    monkeypatch.setattr(Renderer, "decode", lambda *_: "")
    assert main(["sample", str(run), "5?"]) == 0
    assert capsys.readouterr().err == "a sample is empty: the model ended at once\n"


def test_the_end_of_a_long_prompt_and_whole_escapes_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """The question is the end of a chat. An escape is not cut in two, and a Chinese character takes two columns."""
    prompt = f"system\nYou are {'very ' * 30}helpful.\nuser\nWhich is larger?"
    print_samples([{"prompt": prompt, "before": f"{'a' * 65}\x1b\x1b", "after": "日" * 40}])
    _, first, before, after, _ = capsys.readouterr().out.split("\n", 4)
    assert first.startswith("  prompt  …") and first.endswith(r"helpful.\nuser\nWhich is larger?") and len(first) == 78
    assert before == f"  before  {'a' * 65}…" and after == f"  after   {'日' * 33}…"


def test_a_run_generates_from_its_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The prompt is written as a message of the user: the model has learned to answer yes."""
    assert main(["sample", str(run), "5?", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "yes\n"
    assert main(["sample", str(run), "7?", "--samples", "2", "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("sample 1:\n") and "sample 2:\n" in shown
    assert main(["sample", str(run), "7?", "--samples", "2", "--seed", "3"]) == 0
    assert capsys.readouterr().out == shown


def test_lines_that_are_typed_are_answered_turn_by_turn(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The chat goes on: the second prompt holds the first answer. /new begins another chat."""
    prompts: list[str] = []
    original = sample_command.sample_texts

    def recorded(model: sample_command.Model, prompt: list[int], *more: Any) -> list[str]:
        prompts.append(model.renderer.decode(prompt))
        return original(model, prompt, *more)

    monkeypatch.setattr(sample_command, "sample_texts", recorded)
    monkeypatch.setattr(sys, "stdin", io.StringIO("5?\n\n6?\n/new\n7?\n/quit\n8?\n"))
    assert main(["sample", str(run), "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("yes\n") and len(prompts) == 3
    assert prompts[1].startswith("user: 5?\nassistant: yes\nuser: 6?") and prompts[2].startswith("user: 7?")
    monkeypatch.setattr(sys, "stdin", io.StringIO("5?"))
    assert main(["sample", str(run), "--temperature", "0"]) == 0  # the end of the input ends it, too


def test_output_without_unicode_is_escaped(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a model writes may be anything, and the blocks of the curves are no ASCII."""
    for arguments in (["plot", str(run)], ["sample", str(run), "\u00e9", "--temperature", "3"]):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert main(arguments) == 0
        shown = stream.buffer.getvalue()  # type: ignore[attr-defined]
        assert b"\\" in shown and shown.isascii() and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-tokens", "0"], "max_tokens: expected a whole number from 1"),
        (["--samples", "0"], "num_samples: expected a whole number from 1"),
        (["--temperature", "nan"], "temperature"),
        (["--temperature", "-1"], "temperature"),
        (["--seed", str(2**70)], "seed: expected a whole number"),
        (["--device", "nonsense"], "device: expected a device of this machine"),
    ],
)
def test_absurd_samples_are_refused_by_name(
    arguments: list[str], says: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(run), "x", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_what_cannot_be_sampled_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(run), "\udcff"]) == 2
    assert "PROMPT: expected text in UTF-8" in capsys.readouterr().err
    assert main(["sample", str(tmp_path), "x"]) == 2
    assert f"RUN: expected the folder of a run, got {tmp_path}, which has no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    assert main(["sample", str(tmp_path), "x"]) == 2
    assert "RUN: expected a run with a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("rich", [True, False])
def test_escape_sequences_of_a_sample_do_not_reach_the_terminal(
    rich: bool, run: Path, terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr("lossfns.train.sample_command.sample_texts", lambda *_: ["a\x1b[2J\nb"])
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["sample", str(run), "x"]) == 0
    assert terminal.getvalue() == "a\\x1b[2J\nb\n"
