"""``lossfns check`` on subjects that do what no loss should: the verdict and the exit status stay the kit's."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lossfns.cli import main
from lossfns.testing.check import Trial

NLL = """
    total = count = 0.0
    for datum, lp in zip(data, logprobs_list):
        w = datum.loss_fn_inputs["weights"].to_torch()
        assert w.shape == lp.shape
        total = total - (w * torch.where(w != 0, lp, 0)).sum()
        count = count + w.sum()
    return total / count, {}
"""


def write_loss(folder: Path, in_call: str = "", at_import: str = "", name: str = "mine.py") -> str:
    """Write a file with a correct loss that also does something else, at import or in each call. Return the subject."""
    call = textwrap.indent(textwrap.dedent(in_call).strip(), "    ")
    text = (
        f"import os, sys, torch\ncalls = []\n{textwrap.dedent(at_import)}\ndef nll(data, logprobs_list):\n{call}{NLL}"
    )
    (folder / name).write_text(text)
    return f"{folder / name}:nll"


LATER = "calls.append(1)\nif len(calls) > 135:\n    "
"""A condition that holds in a law, after the calls that find out the kind and after the first laws."""


def run(capfd: pytest.CaptureFixture[str], subject: str, *args: str) -> tuple[int, str, str]:
    status = main(["check", subject, "--examples", "0", *args])
    return status, *capfd.readouterr()


IN_A_CALL = {
    "sys.exit": ("sys.exit(0)", "SystemExit: 0"),
    "os._exit": ("os._exit(0)", "exit status 0"),
    "abort": ("os.abort()", "SIGABRT"),
    "segmentation fault": ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    "killed, as by lack of memory": ("os.kill(os.getpid(), 9)", "SIGKILL"),
    "its group killed": ("os.killpg(0, 9)", "SIGKILL"),
    "SystemExit": ("raise SystemExit('bye')", "SystemExit: bye"),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "GeneratorExit": ("raise GeneratorExit", "GeneratorExit"),
    "BaseException": ("class Own(BaseException): pass\n    raise Own('x')", "Own: x"),
    "a message that cannot be read": ("class Own(Exception):\n        __str__ = None\n    raise Own", "Own"),
    "too deep a recursion": ("f = lambda: f()\n    f()", "RecursionError"),
    "more memory than there is": ("bytearray(10**15)", "MemoryError"),
    "its own interrupt": ("import _thread, time; _thread.interrupt_main(); time.sleep(1)", "KeyboardInterrupt"),
    "SIGTERM": ("import signal; os.kill(os.getpid(), signal.SIGTERM)", "SIGTERM"),
    "escapes and half a surrogate pair": (
        "raise ValueError('\\x1b[31m\\ud800\\x00')",
        r"ValueError: \x1b[31m\ud800\x00",
    ),
}


@pytest.mark.parametrize("what", IN_A_CALL)
@pytest.mark.parametrize("first", [True, False], ids=["at the first call", "later"])
def test_a_subject_that_ends_the_process_in_a_call_is_wrong(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, what: str, first: bool
) -> None:
    """The law and the way are named, what was found before is shown, and the report is sound JSON."""
    code, words = IN_A_CALL[what]
    subject = write_loss(tmp_path, ("if True:\n    " if first else LATER) + code)
    status, out, err = run(capfd, subject, "--json", "-", "--junit", str(tmp_path / "x.xml"))
    report = json.loads(out)
    assert status == 1 and not report["ok"] and "Traceback" not in err, err
    wrong = [v for v in report["verdicts"] if v["verdict"] == "wrong"]
    assert {v["bug"] for v in wrong} == {"not-the-contract"} and words in wrong[0]["seen"], wrong[0]
    assert first == (report["verdicts"][0] == wrong[0])

    ElementTree.parse(tmp_path / "x.xml")


def test_an_error_of_the_kit_accuses_no_subject(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = sys.modules["lossfns.testing.check"]
    monkeypatch.setattr(kit, "law_trials", lambda *_: [Trial("contract", "It.", lambda: 1 / 0)])
    status, out, err = run(capfd, write_loss(tmp_path))
    assert (status, out) == (2, "") and "an error of lossfns itself, in the law contract: ZeroDivisionError" in err


AT_IMPORT = {
    "sys.exit": ("sys.exit(0)", "SystemExit: 0"),
    "os._exit": ("os._exit(1)", "exit status 1"),
    "abort": ("os.abort()", "SIGABRT"),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "reads stdin": ("input()", "EOFError"),
    "an error": ("1 / 0", "ZeroDivisionError"),
}


@pytest.mark.parametrize("what", AT_IMPORT)
def test_a_subject_that_ends_the_process_at_import_cannot_be_tested(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, what: str
) -> None:
    code, words = AT_IMPORT[what]
    status, out, err = run(capfd, write_loss(tmp_path, at_import=code))
    assert status == 2 and out == "" and words in err and err.startswith("lossfns: ") and "Traceback" not in err, err


NUISANCES = {
    "prints": "print('NOISE'); os.write(1, b'NOISE\\n'); os.write(2, b'NOISE\\n'); print('NOISE', file=sys.stderr)",
    "prints in C": "import ctypes; libc = ctypes.CDLL(None); libc.puts(b'NOISE'); libc.fflush(None)",
    "closes its streams": "sys.stdout.close(); sys.stderr.close(); os.close(0)",
    "closes descriptors": "os.close(1); os.close(2)",
    "starts threads": "import threading, time; threading.Thread(target=time.sleep, args=(1000,)).start()",
    "starts a process": "import subprocess; subprocess.Popen(['sleep', '1000'])",
    "forks": "os.fork() or __import__('time').sleep(1000)",
    "forks and goes on": "os.fork()",
    "changes the folder": "os.chdir('/')",
    "registers an exit": "import atexit; atexit.register(print, 'NOISE'); atexit.register(os._exit, 7)",
    "warns": "import warnings; warnings.warn('NOISE'); warnings.simplefilter('error')",
    "traces": "sys.settrace(lambda *_: None)",
}


@pytest.mark.parametrize("what", NUISANCES)
def test_whatever_else_a_subject_does_its_report_is_clean(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, what: str
) -> None:
    status, out, err = run(capfd, write_loss(tmp_path, at_import=NUISANCES[what]), "--json", "-")
    assert status == 0 and json.loads(out)["ok"] and "NOISE" not in out, err


def test_files_are_written_where_the_command_stands(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the subject changes the folder. And nothing else is left there, such as ``.hypothesis``."""
    monkeypatch.chdir(tmp_path)
    subject = write_loss(tmp_path, at_import="os.chdir('/')")
    assert main(["check", subject, "--json", "x.json", "--examples", "1"]) == 0
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"mine.py", "x.json"}


