"""``lossfns train`` end to end, small: every method, a user's data, a clean stop, readable refusals."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from lossfns.backend.storage import checkpoint
from lossfns.cli import main, parser
from lossfns.errors import LossInputError
from lossfns.train import methods, models
from lossfns.train.command import given_options
from lossfns.train.defaults import complete_options, loss_of, recorded_options
from lossfns.train.options import Options, to_toml, with_effect

SMALL = ["--steps", "2", "--batch", "4"]
ROWS = {
    "sft": {"prompt": "The sky is", "completion": " blue."},
    "grpo": {"prompt": "2+2=", "answer": "4"},
    "dpo": {"prompt": "Say hello: ", "chosen": "hello", "rejected": "goodbye"},
}

METHODS = ("sft", "grpo", "dapo", "gspo-token", "dpo", "orpo")


def jsonl(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def variants(method: str, count: int) -> list[object]:
    """Repeat the row under different prompts."""
    return [ROWS[method] | {"prompt": f"{i} {ROWS[method]['prompt']}"} for i in range(count)]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_whole_run_folder(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lossfns.train.tasks.MAX_HELD_OUT", 8)
    warm_up = [] if method == "sft" else ["--warmup-steps", "1"]
    assert main(["train", method, "--out", str(tmp_path), *SMALL, *warm_up]) == 0
    shown = capsys.readouterr()
    assert "before" in shown.out and "after" in shown.out and f"{method} on" in shown.err
    assert {p.name for p in tmp_path.iterdir()} == {
        *("config.json", "config.toml", "metrics.jsonl", "evaluations.jsonl"),
        *("batch.json", "result.json", "checkpoint.safetensors", "report.html"),
        *(["reference.safetensors"] if method in ("grpo", "dpo") else []),
    }
    assert json.loads((tmp_path / "batch.json").read_text())["sequences"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["phase"] != "warm-up"]
    assert steps == [1, 2] and all("loss" in row and "grad_norm" in row for row in rows)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["options"]["steps"] == 2 and config["loss"] == repr(loss_of(method, {}))
    assert json.loads((tmp_path / "result.json").read_text())["stopped_early"] is False
    assert checkpoint.load(tmp_path / "checkpoint.safetensors")[1]["steps"] >= 2


@pytest.mark.parametrize("method", ["sft", pytest.param("grpo", marks=pytest.mark.exhaustive), "dpo"])
def test_ones_own_rows_are_learned(method: str, tmp_path: Path) -> None:
    """Thirty rows with one answer: held-out rows are like the training rows, so the result must improve at once."""
    data = jsonl(tmp_path / "rows.jsonl", variants(method, 30))
    warm_up = {"sft": [], "grpo": ["--warmup-steps", "12"], "dpo": ["--warmup-steps", "0"]}[method]
    steps = ["--steps", "12", "--batch", "8", "--lr", "0.003", *warm_up]
    assert main(["train", method, "--data", data, "--out", str(tmp_path / "run"), *steps]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    [(name, measured)] = [(k, v) for k, v in result.items() if isinstance(v, dict)]
    better = (
        measured["before"] - measured["after"] if name == "bits_per_byte" else measured["after"] - measured["before"]
    )
    assert better > 0.2


def test_a_run_is_repeatable_and_starts_from_a_checkpoint(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "rows.jsonl", variants("sft", 4))
    command = ["train", "sft", "--data", data, "--steps", "3", "--batch", "4"]

    def losses(name: str, *more: str) -> list[float]:
        assert main([*command, "--out", str(tmp_path / name), *more]) == 0
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    first = losses("a")
    assert losses("b") == first
    assert losses("c", "--seed", "1") != first
    init = ["--init", str(tmp_path / "a" / "checkpoint.safetensors")]
    started = losses("d", *init)
    assert started[0] < first[-1]
    assert losses("e", *init, "--lora", "2")[0] == pytest.approx(started[0], rel=1e-5)  # new adapters on its weights


@pytest.mark.parametrize(
    ("method", "text", "message"),
    [
        ("sft", "", "at least 2 rows, got 0"),
        ("sft", '{"prompt": "a", "completion": "b"}\n', "at least 2 rows, got 1"),
        ("sft", '{"prompt": "a", "completion": "b"}\n' * 3, "at least 2 different rows, got 1"),
        ("sft", '{"prompt": "a", "completion": "b"}\n{nonsense\n', "rows.jsonl:2: expected a JSON object"),
        ("sft", '{"prompt": "a"}\n', "rows.jsonl:1: expected text under 'completion', got nothing"),
        ("grpo", '{"prompt": "a", "answer": true}\n', "expected text under 'answer', got True"),
        ("dpo", '{"prompt": "a", "chosen": "b", "rejected": ""}\n', "expected text under 'rejected', got ''"),
        ("orpo", "[1, 2]\n", "expected text under 'prompt', got nothing"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_their_line(
    method: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert main(["train", method, "--data", str(path), "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_and_a_foreign_checkpoint_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "sft", "--data", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "run")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    (tmp_path / "x.safetensors").write_text("hello")
    assert main(["train", "sft", "--init", str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "run")]) == 2
    assert "x.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        *(["train"], ["train", "ppo2"], ["train", "sft", "--steps", "0"], ["train", "sft", "--lr", "nan"]),
        *(["train", "sft", "--group", "4"], ["train", "dpo", "--max-tokens", "3"], ["train", "sft", "--seed", "-1"]),
        *(["train", "--resume", "x", "--steps", "2"], ["train", "sft", "--resume", "x"], ["train", "--resume"]),
        *(
            ["train", "--resume", "x", "--seed", "0"],
            ["train", "--resume", "x", "--out", "x"],
            ["train", "--steps", "2"],
        ),
        ["train", "sft", "--save-every", "0"],
    ],
)
def test_a_command_that_makes_no_sense_is_refused_in_two_lines(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    error, see = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and error.startswith("lossfns train: ") and see == "See lossfns train --help."


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "lossfns: argument COMMAND: invalid choice: 'trian'"),
        (["trian"], ". Did you mean train?\n"),
        (["train", "sft", "--stepps=3"], "lossfns train: unrecognized arguments: --stepps=3. Did you mean --steps?\n"),
        (["list", "x"], "lossfns list: unrecognized arguments: x\nSee lossfns list --help.\n"),
        (["vectors", "run"], "lossfns vectors run: the following arguments are required: --cmd\n"),
        (["train", "sft", "--zzz", "\x1b"], "unrecognized arguments: --zzz \\x1b\n"),
    ],
)
def test_a_usage_error_of_every_command_is_short_and_names_the_nearest_word(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    shown = capsys.readouterr().err
    assert exit_.value.code == 2 and says in shown and len(shown.splitlines()) == 2


def test_without_a_command_all_commands_are_shown_in_a_line_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = lines[lines.index("commands:") + 1 : lines.index("first commands:") - 1]
    known = "list describe check explain vectors conformance data train plot compare sample export serve"
    assert [line.split()[0] for line in commands] == known.split()
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [[], ["list"], ["describe", "grpo"], ["explain", "poison"], ["data", "rows"]])
def test_output_that_cannot_be_written_is_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = jsonl(tmp_path / "rows.jsonl", variants("sft", 3))
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([rows if each == "rows" else each for each in arguments]) == 1
    assert capsys.readouterr().err == "lossfns: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("arguments", [[], ["list"], ["describe", "grpo"], ["explain", "poison"], ["data", "rows"]])
def test_a_closed_pipe_ends_the_output_quietly(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first line fails already: each one is written at once."""
    rows = jsonl(tmp_path / "rows.jsonl", variants("sft", 3))
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main([rows if each == "rows" else each for each in arguments]) == 0
    assert capsys.readouterr().err == ""


