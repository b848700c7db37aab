"""``lossfns train LOSS``: every loss of the family by name, settings, and losses of one's own."""

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lossfns import LossInputError
from lossfns.backend import ByteTokenizer, Decoder, LocalTrainingClient
from lossfns.cli import main
from lossfns.describe import makers, required
from lossfns.train.batches import labelled_batch
from lossfns.train.columns import MAKERS, Batch, check_columns, columns_of
from lossfns.train.defaults import complete_options, loss_of
from lossfns.train.examples import Demonstration, Labelled, Preference, Problem, datum_of
from lossfns.train.losses import OwnLoss, method_of, parse_setting
from lossfns.train.measures import completion_logprobs
from lossfns.train.methods import merged
from lossfns.train.options import Options
from lossfns.train.recipes import Job, run_job
from lossfns.train.render import Renderer
from lossfns.train.run import Run
from lossfns.train.tasks import Task

RENDERER = Renderer(ByteTokenizer())
SHAPE: dict[str, Any] = {"vocab_size": 257, "dim": 16, "layers": 1, "heads": 1, "kv_heads": 1, "hidden": 16}
PARTS: dict[str, Any] = {"loss": "dapo", "policy": "dapo", "preference": "dpo", "quality": "kto", "delta": 0.1}
PARTS["weight"] = "rollout.truncated()"
"""What the combinators of the family combine."""

REFUSED = {
    "a2po": "which reads reference_point",
    "bradley_terry": "bradley_terry, of scores",
    "bradley_terry_margin": "of scores",
    "chord": "which reads sft_weights: it takes demonstrations of an expert",
    "echo": "which reads ce_weights: it takes the tokens that a tool returned",
    "info_nce": "a loss of embeddings",
    "odpo": "which reads target_margin: it takes scores of both sides",
    "oreal": "which reads positive_weights",
    "process_reward": "of scores",
    "sum_losses": "at least one loss",
    "value_loss": "of scores",
}
"""The losses that no run can train, and why."""


def demonstration(i: int) -> Demonstration:
    return RENDERER.completion(f"{i}+1=", str(i + 1))


def pair(i: int) -> Preference:
    return Preference(demonstration(i), RENDERER.completion(f"{i}+1=", "no"))


EXAMPLES: dict[str, list[Any]] = {
    "supervised": [demonstration(i) for i in range(4)],
    "distillation": [demonstration(i) for i in range(4)],
    "preference": [pair(i) for i in range(4)],
    "unpaired": [Labelled(demonstration(i), i % 2 == 0) for i in range(4)],
    "policy": [Problem(RENDERER.prompt(f"{i}+1="), "a", {}) for i in range(2)],
}


def tiny() -> LocalTrainingClient:
    return LocalTrainingClient(Decoder(**SHAPE), tokenizer=ByteTokenizer(), device="cpu")


def one_step(loss: Any, folder: Path, client: LocalTrainingClient, teacher: LocalTrainingClient, **more: Any) -> Any:
    """Run the recipe of a loss for one step and return its metrics."""
    examples = EXAMPLES[method_of(loss)]
    task: Task[Any] = Task("four examples", RENDERER, lambda rng, n: examples[:n], examples, examples)
    sizes: dict[str, Any] = {"steps": 1, "batch": 4, "lr": 1e-3, "group": 3, "updates": 1, "max_tokens": 3}
    options = Options(loss=loss.name, candidates=3, data="rows.jsonl", **sizes | more)
    mixed = lambda problem, text: sum(map(ord, text)) % 3 / 2  # noqa: E731
    folder.mkdir(exist_ok=True)
    job = Job(options=options, loss=loss, client=client, task=task, teacher=teacher, reward=mixed)
    with Run(folder, terminal=io.StringIO()) as run:
        outcome = run_job(run, job)
        assert all(math.isfinite(x) for x in [*outcome.before.values(), *outcome.after.values()])
        return run.history[-1]