def processes_of(group_marker: str) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if group_marker in line and "ps -eo" not in line]


def test_no_process_of_a_subject_is_left(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    marker = f"sleep 98765{os.getpid()}"
    subject = write_loss(tmp_path, at_import=f"import subprocess; subprocess.Popen({marker.split()})")
    assert run(capfd, subject)[0] == 0
    assert processes_of(marker) == []


@pytest.mark.parametrize(
    "code",
    [
        "import time\n    while True: time.sleep(0.01)",
        "import signal; os.kill(os.getpid(), signal.SIGSTOP)",
        "import signal, time; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)); time.sleep(1000)",
        "import time; os.closerange(3, 256); time.sleep(1000)",
    ],
    ids=["loops", "stops", "blocks signals", "closes every descriptor and sleeps"],
)
def test_a_timeout_names_the_law(capfd: pytest.CaptureFixture[str], tmp_path: Path, code: str) -> None:
    """Status 2, since nothing wrong was found; the laws before it are in the table."""
    found, out, err = run(capfd, write_loss(tmp_path, LATER + code), "--timeout", "2")
    assert found == 2 and "time was up after 2 s in the law " in out and "ok       contract" in out, out + err


AFTER_PARALLEL_WORK = """
import sys
import torch
from lossfns.cli import main

torch.set_num_threads(2)
torch.ones(1000, 1000).exp()
sys.exit(main(["check", "lossfns:cross_entropy", "--examples", "0", "--timeout", "30"]))
"""


def test_a_check_does_not_wait_for_the_threads_of_its_caller() -> None:
    """A fork copies the calling thread alone: parallel work in the child would wait for the others until time is up."""
    ran = subprocess.run([sys.executable, "-c", AFTER_PARALLEL_WORK], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and "time was up" not in ran.stdout, ran.stdout


def test_a_timeout_after_something_wrong_exits_with_1(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = f"import time\n{LATER}time.sleep(1000)\nlogprobs_list = [len(calls) * lp for lp in logprobs_list]"
    found, out, _ = run(capfd, write_loss(tmp_path, code), "--timeout", "2")
    assert found == 1 and "time was up after 2 s in the law " in out and "WRONG    repeatable" in out, out


def test_a_timeout_at_import_says_so(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found, out, err = run(capfd, write_loss(tmp_path, at_import="while True: pass"), "--timeout", "0.5")
    assert (found, out) == (2, "") and "0.5 s passed while it was" in err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_timeout_that_is_none_is_refused(capfd: pytest.CaptureFixture[str], seconds: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["check", "lossfns:ppo", "--timeout", seconds])
    assert caught.value.code == 2 and "--timeout" in capfd.readouterr().err


def started(subject: str, *args: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "lossfns", "check", subject, "--examples", "0", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_ends_the_subject_too_and_quietly(tmp_path: Path, number: int) -> None:
    there = tmp_path / "there"
    marker = f"sleep 87654{os.getpid()}"
    code = f"import subprocess; subprocess.Popen({marker.split()}); open({str(there)!r}, 'w').close()\nwhile True: pass"
    running = started(write_loss(tmp_path, at_import=code))
    until = time.monotonic() + 60
    while not there.exists() and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out, err) == (130 if number == signal.SIGINT else 143, "", "")
    assert processes_of(marker) == []


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m lossfns check lossfns:cross_entropy --examples 0 | head -0; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr) == ("0\n", "")