def test_other_line_separators_and_a_byte_order_mark_are_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"a\u2028{i}", "completion": "b\x85c"} for i in range(3)]
    path.write_text("\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert main(["train", "sft", "--data", str(path), "--steps", "1", "--out", str(tmp_path / "run")]) == 0


def test_another_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = jsonl(tmp_path / "rows.jsonl", variants("sft", 4))
    command = ["train", "sft", "--data", data, "--steps", "2", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert main(command) == 2 and "nothing is overwritten" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert main([*command[:-1], data]) == 2 and "is a file" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "sft", "--device", "nonsense", "--out", str(tmp_path / "run")]) == 2
    assert "device: expected a device of this machine, got 'nonsense'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_ctrl_c_ends_a_run_with_everything_saved(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "rows.jsonl", variants("sft", 8))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "lossfns", "train", "sft", "--data", data, "--steps", "100000", "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out / "metrics.jsonl").exists():
        time.sleep(0.05)
    while time.monotonic() < deadline and len((out / "metrics.jsonl").read_text().splitlines()) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopping after this step" in errors and "Traceback" not in errors
    assert "stopped early" in shown and "held-out bits per byte" in shown
    rows = (out / "metrics.jsonl").read_text().splitlines()
    assert checkpoint.load(out / "checkpoint.safetensors")[1]["steps"] == len(rows) == json.loads(rows[-1])["step"]
    assert json.loads((out / "result.json").read_text())["stopped_early"] is True