def test_every_loss_of_the_family_trains_a_step_or_says_why_not(tmp_path: Path) -> None:
    """A combinator combines ``PARTS``. What is refused is refused before a model is built."""
    client, teacher = tiny(), tiny()
    refused = {}
    for name, make in makers().items():
        settings = {argument: PARTS[argument] for argument in required(make) if argument in PARTS}
        try:
            loss = loss_of(name, settings)
            check_columns(loss, teacher=True, outputs=True)
        except LossInputError as error:
            refused[name] = str(error)
            continue
        row = one_step(loss, tmp_path / name, client, teacher)
        assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]), (name, row)
        assert row["grad_norm"] > 0, (name, row)
    assert refused.keys() == REFUSED.keys()
    for name, reason in REFUSED.items():
        assert reason in refused[name], (name, refused[name])


def test_settings_are_those_of_the_loss() -> None:
    """Values are those that TOML could hold; a text stands for a public name or a call of one."""
    given = dict(
        map(parse_setting, ["clip=0.8,1.28", "weigh=fixed_length(64)", "kl_beta=0", "kl=k2", "dual_clip=None"])
    )
    assert given == {"clip": [0.8, 1.28], "weigh": "fixed_length(64)", "kl_beta": 0, "kl": "k2", "dual_clip": "None"}
    for text, settings, shown in [
        ("grpo", given, "grpo(clip=(0.8, 1.28), kl_beta=0, kl=k2, weigh=fixed_length(64), log_ratio_cap=20.0"),
        ("gspo-token", {"clip": [0.9, float("inf")]}, "gspo_token(clip=(0.9, inf), weigh=sequence_mean"),
        ("with_tis(dapo(), cap=2)", {"cap": 3}, "with_tis(loss=dapo(clip=(0.8, 1.28)"),
        ("with_kl", {"loss": "dapo", "kl_to": "sampler_logprobs"}, "kl_to='sampler_logprobs')"),
        ("sft", {}, "cross_entropy(weigh=token_mean)"),
        ("with_tis(sft)", {}, "with_tis(loss=cross_entropy(weigh=token_mean), cap=2.0"),
        ("with_kl(with_tis(dapo(clip=(0.9, 1.1))), kl_beta=0.1)", {}, "loss=dapo(clip=(0.9, 1.1), weigh=token_mean"),
        ("with_kl(with_tis(dapo(), cap=3), kl_beta=0.1)", {}, "log_ratio_cap=20.0, dual_clip=None), cap=3, level"),
        ("sum_losses(rl=grpo(), ce=sft(), weights={'ce': 'weights'})", {}, "weights={'ce': 'weights'})"),
    ]:  # fmt: skip
        assert shown in repr(loss_of(text, settings)), (text, settings)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("grop", {}, "got 'grop'. Did you mean 'grpo'?"),
    ("grpo(", {}, "got 'grpo('. Did you mean 'grpo'?"),
    ("__import__('os')", {}, "the name of a loss, or module:function"),
    ("grpo(clip=__import__('os'))", {}, "got '__import__' in grpo(clip=__import__('os'))"),
    ("grpo(clp=3)", {}, "a loss with its settings"),
    ("grpo", {"clp": 1}, "--set: expected a setting of grpo, got 'clp'. Did you mean 'clip'?"),
    ("grpo", {"clip": [0.2, 0.28]}, "pass clip=(0.8, 1.28)"),
    ("grpo", {"weigh": "sequence_mea"}, "Did you mean 'sequence_mean'?"),
    ("with_tis", {}, "with_tis with loss, got no loss. Add --set loss=..."),
    ("grpo", {"kl": "grpo"}, "grpo: kl: expected a function such as k3, got grpo("),
    ("grpo", {"kl": "dapo()"}, "Known: k1, k2, k3."),
    ("grpo", {"kl": "token_level"}, "kl: expected a function for kl, got token_level, one for level. Use one of: k1"),
    ("with_tis(dapoo())", {}, "got 'dapoo' in with_tis(dapoo()). Did you mean 'dapo'?"),
    ("with_tis(gspo-token)", {}, "(gspo - token is no number, text, name or call)"),
    ("sum_losses([grpo(), sft()])", {}, "a name for each part of the sum, got 'sum_losses([grpo(), sft()])'. Such as"),
    ("no_such_module_of_mine:loss", {}, "--loss: expected that no_such_module_of_mine can be imported"),
    ("lossfns:grop", {}, "--loss: expected a name in lossfns, got 'grop'. Did you mean 'grpo'?"),
]


