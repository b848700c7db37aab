"""The pieces of ``lossfns train``: tasks, rewards, schedules, what the terminal shows."""

import io
import json
import math
import re
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lossfns import LossInputError, cross_entropy
from lossfns.backend import ByteTokenizer, Decoder, LocalTrainingClient
from lossfns.train import measures, methods, tasks
from lossfns.train.batches import demonstration_batch, sample_answers
from lossfns.train.charts import running_mean
from lossfns.train.examples import Labelled, Preference, Problem, demonstration, prompt_of
from lossfns.train.outcome import print_outcome
from lossfns.train.recipes import Outcome
from lossfns.train.render import Renderer
from lossfns.train.rewards import reward_of
from lossfns.train.run import Run, State

TEXT = ByteTokenizer()
BYTES = Renderer(TEXT)


def test_held_out_problems_are_never_drawn_and_answers_are_right() -> None:
    task = tasks.arithmetic(BYTES)
    held_out = {tuple(p.prompt) for p in task.held_out}
    drawn = task.draw(Random(0), 10_000)
    assert len(drawn) == 810 - len(held_out) and not held_out & {tuple(p.prompt) for p in drawn}
    for problem in drawn + task.held_out:
        a, b = TEXT.decode(problem.prompt).rstrip("=").split("+")
        assert int(a) + int(b) == int(problem.answer)


def test_careless_demonstrations_slip_six_times_in_ten() -> None:
    problem, rng = tasks.arithmetic(BYTES).held_out[0], Random(0)
    shown = [tasks.noisy_answer(problem, rng) for _ in range(2000)]
    right = sum(answer == problem.answer for answer in shown) / 2000
    assert right == pytest.approx(0.4, abs=0.04)
    assert {abs(int(answer) - int(problem.answer)) for answer in shown} == {0, 1, 10}


def test_topics_are_held_out_whole() -> None:
    train, held_out = tasks.corpus()
    assert not train.keys() & held_out.keys() and len(held_out) > 8
    everything = " ".join(tasks.normalized(text) for text in train.values())
    for example in tasks.documentation(BYTES).held_out:
        assert tasks.normalized(TEXT.decode(example.tokens)) not in everything


def test_a_true_continuation_continues_and_the_other_comes_from_elsewhere() -> None:
    _, held_out = tasks.corpus()
    for pair in tasks.continuations(BYTES).held_out[:40]:
        prompt = TEXT.decode(prompt_of(pair))
        chosen, rejected = (TEXT.decode(side.tokens).removeprefix(prompt) for side in pair)
        homes = {name for name, text in held_out.items() if prompt + chosen in text}
        assert homes and any(rejected in text for name, text in held_out.items() if name not in homes)
        assert prompt[-1].isalpha() and chosen[0].isalpha() and rejected[0].isalpha()
        assert len(pair.chosen.tokens) == len(pair.rejected.tokens)


def test_rewards_are_for_exactly_the_answer(tmp_path: Path) -> None:
    """A model that has learned the answer gets it, and no reward for another answer."""
    shape: dict[str, Any] = {"vocab_size": 257, "dim": 16, "layers": 1, "heads": 1, "kv_heads": 1, "hidden": 16}
    client = LocalTrainingClient(Decoder(**shape), tokenizer=TEXT, device="cpu")
    problem, exact = Problem([50, 61], "x", {}), reward_of("exact")
    data = [demonstration(problem.prompt, [120, 256])] * 4
    rate = methods.constant(3e-2)
    with Run(tmp_path, terminal=io.StringIO()) as run:
        batch = lambda rng: demonstration_batch(client, data)  # noqa: E731
        methods.train(run, client, cross_entropy(), batch, phase="warm-up", steps=60, learning_rate=rate, seed=0)
    (answer,) = sample_answers(client, BYTES, [problem], 1, 4, seed=0, temperature=0)
    assert (answer.tokens, answer.text) == ([120, 256], "x")
    assert measures.mean_reward(client, BYTES, [[problem]], exact, 4)["reward"] > 0.9
    assert measures.mean_reward(client, BYTES, [[Problem([50, 61], "xx", {})]], exact, 4)["reward"] < 0.1