# --resume


def unfinished(tmp_path: Path, *more: str, method: str = "sft") -> Path:
    """The folder of a run that was killed before its first checkpoint."""
    data = jsonl(tmp_path / "rows.jsonl", variants(method, 6))
    folder = tmp_path / "run"
    assert main(["train", method, "--data", data, "--out", str(folder), "--batch", "2", "--steps", "3", *more]) == 0
    for name in ("result.json", "checkpoint.safetensors"):
        (folder / name).unlink()
    return folder


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def refused(folder: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Require this message, and a folder that has not changed."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}
    capsys.readouterr()
    assert main(["train", "--resume", str(folder)]) == 2
    assert message in capsys.readouterr().err
    assert before == ({path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {})


@pytest.mark.parametrize("more", [[], ["--lr", "0.00123", "--seed", "3", "--save-every", "1"]])
def test_a_run_without_a_checkpoint_begins_again_with_the_same_options(
    tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unfinished(tmp_path, *more)
    config, rows = (folder / "config.json").read_bytes(), losses(folder)
    assert main(["train", "--resume", str(folder)]) == 0
    assert losses(folder) == rows and (folder / "config.json").read_bytes() == config
    assert "resumed after" not in capsys.readouterr().err


def written(path: Path) -> tuple[bytes, int]:
    """The content of a file, and the time when it was written."""
    return path.read_bytes(), path.stat().st_mtime_ns


def test_a_run_killed_before_its_result_only_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = unfinished(tmp_path)
    assert main(["train", "--resume", str(folder)]) == 0
    first, saved = json.loads((folder / "result.json").read_text()), written(folder / "checkpoint.safetensors")
    (folder / "result.json").unlink()
    assert main(["train", "--resume", str(folder)]) == 0
    assert "resumed after 3 steps" in capsys.readouterr().err
    assert json.loads((folder / "result.json").read_text())["bits_per_byte"] == first["bits_per_byte"]
    assert written(folder / "checkpoint.safetensors") == saved
    (folder / "checkpoint.safetensors").rename(folder / "checkpoint.npz")  # its name until 2026-11
    (folder / "result.json").unlink()
    assert main(["train", "--resume", str(folder)]) == 0
    assert "resumed after 3 steps" in capsys.readouterr().err


@pytest.mark.skipif(resource is None, reason="needs limits of a process")
def test_a_run_that_finds_no_room_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file may be larger than 100 kB: the checkpoint does not fit. The run goes on where there is room."""
    monkeypatch.setattr("lossfns.train.measures.SAMPLE_TOKENS", 1)
    data, folder = jsonl(tmp_path / "rows.jsonl", variants("sft", 4)), tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert main(["train", "sft", "--data", data, "--steps", "1", "--batch", "2", "--out", str(folder)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "File too large" in error and error.endswith(f"continue with lossfns train --resume {folder}.")
    assert main(["train", "--resume", str(folder)]) == 0
    assert (folder / "checkpoint.safetensors").exists()


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = unfinished(tmp_path)
    assert main(["train", "--resume", str(folder)]) == 0
    before = {path.name: written(path) for path in folder.iterdir()}
    assert main(["train", "--resume", str(folder)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert {path.name: written(path) for path in folder.iterdir()} == before


def test_a_run_goes_on_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(Path("rows.jsonl"), variants("sft", 6))
    assert main(["train", "sft", "--data", "rows.jsonl", "--out", "run", "--batch", "2", "--steps", "3"]) == 0
    rows = losses(Path("run"))
    for name in ("result.json", "checkpoint.safetensors"):
        Path("run", name).unlink()
    monkeypatch.chdir("/")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert losses(tmp_path / "run") == rows


def test_what_is_no_run_cannot_be_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(tmp_path / "none", "none, which is no folder", capsys)
    (tmp_path / "file").write_text("hello")
    refused(tmp_path / "file", "file, which is no folder", capsys)
    folder = tmp_path / "run"
    folder.mkdir()
    refused(folder, "run, which has no config.json", capsys)
    for text in ("", "{nonsense", "[1, 2]", "3", "{}", '{"options": 3}', "\udcff"):
        (folder / "config.json").write_text(text, errors="surrogateescape")
        refused(folder, "config.json, which is damaged or of another version", capsys)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ('"steps": -3', "--steps: expected a whole number of at least 1, got -3"),
        ('"steps": "many"', "--steps: expected a whole number of at least 1, got 'many'"),
        ('"steps": true', "--steps: expected a whole number of at least 1, got True"),
        ('"lr": "fast", "steps": 3', "--lr: expected a finite number above 0, got 'fast'"),
        ('"group": 4, "steps": 3', "--group: expected a loss that has it (policy losses), got cross_entropy"),
        ('"stops": 3', "got 'stops'"),
        ('"out": 3, "steps": 3', "--out: expected text, got 3"),
        ('"loss": "ppo2", "steps": 3', "--loss: expected the name of a loss, or module:function, got 'ppo2'"),
        ('"set": {"clip": [0.2, 0.3]}, "loss": "ppo", "steps": 3', "ppo: clip: expected ratio bounds"),
    ],
)
def test_options_that_someone_has_put_into_a_config_are_checked(
    tmp_path: Path, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    options: dict[str, Any] = {"loss": "sft", "steps": 3, "lr": 0.003, "group": None}
    written = json.loads("{" + new + "}")
    config = {"options": {k: v for k, v in options.items() if k != "steps"} | written}
    (folder / "config.json").write_text(json.dumps(config | {"model": {}, "sha256": {}, "versions": {}}))
    refused(folder, message, capsys)


def test_a_config_that_does_not_name_an_option_takes_its_default() -> None:
    """A run of an earlier version, which had fewer options, and ``null`` for those that its method did not have."""
    options = complete_options({"loss": "dpo", "batch": 3, "group": None, "out": None})
    assert (options.batch, options.steps, options.warmup_steps, options.save_every) == (3, 400, 300, 20)
    recorded = recorded_options(options, loss_of("dpo", {}))
    assert complete_options(recorded) == options and recorded["group"] is None


def test_only_options_with_an_effect_are_written() -> None:
    """What is left out has its default: reading the file gives the same options. Other losses lack other options."""
    for given, left_out in [
        ({"loss": "sft"}, {"group", "updates", "lora", "lora_parts", "eval_every", "candidates", "advantage_scale"}),
        ({"loss": "grpo", "lora": 4, "model": "smollm2"}, {"eval_every", "candidates", "drop_longer", "teacher"}),
        ({"loss": "sppo", "eval_every": 3}, {"advantage_scale", "lora", "gradient_checkpointing"}),
    ]:
        options = complete_options(given)
        written = tomllib.loads(to_toml(with_effect(recorded_options(options, loss_of(options.loss, {})))))
        assert complete_options(written) == options
        assert written.keys() >= {"loss", "steps", "batch", "lr", "seed"} and not written.keys() & left_out
    assert {"lora_parts", "group", "warmup_steps", "advantage_scale"} <= with_effect(
        recorded_options(complete_options({"loss": "grpo", "lora": 4, "model": "smollm2"}), loss_of("grpo", {}))
    ).keys()
    with pytest.raises(LossInputError, match=r"--advantage-scale: expected a loss that reads advantages, got sppo"):
        complete_options({"loss": "sppo", "advantage_scale": "none"})


def test_a_run_goes_on_only_with_the_data_it_began_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = unfinished(tmp_path)
    rows = tmp_path / "rows.jsonl"
    text = rows.read_text()
    rows.write_text(text.replace("blue", "grey"))
    refused(folder, f"--data: expected the file that {folder} began with, got {rows}, which has changed since", capsys)
    rows.unlink()
    refused(folder, "rows.jsonl", capsys)
    rows.write_text(text)
    assert main(["train", "--resume", str(folder)]) == 0


@pytest.mark.exhaustive
def test_a_run_needs_its_first_weights_until_it_has_some_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (first := tmp_path / "first").mkdir()
    init = unfinished(first)
    assert main(["train", "--resume", str(init)]) == 0
    folder = unfinished(tmp_path, "--init", str(init / "checkpoint.safetensors"))
    rows, weights = losses(folder), (init / "checkpoint.safetensors").read_bytes()
    (init / "checkpoint.safetensors").unlink()
    refused(folder, "checkpoint.safetensors", capsys)
    other = first / "other"
    assert main(["train", "sft", "--steps", "1", "--batch", "1", "--seed", "5", "--out", str(other)]) == 0
    (init / "checkpoint.safetensors").write_bytes((other / "checkpoint.safetensors").read_bytes())
    refused(folder, "which has changed since", capsys)
    (init / "checkpoint.safetensors").write_bytes(weights)
    assert main(["train", "--resume", str(folder)]) == 0 and losses(folder) == rows
    (init / "checkpoint.safetensors").unlink()
    (folder / "result.json").unlink()
    assert main(["train", "--resume", str(folder)]) == 0 and losses(folder) == rows


def test_a_run_of_another_version_goes_on_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = unfinished(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["versions"]["torch"] = "1.0"
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["train", "--resume", str(folder)]) == 0
    said = capsys.readouterr().err
    assert "began with torch 1.0, now 2" in said and "the run may not continue bit for bit" in said


@pytest.mark.parametrize("damage", ["truncated", "foreign", "of something else"])
def test_a_checkpoint_that_is_not_the_runs_own_is_named(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unfinished(tmp_path)
    assert main(["train", "--resume", str(folder)]) == 0
    (folder / "result.json").unlink()
    path = folder / "checkpoint.safetensors"
    tensors, data = checkpoint.load(path)
    if damage == "of something else":
        checkpoint.save(path, tensors, data | {"user_metadata": {}})
    else:
        path.write_bytes(path.read_bytes()[:-1000] if damage == "truncated" else b"hello")
    refused(folder, "checkpoint.safetensors", capsys)


def test_a_folder_that_holds_part_of_a_run_is_not_taken_for_a_new_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unfinished(tmp_path)
    (folder / "config.json").unlink()
    assert main(["train", "sft", "--steps", "1", "--batch", "1", "--out", str(folder)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


# --config, --loss, --eval-every, --teacher


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows]


def test_the_config_of_a_run_repeats_it_and_options_of_the_command_line_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(Path("rows.jsonl"), variants("sft", 6))
    command = ["train", "--loss", "sft", "--set", "weigh=sequence_mean", "--data", "rows.jsonl", "--steps", "5"]
    assert main([*command, "--batch", "2", "--eval-every", "2", "--out", "a"]) == 0
    evaluations = [json.loads(line) for line in Path("a/evaluations.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["step"]) for row in evaluations] == [("sft", 0), ("sft", 2), ("sft", 4), ("sft", 5)]
    bits = [row["bits_per_byte"] for row in evaluations]
    assert bits == sorted(bits, reverse=True) and bits[-1] < bits[0] - 0.5
    config = str(tmp_path / "a" / "config.toml")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir("other")
    assert main(["train", "--config", config, "--out", str(tmp_path / "b")]) == 0
    assert rows_of(tmp_path / "b") == rows_of(tmp_path / "a")
    assert (tmp_path / "b" / "config.toml").read_text() == Path(config).read_text()
    assert main(["train", "focal", "--config", config, "--set", "gamma=1", "--out", str(tmp_path / "c")]) == 0
    assert json.loads((tmp_path / "c" / "config.json").read_text())["loss"] == "focal(gamma=1, weigh=sequence_mean)"
    for text, says in [
        ('loss = "sft"\nstepps = 3', "got 'stepps'. Did you mean 'steps'?"),
        ('loss = "sft"\nsteps = "3"', "--steps: expected a whole number of at least 1, got '3'"),
        ("loss = ", "--config: expected a TOML file of options"),
        ('loss = "sft"\nset = 3', "--set: expected settings by name, got 3"),
    ]:
        Path("x.toml").write_text(text)
        with pytest.raises(SystemExit):
            main(["train", "--config", "x.toml", "--out", str(tmp_path / "d")])
        assert says in capsys.readouterr().err, text


def test_a_name_is_a_loss_with_or_without_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    given = [given_options(parser().parse_args(["train", *each])) for each in (["grpo"], ["--loss", "grpo"])]
    assert given[0] == given[1] == {"loss": "grpo"}
    with pytest.raises(SystemExit):
        main(["train", "grpo", "--loss", "dapo"])
    assert "--loss: expected one loss, got grpo and dapo" in capsys.readouterr().err


def test_a_student_comes_closer_to_its_teacher(tmp_path: Path) -> None:
    """The teacher is the checkpoint of a run; the student starts as it did."""
    data = jsonl(tmp_path / "rows.jsonl", variants("sft", 8))
    sizes = ["--data", data, "--steps", "12", "--batch", "4"]
    assert main(["train", "sft", *sizes, "--out", str(tmp_path / "teacher")]) == 0
    teacher = ["--teacher", str(tmp_path / "teacher" / "checkpoint.safetensors"), "--candidates", "8"]
    assert main(["train", "top_k_forward_kl", *sizes, *teacher, "--out", str(tmp_path / "run")]) == 0
    measured = json.loads((tmp_path / "run" / "result.json").read_text())["kl_teacher"]
    assert 0 < measured["after"] < measured["before"] / 2


def test_adapters_start_at_the_reference_and_are_resumed_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is the model with its adapters off: the loss of dpo starts at ln 2. The third step fails once."""
    data = jsonl(tmp_path / "rows.jsonl", variants("dpo", 6))
    model = tmp_path / "model"
    models.load_client(Options(loss="dpo", steps=1, batch=1, lr=1)).export(model).result()
    sizes = ["--data", data, "--model", str(model), "--lora", "2", "--steps", "4", "--batch", "2", "--lr", "0.01"]
    command = ["train", "dpo", *sizes, "--save-every", "1"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    whole = rows_of(tmp_path / "whole")
    assert whole[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and whole[1]["loss"] != whole[0]["loss"]
    assert not (tmp_path / "whole" / "reference.safetensors").exists()
    original, steps = methods.train_step, []

    def failing(*given: Any) -> dict[str, float]:
        steps.append(1)
        if len(steps) == 3:
            raise LossInputError("step", "a step", "none", "Again.")
        return original(*given)

    monkeypatch.setattr(methods, "train_step", failing)
    assert main([*command, "--out", str(tmp_path / "broken")]) == 2 and len(rows_of(tmp_path / "broken")) == 2
    assert main(["train", "--resume", str(tmp_path / "broken")]) == 0
    assert rows_of(tmp_path / "broken") == whole