def test_what_is_no_loss_or_no_setting_is_refused_by_name() -> None:
    for text, settings, says in WRONG:
        with pytest.raises(LossInputError) as refused:
            loss_of(text, settings)
        assert says in str(refused.value), (text, settings, str(refused.value))
    for setting in ("clip", "=3", "a b=3", "clip="):
        with pytest.raises(LossInputError, match="NAME=VALUE"):
            parse_setting(setting)
    for options, says in [
        ({"loss": "top_k_jsd"}, "--teacher: expected a teacher, whose logprobs top_k_jsd reads, got none"),
        ({"loss": "multi_target_cross_entropy"}, "--teacher: expected a teacher, from which"),
        ({"loss": "sft", "group": 3}, "--group: expected a loss that has it (policy losses)"),
        ({"loss": "eaft", "base_url": "http://x"}, "which reads entropy: it takes the model itself, in this process"),
        ({"loss": "grpo", "teacher": "x", "base_url": "http://x"}, "--teacher: expected no --base-url with it"),
        ({"loss": "sft", "stepps": 3}, "got 'stepps'. Did you mean 'steps'?"),
    ]:
        with pytest.raises(LossInputError) as refused:
            complete_options(options)
        assert says in str(refused.value), (options, str(refused.value))


OWN = """
import torch

def pg(logprobs, advantages, mask, scale=1.0):
    return -(scale * torch.where(mask != 0, logprobs * advantages, 0)).sum() / mask.sum()

def clipped(advantages, old_logprobs, eps=0.2):
    def loss_fn(data, logprobs_list):
        total = count = 0
        for datum, lp, a, old in zip(data, logprobs_list, advantages, old_logprobs):
            w = datum.loss_fn_inputs["weights"].to_torch()
            r = (lp - torch.as_tensor(old)).exp()
            total = total - (w * torch.minimum(r * a, r.clamp(1 - eps, 1 + eps) * a)).sum()
            count += w.sum()
        return total / count, {"clipped": 0.0}
    return loss_fn

def nll(data, logprobs_list):
    weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
    return -sum((w * lp).sum() for w, lp in zip(weights, logprobs_list)) / sum(w.sum() for w in weights), {}

def dpo(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta=0.1):
    margin = (policy_chosen_logps - reference_chosen_logps) - (policy_rejected_logps - reference_rejected_logps)
    return -torch.nn.functional.logsigmoid(beta * margin)
"""


def test_ones_own_loss_of_any_form_trains_by_what_it_reads(tmp_path: Path) -> None:
    """Where the family has the same loss, the first step is the same: gradient and, of a contract function, loss."""
    (tmp_path / "mine.py").write_text(OWN)
    for name, settings, method, same in [
        ("pg", {"scale": 2.0}, "policy", None),
        ("pg", {}, "policy", "reinforce"),
        ("clipped", {"eps": 0.2}, "policy", "ppo"),
        ("nll", {}, "supervised", "cross_entropy"),
        ("dpo", {}, "preference", "dpo"),
    ]:
        loss = loss_of(f"{tmp_path}/mine.py:{name}", settings)
        assert isinstance(loss, OwnLoss) and method_of(loss) == method, name
        check_columns(loss, teacher=False, outputs=True)
        row = one_step(loss, tmp_path / f"{name}{len(settings)}", tiny(), tiny())
        if same is not None:
            expected = one_step(loss_of(same, {}), tmp_path / same, tiny(), tiny())
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), (name, same)
            if same == "cross_entropy":  # its metrics are {}: the loss that it returns is recorded
                assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert repr(loss) == f"{name}({', '.join(f'{n}={x}' for n, x in settings.items())})"
    with pytest.raises(LossInputError, match=r"a setting of .*mine.py:pg, got 'scal'. Did you mean 'scale'\?"):
        loss_of(f"{tmp_path}/mine.py:pg", {"scal": 2.0})


