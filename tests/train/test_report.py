"""``report.html``, ``lossfns compare`` and the trackers."""

import io
import json
import math
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lossfns import LossInputError, cross_entropy, datum_from_tokens, dpo, grpo
from lossfns.backend import ByteTokenizer, Decoder, LocalTrainingClient
from lossfns.cli import main
from lossfns.train import batch, charts
from lossfns.train.record import read_record
from lossfns.train.report import report
from lossfns.train.run import Run, Trained
from lossfns.train.trackers import Tracker, names_of, tensorboard

HOSTILE = "</pre><script>alert(1)</script><img src=http://example.org/x.png onerror=a> & \x1b[2J\0"


def folder_of(path: Path, *, steps: int = 30, lr: float = 0.001, text: str = "4", **result: Any) -> Path:
    """Make the folder of a run by hand: two phases, a reward that rises from 0, and evaluations every tenth step."""
    path.mkdir()
    options = {"loss": "grpo", "steps": steps, "lr": lr, "data": f"{text}.jsonl", "out": str(path)}
    model = {"model_name": "Decoder", "parameters": 820480, "device": "cpu", "dtype": "torch.float32", "text": text}
    config = {"id": "0" * 32, "options": options, "model": model, "sha256": {}, "versions": {"lossfns": "0.1.0"}}
    (path / "config.json").write_text(json.dumps(config | {"loss": f"grpo({text})"}))
    rows = [{"phase": "warm-up", "step": i + 1, "seconds": i, "loss": 5 / (i + 1)} for i in range(9)]
    rows += [{"phase": "grpo", "step": i + 1, "seconds": 9 + i, "reward": i / steps, "tokens": 4} for i in range(steps)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [{"phase": "grpo", "step": i, "seconds": 9 + i, "reward": i / 50 - lr} for i in range(0, steps + 1, 10)]
    (path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    samples = [{"prompt": text, "before": text, "after": text}]
    (path / "result.json").write_text(json.dumps({"stopped_early": False, "samples": samples, **result}))
    row = {"datum": 0, "side": "", "share": 1.0, "before": 3, "after": 2, "prompt": text, "tokens": [text, "b", "\n"]}
    row |= {"active": [0, 1, 1], "gradient": [0, -0.5, "nan"], "logprob": [-1, -1, -1], "coefficient": [0, 0.5, 0.5]}
    tables = {"tokens": [["tokens", "3", ""], [text, "1", "33%"]], "columns": [["without", "a", "b"]]}
    look = {"phase": "grpo", "step": 30, "loss": 0.5, "l1": 0.5, "cancellation": 0.0, **tables, "sequences": [row]}
    (path / "batch.json").write_text(json.dumps(look))
    return path


class Reader(HTMLParser):
    """Reads a page: its tags must be closed in order, and it may load nothing."""

    VOID = ("meta", "link", "br", "img", "line", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.said = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open += [] if tag in self.VOID else [tag]
        for name, value in attrs:
            assert name not in ("src", "srcset", "onload", "onerror") and not (name == "href" and value != "data:,")

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open and "script" not in reader.tags and "img" not in reader.tags
    assert "url(" not in page and "@import" not in page
    return reader


def test_a_report_is_one_page_that_loads_nothing_and_shows_texts_as_they_are(tmp_path: Path) -> None:
    page = report(read_record(folder_of(tmp_path / "run", text=HOSTILE)))
    reader = read(page)
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\0", "\\x00")
    assert reader.said.count(shown) >= 6  # title, prompt, before, after, a token, its first token, a table
    assert "\x1b" not in page and "\0" not in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_a_report_has_the_held_out_measure_first_and_the_command_that_repeats_the_run(tmp_path: Path) -> None:
    """30 steps: held-out rewards 0, 0.2, 0.4, 0.6, each less lr = 0.001."""
    folder = folder_of(tmp_path / "run")
    reader = read(report(read_record(folder)))
    titles = ["held-out reward", "-0.001 → 0.599", "warm-up: loss"]
    assert sorted(titles, key=reader.said.index) == titles
    assert "+0.600" in reader.said and "0.599 after 30 steps" in reader.said
    assert f"lossfns train --config {folder}/config.toml" in reader.said and "lr = 0.001" in reader.said
    assert (
        "coefficient of a token 0.5" in reader.said and "… 3 tokens" in reader.said and "2 tokens more" in reader.said
    )
    assert reader.tags.count("circle") == 4 and "finished" in reader.said and "120" in reader.said  # tokens: 30 · 4


def test_the_look_at_a_batch_explains_its_numbers(tmp_path: Path) -> None:
    page = report(read_record(folder_of(tmp_path / "run")))
    look = page[page.index("What the loss does to a batch") : page.index("Options")]
    assert '<th>without</th><th class="n">g changes by</th>' not in look  # the loss of this run reads no column
    path = tmp_path / "run" / "batch.json"
    rows = [["without", "Σ|g - g'|", "of Σ|g|"], ["advantages", "0.5", "100%"]]  # as it was written until 2026-11
    path.write_text(json.dumps(json.loads(path.read_text()) | {"columns": rows}))
    page = report(read_record(tmp_path / "run"))
    for text in ("g changes by", "advantages of 0", "Opposite signs cancel in the sum", "1/N in a mean over N tokens"):
        assert text in page, text
    assert "Σ|g - g" not in page


def test_a_comparison_says_in_words_how_models_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [folder_of(tmp_path / name) for name in ("a", "b")]
    config = json.loads((folders[0] / "config.json").read_text())
    config["model"] |= {"model_name": "other", "parameters": 7}
    (folders[0] / "config.json").write_text(json.dumps(config))
    assert main(["compare", *map(str, folders)]) == 0
    shown = capsys.readouterr().out
    assert "  name of the model\n    1  other\n" in shown and "  number of parameters\n    1  7\n" in shown


def test_a_run_that_goes_on_has_a_report_as_far_as_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path / "run")
    for name in ("result.json", "batch.json", "evaluations.jsonl"):
        (folder / name).unlink()
    assert main(["plot", str(folder)]) == 0 and "grpo reward" in capsys.readouterr().out
    assert "not ended" in read((folder / "report.html").read_text()).said
    stopped = {"stopped_early": True, "seconds": 38.0}  # the last step ends after 38 seconds
    for seconds, state in ((38.0, "stopped early"), (20.0, "not ended")):
        (folder / "result.json").write_text(json.dumps(stopped | {"seconds": seconds}))
        assert read_record(folder).seconds == (38.0 if state == "not ended" else seconds)
        assert read_record(folder).state == state
    (folder / "evaluations.jsonl").write_text('{"phase": "grpo", "step": "x"}\n')
    assert main(["plot", str(folder)]) == 2 and "evaluations.jsonl:1: expected a row" in capsys.readouterr().err


# A batch


def looked_at(loss: Any, data: list[Any]) -> dict[str, Any]:
    shape: dict[str, Any] = {"vocab_size": 257, "dim": 16, "layers": 1, "heads": 1, "kv_heads": 1, "hidden": 16}
    client = LocalTrainingClient(Decoder(**shape), tokenizer=ByteTokenizer(), device="cpu")
    return batch.look_at(client, ByteTokenizer().decode, Trained("x", 3, data, loss))


def test_tokens_get_their_coefficients_and_gradients() -> None:
    """The token mean over 5 tokens: coefficient 1/5, and gradient −1/5 of each token. é is two bytes."""
    data = [datum_from_tokens([*"xyé".encode(), 256], prompt_length=1), datum_from_tokens([*b"ab"], prompt_length=1)]
    content = json.loads(json.dumps(looked_at(cross_entropy(), data)))
    first, second = content["sequences"]
    assert (first["prompt"], first["tokens"], second["tokens"]) == ("x", ["y", "", "é", ""], ["b"])
    for row in (first, second):
        assert row["coefficient"] == pytest.approx([0.2] * len(row["tokens"]))
        assert row["gradient"] == pytest.approx([-0.2] * len(row["tokens"]))
    assert (first["share"], content["step"]) == (pytest.approx(0.8), 3)


def test_pairs_stay_together_and_groups_show_their_advantages() -> None:
    data = [datum_from_tokens([1, 2, 3 + i % 2], prompt_length=1) for i in range(20)]
    content = looked_at(dpo().bind(ref_logprobs=[[-1.0, -1.0]] * 20), data)
    assert [(row["datum"] % 2, row["side"]) for row in content["sequences"]] == [(0, "chosen"), (1, "rejected")] * 4
    advantages = [0.0, 2.0, -1.0, *[0.0] * 17]
    columns = {"advantages": advantages, "old_logprobs": [[-5.0, -5.0]] * 20}
    content = looked_at(grpo(kl_beta=0).bind(**columns), data)
    shown = {row["datum"]: row["advantage"] for row in content["sequences"]}
    assert shown[1] == [2.0, 2.0] and shown[2] == [-1.0, -1.0]
    advantages = [*[-3.0] * 10, *[1.0] * 10]  # the larger gradients are all of one sign
    content = looked_at(grpo(kl_beta=0).bind(**columns | {"advantages": advantages}), data)
    assert [row["advantage"][0] for row in content["sequences"]] == [-3.0] * 4 + [1.0] * 4


def test_a_batch_that_cannot_be_looked_at_has_the_reason() -> None:
    content = looked_at(cross_entropy().bind(weights=[[1.0]]), [datum_from_tokens([1, 2, 3], prompt_length=1)])
    assert "weights" in content["reason"]


def test_a_long_prompt_and_a_long_answer_are_cut_and_counted() -> None:
    data = [datum_from_tokens([65] * 1000, prompt_length=500)]
    (row,) = looked_at(cross_entropy(), data)["sequences"]
    # Targets 0 to 498 are the prompt's; 60 of them are kept, and 320 tokens in all.
    assert (row["before"], row["after"], len(row["tokens"])) == (499 - 60, 999 - (499 - 60) - 320, 320)
    assert row["active"] == [0.0] * 60 + [1.0] * 260


# Charts


def test_charts_hold_all_points_whatever_they_are() -> None:
    for points in ([(1, 0.0)], [(1, 3.0), (2, 3.0)], [(i, (-1) ** i * 1e30) for i in range(5000)], [(0, 1e-300)] * 2):
        text = charts.svg([charts.Line(points, marks=len(points) < 9)], "x")
        line = text.split('points="')[1].split('"')[0]
        places = [tuple(map(float, pair.split(","))) for pair in line.split()]
        assert len(places) <= 2 * charts.MOST_POINTS and "nan" not in text and "inf" not in text
        assert all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in places)


def test_a_long_line_keeps_its_extremes() -> None:
    points = [(i, math.sin(i)) for i in range(4000)]
    points[1234] = (1234, 7.0)
    thin = charts.thinned(points)
    assert len(thin) <= charts.MOST_POINTS and (1234, 7.0) in thin and list(thin) == sorted(thin)


# lossfns compare


def test_runs_are_compared_in_what_differs_and_what_they_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [folder_of(tmp_path / "a"), folder_of(tmp_path / "b", lr=0.2, steps=20), folder_of(tmp_path / "c")]
    page = tmp_path / "comparison.html"
    assert main(["compare", *map(str, folders), "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert all(len(line) <= 80 for line in lines[3:] if str(tmp_path) not in line), shown
    table = [line.split() for line in lines if line.endswith("finished")]
    assert [row[:6] for row in table] == [
        ["1", "-0.001", "0.599", "0.599", "@", "30"],
        ["2", "-0.200", "0.200", "0.200", "@", "20"],
        ["3", "-0.001", "0.599", "0.599", "@", "30"],
    ]
    differ = lines[lines.index("options that differ") + 1 :]
    assert differ[:8] == [
        "  steps",
        "    1  30",
        "    2  20",
        "    3  30",
        "  lr",
        "    1  0.001",
        "    2  0.2",
        "    3  0.001",
    ]
    assert "held-out reward" in lines and "reward" in lines and "█" in shown
    trained = lines[len(lines) - lines[::-1].index("reward") :][:3]
    ends = [(line.split()[1], line.split()[-1]) for line in trained]  # raw, not means
    assert ends == [("0", "0.9667"), ("0", "0.95"), ("0", "0.9667")]
    reader = read(page.read_text())
    assert reader.tags.count("polyline") == 6 and f"2: {tmp_path}/b" in reader.said  # held out, and trained


def test_a_loss_is_better_the_lower_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [folder_of(tmp_path / name) for name in ("a", "b")]
    for folder in folders:
        rows = [{"phase": "sft", "step": i, "seconds": 0, "nll": 1 + (i - 10) ** 2} for i in (0, 10, 20)]
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["compare", *map(str, folders)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("101.000  101.000  1.000 @ 10") == 2 and "best (low)" in shown and "no option differs" in shown


def test_folders_without_runs_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder_of(tmp_path / "run"))
    (tmp_path / "none").mkdir()
    for arguments, says in {
        (run,): "RUN: expected 2 to 12 different runs, got 1",
        (run, f"{run}/../run"): "got one of them twice",
        (run, str(tmp_path / "none")): f"got {tmp_path}/none, which has no config.json",
        (run, "a\0b"): "text in UTF-8",
    }.items():
        assert main(["compare", *arguments]) == 2
        assert says in capsys.readouterr().err, arguments


# Trackers


def logged(folder: Path, trackers: Any, steps: int) -> str:
    """Log a few steps and an evaluation to trackers, and return what the terminal has shown."""
    folder.mkdir(exist_ok=True)
    stream = io.StringIO()
    with Run(folder, terminal=stream, trackers=trackers) as run:
        for step in run.steps("sft", steps, Random(0)):
            run.log(step, {"loss": 1.0 / (step + 1)})
        run.log_evaluation("sft", steps, {"nll": 0.5})
    return stream.getvalue()


def test_tensorboard_gets_what_the_files_have(tmp_path: Path) -> None:
    logged(tmp_path / "run", [tensorboard(tmp_path / "run", {}, 0)], 3)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {
        "sft/loss": [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))],
        "held out/nll": [(3, 0.5)],
    }


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path: Path) -> None:
    got: list[Any] = []

    def fail(step: int, values: Any) -> None:
        raise ConnectionError("nobody there")

    trackers = [
        Tracker("wandb", fail, lambda: None),
        Tracker("mlflow", lambda *x: got.append(x), lambda: got.append(0)),
    ]
    shown = logged(tmp_path / "run", trackers, 2)
    assert shown.count("warning: wandb fails (ConnectionError: nobody there); metrics.jsonl has everything") == 1
    assert got == [(1, {"sft/loss": 1.0}), (2, {"sft/loss": 0.5}), (2, {"held out/nll": 0.5}), 0]