def test_measurements_do_not_depend_on_the_parts_in_which_they_are_made(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"vocab_size": 257, "dim": 16, "layers": 1, "heads": 1, "kv_heads": 1, "hidden": 16}
    client = LocalTrainingClient(Decoder(**shape), tokenizer=TEXT, device="cpu")
    answers = [BYTES.completion(f"{i}+1=", "é" * (i + 1)) for i in range(5)]
    pairs = [Preference(each, BYTES.completion(f"{i}+1=", "no")) for i, each in enumerate(answers)]
    labelled = [Labelled(each, i % 2 == 0) for i, each in enumerate(answers)]
    with Run(tmp_path, terminal=io.StringIO()) as run:
        parts = [[*run.in_parts(answers, size)] for size in (2, 5)]
        assert [len(each) for each in parts[0]] == [2, 2, 1] and parts[1] == [answers]
        by_size = [
            measures.likelihood(client, BYTES, run.in_parts(answers, size))
            | measures.pair_accuracy(client, None, run.in_parts(pairs, size))
            | measures.ranking(client, None, run.in_parts(labelled, size))
            for size in (2, 5)
        ]
    assert by_size[0] == pytest.approx(by_size[1], rel=1e-6) and len(by_size[0]) == 3


def test_accuracy_counts_a_tie_half() -> None:
    assert measures.share_positive([1.0, -2.0, 0.0, 3.0]) == 2.5 / 4


def test_schedules() -> None:
    cosine, decay, constant = methods.cosine(2.0, 100, 10), methods.linear_decay(2.0, 100), methods.constant(2.0, 4)
    assert [constant(s) for s in (0, 1, 3, 50)] == [0.5, 1.0, 2.0, 2.0]
    assert cosine(0) == 0.2 and cosine(9) == 2.0
    assert cosine(55) == pytest.approx(2 * (0.1 + 0.45)) and cosine(100) == pytest.approx(0.2)
    assert decay(4) == pytest.approx(2 * (1 - 0.036)) and decay(99) == pytest.approx(2 * (1 - 0.891))


def shown(stream: io.StringIO, folder: Path) -> str:
    """The output of a run of two phases and a remark."""
    folder.mkdir()
    with Run(folder, terminal=stream) as run:
        run.plan({"warm-up": 3, "sft": 30})
        for phase, count in (("warm-up", 3), ("sft", 30)):
            if phase == "sft":
                run.log_evaluation("sft", 0, {"reward": 0.25})
            for step in run.steps(phase, count, Random(0)):
                run.log(step, {"loss": 1.0, "reward": 0.5, "grad_norm": 2.0})
        run.log_evaluation("sft", 30, {"reward": 0.75})
        run.say("[b]done[/b]")
    return stream.getvalue()


def test_a_terminal_gets_a_bar_for_each_phase(terminal: io.StringIO, tmp_path: Path) -> None:
    text = shown(terminal, tmp_path / "run")
    assert re.search(r"\x1b\[[\d;]*m", text) and re.search(r"\x1b\[\d+A", text)  # colours, and the cursor goes up
    last = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text).splitlines()[-6:]
    assert any("warm-up" in line and "3/3" in line for line in last)
    assert any("sft" in line and "30/30" in line for line in last)
    assert any(re.search(r"reward +0\.500  ▁+ +loss +1\.000  ▁+", line) for line in last)
    assert any("held out: reward 0.250 → 0.750 after 30 steps" in line for line in last)
    assert "[b]done[/b]" in text and all(len(line) <= 80 for line in text.splitlines()[-9:] if "\x1b" not in line)