RAISING = """
def raises(logprobs, mask):
    raise RuntimeError("first\\nsecond")

def exits(logprobs, mask):
    raise SystemExit(0)

def leaves(data, logprobs_list):
    raise SystemExit(0)
"""


def test_what_ones_own_loss_raises_is_one_line_with_its_place_also_an_exit(tmp_path: Path) -> None:
    (tmp_path / "raising.py").write_text(RAISING)
    for name, says in [
        ("raises", rf"got RuntimeError: first second \({tmp_path}/raising.py:3\)"),
        ("exits", rf"got SystemExit: 0 \({tmp_path}/raising.py:6\). Correct it there."),
        ("leaves", rf"got SystemExit: 0 \({tmp_path}/raising.py:9\). Correct it there."),
    ]:
        with pytest.raises(LossInputError, match=says):
            one_step(loss_of(f"{tmp_path}/raising.py:{name}", {}), tmp_path / name, tiny(), tiny())


WRAPPED = """
import functools
import lossfns.testing

def scaled(logprobs, mask, scale=1.0):
    return -scale * (logprobs * mask).sum() / mask.sum()

twice = functools.partial(scaled, scale=2.0)
padded = lossfns.testing.padded(scaled)

class Scaled:
    def __call__(self, logprobs, mask):
        return scaled(logprobs, mask)

of_class = Scaled()
"""


def test_the_place_of_ones_own_loss_is_that_of_its_function(tmp_path: Path) -> None:
    """Not that of ``functools.partial`` or ``padded``, which wrap it."""
    mine = tmp_path / "wrapped.py"
    mine.write_text(WRAPPED)
    for name, line in (("scaled", 5), ("twice", 5), ("padded", 5), ("of_class", 12)):
        loss = loss_of(f"{mine}:{name}", {})
        assert isinstance(loss, OwnLoss) and loss.place == f"{mine}:{line}", name


def test_a_setting_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "grpo", "--set", "kl_beta=1", "--set", "clip=0.8,1.2", "--set", "kl_beta=2"])
    assert "--set: expected each setting once, got kl_beta twice" in capsys.readouterr().err


def test_a_file_runs_once_and_may_change_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths mean what they meant before. A changed file runs again."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    source = f"import os\nopen('{tmp_path}/log', 'a').write('x')\nos.chdir('{tmp_path}/elsewhere')\n" + OWN
    Path("moving.py").write_text(source)
    Path("rows.jsonl").write_text("")
    options = complete_options({"loss": "moving.py:nll", "data": "rows.jsonl", "out": "run"})
    assert Path.cwd() == tmp_path / "elsewhere"
    assert (options.data, options.out) == (f"{tmp_path}/rows.jsonl", f"{tmp_path}/run")
    first = loss_of(options.loss, {}).function
    assert loss_of(options.loss, {}).function is first and (tmp_path / "log").read_text() == "x"
    (tmp_path / "moving.py").write_text(source + "\n")
    assert loss_of(options.loss, {}).function is not first and (tmp_path / "log").read_text() == "xx"


def test_metrics_of_ones_own_loss_are_numbers_and_leave_the_place_of_a_row(tmp_path: Path) -> None:
    source = "def {}(data, logprobs_list):\n    return -sum(map(sum, logprobs_list)), {{{}}}\n"
    named = "'phase': 3, 'step': 9, 'seconds': 1e9, 'x': logprobs_list[0].new_tensor(2.0)"
    text = source.format("named", named) + source.format("text", "'x': '2'")
    (tmp_path / "measured.py").write_text(text)
    row = one_step(loss_of(f"{tmp_path}/measured.py:named", {}), tmp_path / "named", tiny(), tiny())
    assert (row["phase"], row["step"], row["x"]) == ("named", 1, 2.0) and row["seconds"] < 1e6
    with pytest.raises(LossInputError, match=r"metrics\['x'\]: expected a number, got '2'"):
        one_step(loss_of(f"{tmp_path}/measured.py:text", {}), tmp_path / "text", tiny(), tiny())