def test_trackers_that_are_not_there_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    for names, says in {
        "wandb,wandb": "--track: expected the package wandb, got none. pip install wandb",
        "tensorboard,board": "--track: expected names among tensorboard, wandb, mlflow, trackio, with commas between",
    }.items():
        with pytest.raises(SystemExit):
            main(["train", "sft", "--out", str(tmp_path / "run"), "--tensorboard", "--track", names])
        assert says in capsys.readouterr().err and not (tmp_path / "run").exists()
    with pytest.raises(LossInputError, match="got ''"):
        names_of("tensorboard,")


# A browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium or google-chrome")
@pytest.mark.parametrize("width", [375, 1280])
def test_a_browser_shows_the_report_without_overflow(width: int, tmp_path: Path) -> None:
    page = report(read_record(folder_of(tmp_path / "run", text="a" * 300)))
    # A browser's window may not be as narrow as a phone: the page gets the width instead.
    measure = f'<p id="size"></p><script>document.body.style = "width: {width}px; max-width: none"; '
    measure += "size.textContent = document.body.scrollWidth</script></body>"
    (tmp_path / "page.html").write_text(page.replace("</body>", measure))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += ["--hide-scrollbars", "--window-size=1280,800", "--dump-dom", f"file://{tmp_path}/page.html"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert f'<p id="size">{width}</p>' in shown.stdout and "CONSOLE" not in shown.stderr