def test_no_color_is_respected(terminal: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[(\d+;)*(3|4|9|10)\d[;m]", shown(terminal, tmp_path / "run"))


@pytest.mark.parametrize("case", ["no terminal", "a dumb terminal", "no rich"])
def test_all_else_gets_a_line_for_each_tenth(
    terminal: io.StringIO, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "a dumb terminal":
        monkeypatch.setenv("TERM", "dumb")
    if case == "no rich":
        monkeypatch.setitem(sys.modules, "rich.console", None)
    text = shown(io.StringIO() if case == "no terminal" else terminal, tmp_path / "run")
    lines = text.splitlines()
    assert "\x1b" not in text and "\r" not in text and len(lines) == 3 + 1 + 10 + 1 + 1
    assert re.fullmatch(r" warm-up 1/3  loss 1\.000  reward 0\.500  0:00:0\d left \+ 30 sft", lines[0])
    assert lines[3] == "held out: reward 0.250 before training"
    assert re.fullmatch(r"     sft 15/30  loss 1\.000  reward 0\.500  0:00:0\d left", lines[3 + 5])
    assert lines[-2] == "held out: reward 0.250 → 0.750 after 30 steps"
    assert lines[-1] == "[b]done[/b]"


@pytest.mark.parametrize("live", [True, False])
def test_the_outcome_is_a_table_on_a_terminal_and_a_line_elsewhere(
    live: bool, terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = terminal if live else io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    print_outcome(Outcome({"reward": 0.25}, {"reward": 0.875}))
    text = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    if live:
        assert [line.split() for line in text.splitlines() if line.strip(" ─")] == [
            ["before", "after", "change"],
            ["held-out", "reward", "0.250", "0.875", "+0.625"],
        ]
    else:
        assert text == "\nheld-out reward: 0.250 before, 0.875 after (+0.625)\n\n"


def test_a_stop_ends_the_steps_after_the_one_in_hand(tmp_path: Path) -> None:
    done, saved = [], []
    with Run(tmp_path, saved.append, terminal=io.StringIO()) as run:
        for step in run.steps("sft", 5, Random(0)):
            if step == 2:
                run._stop(2, None)
            done.append(step)
        run.once("after the stop", lambda: 1)
        assert list(run.steps("more", 5, Random(0))) == []
        with pytest.raises(KeyboardInterrupt):
            run._stop(2, None)
    assert done == [0, 1, 2] and run.stopped
    assert [(state.done, state.measured) for state in saved] == [({"sft": 3}, {})]


def test_a_stop_after_the_last_step_is_too_late_to_cut_anything(tmp_path: Path) -> None:
    with Run(tmp_path, terminal=io.StringIO()) as run:
        assert list(run.steps("sft", 2, Random(0))) == [0, 1]
        run._stop(2, None)
        assert list(run.steps("sft", 2, Random(0))) == [] and not run.stopped


def drawn(run: Run, until: int = 99) -> list[tuple[str, int, float]]:
    """Run two phases that draw and log, up to this many steps."""
    steps = []
    for phase, count in (("warm-up", 5), ("grpo", 7)):
        run.once(f"before {phase}", lambda phase=phase: f"{phase} {len(run.history)}")  # type: ignore[misc]
        rng = Random(phase)
        for step in run.steps(phase, count, rng):
            if run.steps_done == until:
                return steps
            steps.append((phase, step, rng.gauss(0, 1)))
            run.log(step, {"loss": steps[-1][2]})
            if (step + 1) % 3 == 0:
                run.log_evaluation(phase, step + 1, {"reward": len(run.history) / 10})
    return steps


@pytest.mark.parametrize("until", range(13))
def test_a_run_goes_on_from_its_newest_state(tmp_path: Path, until: int) -> None:
    """Wherever it stops: the same draws, rows and measurements as without a stop. States go through JSON."""
    (tmp_path / "whole").mkdir(), (tmp_path / "broken").mkdir()
    states: list[str] = []

    def save(state: State) -> None:
        states.append(json.dumps(state))

    with Run(tmp_path / "whole", save, every=2, terminal=io.StringIO()) as run:
        whole = drawn(run)
    last = states[-1]
    states.clear()
    with Run(tmp_path / "broken", save, every=2, terminal=io.StringIO()) as run:
        first = drawn(run, until)
    state = State(*json.loads(states[-1])) if states else None
    with Run(tmp_path / "broken", save, state=state, every=2, terminal=io.StringIO()) as run:
        kept = run.steps_done
        assert until - 2 < kept <= until
        assert first[:kept] + drawn(run) == whole
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "broken")]
    assert [[json.loads(row)["loss"] for row in part] for part in rows] == [[x for *_, x in whole]] * 2
    measured = [(tmp_path / name / "evaluations.jsonl").read_text().splitlines() for name in ("whole", "broken")]
    places = [("warm-up", 3, 0.3), ("grpo", 3, 0.8), ("grpo", 6, 1.1)]  # of 5 and 7 steps, every third
    for part in measured:
        assert [tuple(map(json.loads(row).get, ("phase", "step", "reward"))) for row in part] == places
    assert states[-1] == last
    assert run.measured == {"before warm-up": "warm-up 0", "before grpo": "grpo 5"}


def test_rows_that_the_state_counts_on_must_be_there(tmp_path: Path) -> None:
    state = State({"sft": 2}, [*Random(0).getstate()], {})
    row = '{"phase": "sft", "step": 1, "seconds": 0.5}\n'
    for text in ("", row, row + "{nonsense\n", row + "[]\n", row + "{}\n", row + "\udcff\n"):
        (tmp_path / "metrics.jsonl").write_text(text, errors="surrogateescape")
        with pytest.raises(LossInputError, match=r"expected 2 rows, got .*metrics\.jsonl"):
            Run(tmp_path, state=state)
        assert (tmp_path / "metrics.jsonl").read_text(errors="surrogateescape") == text


def test_two_processes_cannot_have_one_run(tmp_path: Path) -> None:
    with Run(tmp_path), pytest.raises(LossInputError, match="which is still running"):
        Run(tmp_path)
    with Run(tmp_path):
        pass


def test_running_mean_is_centred() -> None:
    assert running_mean([0.0, 1.0, 2.0, 3.0, 4.0]) == [0.5, 1.0, 2.0, 3.0, 3.5]
    assert all(map(math.isfinite, running_mean([float(i) for i in range(100)])))