def test_metrics_that_only_some_updates_have_are_merged() -> None:
    updates = [{"a": 1.0, "grad_norm": 1.0}, {"b": 3.0, "grad_norm": 2.0}]
    assert merged(updates) == {"a": 1.0, "b": 3.0, "grad_norm": 1.5}


def test_columns_that_a_batch_makes_itself() -> None:
    """Group 0 has rewards 1, 0, 0 and group 1 has 3, 3. A win counts 1, a tie ½, over all samples of the group."""
    data = [datum_of(demonstration(i)) for i in range(5)]
    batch = Batch(data=data, policy=None, groups=[0, 0, 0, 1, 1], rewards=[1.0, 0.0, 0.0, 3.0, 3.0])
    made = columns_of(loss_of("sppo", {}), replace(batch, reference=tiny()))["rewards"]
    assert made == pytest.approx([2.5 / 3, 1 / 3, 1 / 3, 0.5, 0.5])
    weights = columns_of(loss_of("vapo_nll(reinforce())", {}), batch)["nll_weights"]
    assert [float(row.sum()) > 0 for row in weights] == [True, False, False, True, True]
    plain = columns_of(loss_of("reinforce", {}), replace(batch, scale="none"))["advantages"]
    assert plain == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0])  # the reward minus the mean of the group
    margins = [{"margin": 1.0}, {"margin": 2.0}]
    points = [MAKERS["beta_dpo/reference_point"].make(replace(batch, history=rows))[0] for rows in ([], margins)]
    assert points == pytest.approx([0.0, 0.9 * 1.0 + 0.1 * 2.0])


def test_the_reference_point_of_bco_is_the_middle_of_the_two_kinds() -> None:
    """Policy and reference differ; the log-ratios m are taken one by one. The last average counts 0.9."""
    client, reference = tiny(), LocalTrainingClient(Decoder(**SHAPE, seed=1), tokenizer=ByteTokenizer(), device="cpu")
    batch = labelled_batch(client, EXAMPLES["unpaired"], reference=reference)
    m = [a - b for a, b in zip(*(completion_logprobs(each, batch.data) for each in (client, reference)))]
    middle = ((m[0] + m[2]) / 2 + (m[1] + m[3]) / 2) / 2
    make = MAKERS["bco/reference_point"].make
    assert make(batch) == pytest.approx([middle] * 4, rel=1e-4)
    later = replace(batch, history=[{"reference_point": 5.0}])
    assert make(later) == pytest.approx([0.9 * 5.0 + 0.1 * middle] * 4, rel=1e-4)


def test_the_reference_point_of_kto_is_that_of_answers_to_other_prompts() -> None:
    """Prompt i gets the answer of datum i + 1, and the last prompt that of the first."""
    client, reference = tiny(), LocalTrainingClient(Decoder(**SHAPE, seed=1), tokenizer=ByteTokenizer(), device="cpu")
    batch = labelled_batch(client, EXAMPLES["unpaired"], reference=reference)
    others = [datum_of(RENDERER.completion(f"{i}+1=", str((i + 1) % 4 + 1))) for i in range(4)]
    gains = [a - b for a, b in zip(*(completion_logprobs(each, others) for each in (client, reference)))]
    mean = sum(gains) / 4
    make = MAKERS["kto/reference_point"].make
    assert make(batch) == pytest.approx([max(0, mean)] * 4, rel=1e-4)
    swapped = replace(batch, policy=reference, reference=client)
    assert make(swapped) == pytest.approx([max(0, -mean)] * 4, rel=1e-4)
