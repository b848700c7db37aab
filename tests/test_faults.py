"""Malformed inputs, one table: what is handed in, and what the message must say about it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from lossfns import (
    Datum,
    Loss,
    LossInputError,
    LossWarning,
    ModelInput,
    TensorData,
    cross_entropy,
    datum_from_tokens,
    dpo,
    fixed_length,
    group_advantages,
    grpo,
    importance_sampling,
    k1,
    multi_target_cross_entropy,
    orpo,
    pair_mean,
    ppo,
    sequence_mean,
    token_mean,
    with_kl,
    with_tis,
)

NAN, INF = math.nan, math.inf
ROWS = [[-1.0, -2.0], [-1.0, -2.0]]
SIDE = {"advantages": [1.0, -1.0], "old_logprobs": ROWS}
GRPO = grpo(kl_beta=0)
KL = grpo(kl_beta=0.1)
CE = cross_entropy()
MULTI = multi_target_cross_entropy()


class Leaves(list[torch.Tensor]):
    """Makes the logprobs of a call and keeps them, so that a test can look at their gradients."""

    def __call__(self, row: Any, **options: Any) -> torch.Tensor:
        x = torch.tensor(row, **options)
        self.append(x.requires_grad_() if x.is_floating_point() else x)
        return self[-1]


def datum(n: int = 2, **fields: Any) -> Datum:
    """A datum of n targets and weights 1; a field given as None is left out."""
    inputs = {"target_tokens": list(range(n)), "weights": [1.0] * n, **fields}
    return Datum(ModelInput.from_ints(range(n)), {name: x for name, x in inputs.items() if x is not None})


def call(lp: Leaves, loss: Loss, rows: Any = ROWS, data: Any = None, **columns: Any) -> Any:
    """The loss of two sequences, or of the rows and datums given."""
    logprobs = [lp(row) for row in rows]
    return loss.bind(**columns)([datum(len(row)) for row in rows] if data is None else data, logprobs)


def policy(lp: Leaves, rows: Any = ROWS, data: Any = None, **columns: Any) -> Any:
    return call(lp, GRPO, rows, data, **{**SIDE, **columns})


def built(**fields: Any) -> Datum:
    return Datum(ModelInput.from_ints([1, 2]), fields)


class Fault(NamedTuple):
    number: int
    what: str
    call: Callable[[Leaves], Any]
    pieces: tuple[str, ...]
    answer: type[Exception] = LossInputError


# Numbers follow the list of malformed inputs. Not here: 15, 19 and 21, which are allowed (see ALLOWED below, as
# is what 16, 18, 36 and 49 allow); in 41, ids beyond the vocabulary, which only a model can know; 50 to 60, which
# concern a training client and not a loss.
FAULTS = [
    Fault(1, "empty", lambda lp: call(lp, GRPO, [], []), ("grpo: data", "at least one datum", "data is empty")),
    Fault(
        1,
        "generator",
        lambda lp: policy(lp, data=(datum() for _ in ROWS)),
        ("grpo: data", "a list of datums", "a generator"),
    ),
    Fault(1, "bare datum", lambda lp: policy(lp, data=datum()), ("grpo: data", "got a Datum", "Pass [datum]")),
    Fault(1, "none", lambda lp: GRPO(None, []), ("grpo: data", "a list of datums", "NoneType")),
    Fault(
        1,
        "dict",
        lambda lp: policy(lp, data=[datum(), {"weights": [1.0, 1.0]}]),
        ("grpo: datum[1].loss_fn_inputs", "a Datum", "a dict", "datum_from_tokens"),
    ),
    Fault(
        2,
        "fewer logprobs",
        lambda lp: GRPO.bind(**SIDE)([datum(), datum()], [lp(ROWS[0])]),
        ("grpo: logprobs_list", "2 datums but 1 logprobs tensors", "the same forward call"),
    ),
    Fault(
        2,
        "a padded tensor",
        lambda lp: GRPO.bind(**SIDE)([datum(), datum()], lp(ROWS)),
        ("grpo: logprobs_list", "one per datum", "a Tensor"),
    ),
    Fault(2, "none", lambda lp: GRPO.bind(**SIDE)([datum(), datum()], None), ("grpo: logprobs_list", "got a NoneType")),
    Fault(
        3,
        "no targets to cut to",
        lambda lp: GRPO.bind(align="truncate").denominator([datum(target_tokens=None)]),
        ("grpo: datum[0].target_tokens",),
    ),
    Fault(
        3,
        "targets of another length than logprobs",
        lambda lp: call(lp, CE, data=[datum(), datum(3)], weights=[[1.0, 1.0]] * 2),
        ("cross_entropy: datum[1].", "2", "3"),
    ),
    Fault(
        4,
        "no weights",
        lambda lp: policy(lp, data=[datum(), datum(weights=None)]),
        ("grpo: datum[1].weights", "without weights", "0 for the prompt, 1 for what is trained on"),
    ),
    Fault(
        4,
        "a mask under another name",
        lambda lp: call(lp, CE, [ROWS[0]], [datum(weights=None, loss_mask=TensorData([0, 1], "float32"))]),
        ("cross_entropy: datum[0].weights", "'loss_mask' is not read: pass it as weights"),
    ),
    Fault(
        4,
        "weights in some RL datums only",
        lambda lp: policy(lp, data=[datum(advantages=[1.0, 1.0]), datum(advantages=[1.0, 1.0], weights=None)]),
        ("grpo: datum[1].weights", "without weights"),
    ),
    Fault(
        4,
        "no weights of K targets",
        lambda lp: call(lp, MULTI, [[[-1.0, -2.0]]], [datum(1, weights=None)]),
        ("multi_target_cross_entropy: datum[0].weights",),
    ),
    Fault(
        5,
        "shorter",
        lambda lp: policy(lp, data=[datum(), datum(weights=[1.0])]),
        ("grpo: datum[1].weights", "expected 2 values (the length of logprobs), got 1", "shifted by one, once"),
    ),
    Fault(
        5,
        "longer",
        lambda lp: policy(lp, data=[datum(weights=[0.0, 1.0, 1.0]), datum()]),
        ("grpo: datum[0].weights", "expected 2 values (the length of logprobs), got 3", "drop the first entry"),
    ),
    Fault(
        5,
        "a number for each datum",
        lambda lp: policy(lp, weights=[1.0, 1.0]),
        ("grpo: weights", "a row for each datum", "a number for each"),
    ),
    Fault(
        6,
        "longer",
        lambda lp: policy(lp, old_logprobs=[ROWS[0], [-3.0, -1.0, -2.0]]),
        ("grpo: datum[1].old_logprobs", "expected 2 values (the length of logprobs), got 3", "drop the first entry"),
    ),
    Fault(
        6,
        "much longer",
        lambda lp: policy(lp, old_logprobs=[[-1.0] * 7, ROWS[1]]),
        ("grpo: datum[0].old_logprobs", "expected 2 values", "got 7", 'align="truncate"'),
    ),
    Fault(6, "missing", lambda lp: call(lp, GRPO, advantages=[1, 2]), ("grpo: datum[0].old_logprobs", "or ON_POLICY")),
    Fault(
        6,
        "a datum without its row",
        lambda lp: policy(lp, old_logprobs=[ROWS[0], None]),
        ("grpo: datum[1].old_logprobs",),
    ),
    Fault(
        7,
        "shorter",
        lambda lp: call(lp, KL, **SIDE, ref_logprobs=[ROWS[0], [-2.0]]),
        ("grpo: datum[1].ref_logprobs", "expected 2 values (the length of logprobs), got 1"),
    ),
    Fault(
        8,
        "no reference",
        lambda lp: call(lp, KL, **SIDE),
        ("grpo: datum[0].ref_logprobs", "bind(ref_logprobs=...)", "the frozen reference model's"),
    ),
    Fault(
        9,
        "a reference that is not read",
        lambda lp: policy(lp, ref_logprobs=ROWS),
        ("grpo(", "kl_beta=0", "does not read ref_logprobs"),
        LossWarning,
    ),
    Fault(
        10,
        "more than datums",
        lambda lp: policy(lp, advantages=[1.0, 2.0, 3.0]),
        ("grpo: advantages", "expected 2 entries, one per datum, got 3"),
    ),
    Fault(
        10, "one number", lambda lp: policy(lp, advantages=1.0), ("grpo: advantages", "expected 2 entries", "a float")
    ),
    Fault(
        10,
        "a tensor of no dimension",
        lambda lp: policy(lp, advantages=torch.tensor(1.0)),
        ("grpo: advantages", "expected 2 entries"),
    ),
    Fault(
        10,
        "a dict, whose keys would be read",
        lambda lp: policy(lp, advantages={0: 1.0, 1: -1.0}),
        ("grpo: advantages", "a dict"),
    ),
    Fault(
        10,
        "a set, which has no order",
        lambda lp: policy(lp, advantages={1.0, -1.0}),
        ("grpo: advantages", "a set"),
    ),
    Fault(
        10,
        "numbers and rows",
        lambda lp: policy(lp, advantages=[1.0, [1.0, 1.0]]),
        ("grpo: datum[0].advantages", "a number among rows", "Use one form"),
    ),
    Fault(10, "no number", lambda lp: policy(lp, advantages="ab"), ("grpo: datum[0].advantages", "a str")),
    Fault(
        10, "missing", lambda lp: call(lp, GRPO, old_logprobs=ROWS), ("grpo: datum[0].advantages", "group_advantages")
    ),
    Fault(10, "None", lambda lp: policy(lp, advantages=None), ("grpo: advantages", "one row per datum", "None")),
    Fault(
        11,
        "longer",
        lambda lp: policy(lp, advantages=[[1.0, 1.0], [1.0, 1.0, 1.0]]),
        ("grpo: datum[1].advantages", "expected 2 values (the length of logprobs), got 3"),
    ),
    Fault(
        11,
        "in an RL datum without weights",
        lambda lp: call(lp, GRPO, ROWS[:1], [datum(weights=None, advantages=[1.0] * 3, logprobs=ROWS[0])]),
        ("grpo: datum[0].advantages", "expected 2 values", "got 3"),
    ),
    Fault(
        12,
        "nan",
        lambda lp: policy(lp, [[-1.0, -2.0], [-1.0, NAN]]),
        ("grpo: datum[1].logprobs[1]", "a finite number at every active token, got nan", "mask it"),
    ),
    Fault(
        12,
        "nan after an empty sequence",
        lambda lp: call(lp, CE, [[-1.0], [], [NAN]]),
        ("cross_entropy: datum[2].logprobs[0]", "got nan"),
    ),
    Fault(
        13,
        "a probability",
        lambda lp: policy(lp, [[-1.0, 0.31], [-1.0, -2.0]]),
        ("grpo: datum[0].logprobs[1]", "at most 0, got 0.31", "probabilities or logits"),
    ),
    Fault(13, "+inf", lambda lp: call(lp, CE, [[-1.0, INF]]), ("cross_entropy: datum[0].logprobs[1]", "got inf")),
    Fault(
        13,
        "an old probability",
        lambda lp: policy(lp, old_logprobs=[ROWS[0], [0.5, -1.0]]),
        ("grpo: datum[1].old_logprobs[0]", "at most 0, got 0.5"),
    ),
    Fault(
        14,
        "-inf",
        lambda lp: policy(lp, [[-INF, -1.0], [-1.0, -2.0]]),
        ("grpo: datum[0].logprobs[0]", "a finite number at every active token, got -inf", "mask it"),
    ),
    Fault(
        14,
        "-inf among K targets",
        lambda lp: call(lp, MULTI, [[[-1.0, -INF]]], [datum(1, weights=[[0.5, 0.5]])]),
        ("multi_target_cross_entropy: datum[0].logprobs[1]", "got -inf"),
    ),
    Fault(
        16,
        "nan advantage",
        lambda lp: policy(lp, advantages=[1.0, NAN]),
        ("grpo: datum[1].advantages[0]", "got nan", "group of one", "group_advantages"),
    ),
    Fault(16, "inf", lambda lp: policy(lp, advantages=[INF, 0.0]), ("grpo: datum[0].advantages[0]", "got inf")),
    Fault(
        16,
        "group of one",
        lambda lp: group_advantages([1.0, 0.0, 5.0], ["a", "a", "b"]),
        ("a group of one has advantage 0",),
        LossWarning,
    ),
    Fault(
        17,
        "nan",
        lambda lp: policy(lp, data=[datum(weights=[1.0, NAN]), datum()]),
        ("grpo: datum[0].weights[1]", "a finite number", "got nan"),
    ),
    Fault(
        17,
        "nan, in advance",
        lambda lp: CE.denominator([datum(weights=[1.0, NAN])]),
        ("cross_entropy:", "weights", "nan"),
    ),
    Fault(
        18,
        "policy",
        lambda lp: policy(lp, data=[datum(), datum(weights=[1.0, -1.0])]),
        ("grpo: datum[1].weights[1]", "a weight of at least 0, got -1", "into the advantages"),
    ),
    Fault(
        18,
        "preference",
        lambda lp: call(lp, orpo(), data=[datum(weights=[2.0, -1.0]), datum()]),
        ("orpo: datum[0].weights[1]", "a weight of at least 0, got -1"),
    ),
    Fault(
        18,
        "a mean of weights that cancel",
        lambda lp: call(lp, CE, data=[datum(weights=[1.0, -1.0]), datum(weights=[0.0, 0.0])]),
        ("cross_entropy: weights", "a denominator above 0, got 0", "token_sum takes any"),
    ),
    Fault(
        18,
        "a sequence whose weights cancel",
        lambda lp: call(lp, cross_entropy(weigh=sequence_mean), data=[datum(weights=[1.0, -1.0]), datum()]),
        ("cross_entropy: weights", "a denominator above 0", "token_sum takes any"),
    ),
    Fault(
        18,
        "a sequence whose weights cancel, in a chunk",
        lambda lp: call(
            lp, cross_entropy(weigh=sequence_mean), data=[datum(weights=[1.0, -1.0]), datum()], denominator=2.0
        ),
        ("cross_entropy:", "weights"),
    ),
    Fault(
        20,
        "policy",
        lambda lp: policy(lp, data=[datum(weights=[0.0, 0.0])] * 2),
        ("grpo: weights", "at least one active token in the batch", "only zeros", "denominator="),
    ),
    Fault(
        20,
        "preference",
        lambda lp: call(lp, dpo(), data=[datum(weights=[0.0, 0.0])] * 2, ref_logprobs=ROWS),
        ("dpo: weights", "at least one active token", "only zeros"),
    ),
    Fault(
        20, "nothing but empty sequences", lambda lp: call(lp, CE, [[], []]), ("cross_entropy: weights", "only zeros")
    ),
    Fault(
        22,
        "dpo",
        lambda lp: call(lp, dpo(), [ROWS[0]] * 3, ref_logprobs=[ROWS[0]] * 3),
        ("dpo: data", "chosen/rejected pairs", "3 datums, an odd number", "2i chosen, 2i + 1 rejected"),
    ),
    Fault(22, "orpo", lambda lp: call(lp, orpo(), [ROWS[0]]), ("orpo: data", "1 datums, an odd number")),
    Fault(
        23,
        "chosen",
        lambda lp: call(lp, dpo(), data=[datum(weights=[0.0, 0.0]), datum()], ref_logprobs=ROWS),
        ("dpo: datum[0].weights", "active tokens on both sides", "none on the chosen side of pair 0", "Drop the pair"),
    ),
    Fault(
        23,
        "rejected, of the second pair",
        lambda lp: call(lp, orpo(), [*ROWS, ROWS[0], []]),
        ("orpo: datum[3].weights", "active tokens on both sides", "none on the rejected side of pair 1"),
    ),
    Fault(
        24,
        "references of the chosen only",
        lambda lp: call(lp, dpo(), [*ROWS, *ROWS], ref_logprobs=ROWS),
        ("dpo: ref_logprobs", "expected 4 entries, one per datum, got 2"),
    ),
    Fault(
        25,
        "beyond the end",
        lambda lp: datum_from_tokens([5, 6, 7], prompt_length=4),
        ("prompt_length", "0 to 3, the number of tokens, got 4", "before the response"),
    ),
    Fault(25, "negative", lambda lp: datum_from_tokens([5, 6, 7], prompt_length=-1), ("prompt_length", "got -1")),
    Fault(25, "text", lambda lp: datum_from_tokens([5, 6, 7], prompt_length="1"), ("prompt_length", "'1'")),
    Fault(25, "fractional", lambda lp: datum_from_tokens([5, 6, 7], prompt_length=1.5), ("prompt_length", "1.5")),
    Fault(
        25, "negative length", lambda lp: datum_from_tokens([5, 6, 7], [0, 1, 1], max_length=-1), ("max_length", "-1")
    ),
    Fault(
        26,
        "a reference row of all tokens",
        lambda lp: call(lp, dpo(), ref_logprobs=[ROWS[0], [-3.0, -1.0, -2.0]]),
        (
            "dpo: datum[1].ref_logprobs",
            "expected 2 values (the length of logprobs), got 3",
            "position j holds token j + 1",
        ),
    ),
    Fault(27, "zero", lambda lp: dpo(beta=0), ("dpo: beta", "a finite number above 0, got 0")),
    Fault(27, "negative", lambda lp: dpo(beta=-0.1), ("dpo: beta", "above 0, got -0.1")),
    Fault(27, "nan", lambda lp: dpo(beta=NAN), ("dpo: beta", "above 0, got nan")),
    Fault(27, "inf", lambda lp: dpo(beta=INF), ("dpo: beta", "a finite number", "got inf")),
    Fault(28, "negative", lambda lp: orpo(lam=-0.1), ("orpo: lam", "at least 0, got -0.1", "Pass 0 to switch")),
    Fault(
        29,
        "epsilons",
        lambda lp: grpo(clip=(0.2, 0.28)),
        ("grpo: clip", "0 <= low <= 1 <= high, got (0.2, 0.28)", "look like epsilons: pass clip=(0.8, 1.28)"),
    ),
    Fault(29, "swapped", lambda lp: ppo(clip=(1.2, 0.8)), ("ppo: clip", "got (1.2, 0.8)", "must enclose the ratio 1")),
    Fault(
        29, "negative", lambda lp: ppo(clip=(-0.2, 1.2)), ("ppo: clip", "got (-0.2, 1.2)", "must enclose the ratio 1")
    ),
    Fault(29, "nan", lambda lp: ppo(clip=(NAN, 1.2)), ("ppo: clip", "got (nan, 1.2)")),
    Fault(
        29, "one epsilon", lambda lp: ppo(clip=0.2), ("ppo: clip", "got 0.2", "An epsilon of 0.2 is clip=(0.8, 1.2)")
    ),
    Fault(29, "one bound", lambda lp: ppo(clip=(0.8,)), ("ppo: clip", "(low, high)", "got (0.8,)")),
    Fault(
        29, "dual clip", lambda lp: ppo(dual_clip=1), ("ppo: dual_clip", "above 1, or None, got 1", "3.0 in the paper")
    ),
    Fault(
        29, "cap", lambda lp: ppo(log_ratio_cap=0), ("ppo: log_ratio_cap", "above 0, or None, got 0", "uncapped form")
    ),
    Fault(29, "truncation", lambda lp: with_tis(GRPO, cap=0), ("with_tis: cap", "above 0, got 0")),
    Fault(30, "negative", lambda lp: grpo(kl_beta=-1), ("grpo: kl_beta", "at least 0, got -1", "Pass 0 to switch")),
    Fault(30, "nan", lambda lp: with_kl(ppo(), kl_beta=NAN), ("with_kl: kl_beta", "got nan")),
    Fault(
        31,
        "weighing",
        lambda lp: grpo(weigh="token-mean"),
        ("grpo: weigh", "a weighing of tokens, got 'token-mean'", "Did you mean 'token_mean'?"),
    ),
    Fault(
        31,
        "weighing of pairs",
        lambda lp: grpo(weigh=pair_mean),
        ("grpo: weigh", "a weighing of tokens, got pair_mean", "token_mean"),
    ),
    Fault(
        31,
        "weighing of tokens",
        lambda lp: dpo(weigh=token_mean),
        ("dpo: weigh", "a weighing of pairs, got token_mean", "pair_mean, pair_sum"),
    ),
    Fault(31, "estimator", lambda lp: grpo(kl="k4"), ("grpo: kl", "such as k3, got 'k4'", "Known: k1, k2, k3.")),
    Fault(31, "loss", lambda lp: with_kl("grpo"), ("with_kl: loss", "'grpo'")),
    Fault(31, "preset not called", lambda lp: with_tis(grpo), ("with_tis: loss", "grpo")),
    Fault(31, "level", lambda lp: with_tis(GRPO, level="sequence"), ("with_tis: level", "'sequence'")),
    Fault(
        31,
        "column",
        lambda lp: policy(lp, advantage=[1.0, 1.0]),
        ("grpo: bind", "'advantage'", "Did you mean 'advantages'?"),
    ),
    Fault(
        31,
        "alignment",
        lambda lp: GRPO.bind(align="trunc"),
        ("grpo: align", "got 'trunc'", "Did you mean 'truncate'?"),
    ),
    Fault(
        31,
        "scale",
        lambda lp: group_advantages([1.0, 0.0], [0, 0], scale="stdev"),
        ("scale", "'std' or 'none'", "'stdev'", "Did you mean 'std'?"),
    ),
    Fault(
        31,
        "reduction",
        lambda lp: datum_from_tokens([5, 6, 7], [0, 1, 1], reduction="means"),
        ("reduction", "'none' or 'mean'", "'means'", "Did you mean 'mean'?"),
    ),
    Fault(
        32,
        "near another",
        lambda lp: grpo(beta=0.1),
        ("grpo() has no knob 'beta'", "Pass kl_beta=0.1."),
        TypeError,
    ),
    Fault(
        32,
        "near none",
        lambda lp: orpo(epsilon=0.1),
        ("orpo() has no knob 'epsilon'", "Known: lam, weigh."),
        TypeError,
    ),
    Fault(33, "text", lambda lp: grpo(kl_beta="0.1"), ("grpo: kl_beta", "a finite number", "got '0.1'")),
    Fault(33, "bool", lambda lp: dpo(beta=True), ("dpo: beta", "a finite number", "got True")),
    Fault(33, "none", lambda lp: orpo(lam=None), ("orpo: lam", "a finite number", "got None")),
    Fault(33, "text in a pair", lambda lp: ppo(clip=("0.8", 1.2)), ("ppo: clip", "got ('0.8', 1.2)")),
    Fault(33, "smoothing", lambda lp: dpo(label_smoothing=0.6), ("dpo: label_smoothing", "in [0, 0.5], got 0.6")),
    Fault(33, "length", lambda lp: fixed_length("8"), ("length", "a finite number above 0, got '8'")),
    Fault(
        33, "denominator", lambda lp: GRPO.bind(denominator=0), ("grpo: denominator", "above 0, got 0", "whole_batch")
    ),
    Fault(33, "denominator as text", lambda lp: GRPO.bind(denominator="3"), ("grpo: denominator", "got '3'")),
    Fault(
        34,
        "labels",
        lambda lp: group_advantages([1.0, 0.0, 1.0], [0, 0]),
        ("groups", "3 labels, one per reward, got 2", "the label of its prompt"),
    ),
    Fault(34, "a group size", lambda lp: group_advantages([1.0, 0.0], 2), ("groups", "2 labels, one per reward")),
    Fault(34, "nan", lambda lp: group_advantages([1.0, NAN], [0, 0]), ("rewards[1]", "a finite number, got nan")),
    Fault(34, "none", lambda lp: group_advantages([], []), ("rewards", "got shape (0,)")),
    Fault(34, "nested", lambda lp: group_advantages([[1.0, 0.0]], [0]), ("rewards", "got shape (1, 2)", "a flat list")),
    Fault(34, "text", lambda lp: group_advantages(["good", "bad"], [0, 0]), ("rewards", "one number for each sample")),
    Fault(
        35,
        "int",
        lambda lp: policy(lp, [[1, 2], [1, 2]]),
        ("grpo: datum[0].logprobs", "a floating point tensor, got torch.int64", "token ids"),
    ),
    Fault(35, "bool", lambda lp: policy(lp, [[-1.0, -2.0], [True, True]]), ("grpo: datum[1].logprobs", "torch.bool")),
    Fault(
        35,
        "list",
        lambda lp: CE([datum()], [[-1.0, -2.0]]),
        ("cross_entropy: datum[0].logprobs", "a torch.Tensor, got a list"),
    ),
    Fault(
        36,
        "a gradient norm without gradient",
        lambda lp: GRPO.bind(**SIDE, grad_l1=True)([datum(), datum()], [lp(row).detach() for row in ROWS]),
        ("grpo:", "require grad"),
    ),
    Fault(
        37,
        "[N, K] for [N]",
        lambda lp: call(lp, CE, [[-1.0, -2.0], [[-1.0, -2.0]]]),
        ("cross_entropy: datum[1].logprobs", "expected [N], got shape (1, 2)", "multi_target_cross_entropy"),
    ),
    Fault(
        37,
        "[N] for [N, K]",
        lambda lp: call(lp, MULTI),
        ("multi_target_cross_entropy: datum[0].logprobs", "expected [N, K], got shape (2,)", "use cross_entropy"),
    ),
    Fault(
        37,
        "a column of rows",
        lambda lp: policy(lp, old_logprobs=torch.full((2, 2, 1), -1.0)),
        ("grpo: datum[0].old_logprobs", "shape (2,), that of logprobs, got shape (2, 1)"),
    ),
    Fault(
        38,
        "other K",
        lambda lp: call(lp, MULTI, [[[-1.0, -2.0]]], [datum(1, weights=[[0.5, 0.3, 0.2]])]),
        (
            "multi_target_cross_entropy: datum[0].weights",
            "shape (1, 2), that of logprobs, got shape (1, 3)",
            "row-major",
        ),
    ),
    Fault(
        38,
        "too few, flat",
        lambda lp: call(lp, MULTI, [[[-1.0, -2.0], [-1.0, -2.0]]], [datum(weights=TensorData([1, 1, 1], "float32"))]),
        ("multi_target_cross_entropy: datum[0].weights", "shape (2, 2), that of logprobs, got shape (3,)"),
    ),
    Fault(
        38,
        "shape of another size",
        lambda lp: TensorData([1, 2, 3], "int64", [2, 2]),
        ("shape", "a shape of 3 values, got shape [2, 2] with 3 values", "[N, K] has N·K"),
    ),
    Fault(
        39,
        "in a datum",
        lambda lp: built(weights=[[1.0, 2.0], [3.0]]),
        ("weights", "a rectangular numeric array, got a ragged nested list", "Pad rows with weight 0"),
    ),
    Fault(
        39,
        "bound",
        lambda lp: policy(lp, advantages=[[1.0, 1.0], [[1.0], [1.0, 2.0]]]),
        ("grpo: datum[1].advantages", "no rectangular array of numbers"),
    ),
    Fault(
        40,
        "no shape",
        lambda lp: TensorData([1.0], "float32", None, [0, 1], [0]),
        ("sparse", "a CSR layout of shape [N, K]", "got shape None", "the dense shape"),
    ),
    Fault(40, "no columns", lambda lp: TensorData([1.0], "float32", [1, 2], [0, 1]), ("sparse", "col indices")),
    Fault(
        40,
        "a column beyond K",
        lambda lp: TensorData([1.0], "float32", [1, 2], [0, 1], [2]),
        ("sparse", "consistent CSR indices", "shape [1, 2]", "Columns lie in [0, K)"),
    ),
    Fault(
        40,
        "too few pointers",
        lambda lp: TensorData([1.0], "float32", [2, 2], [0, 1], [0]),
        ("sparse", "2 row pointers"),
    ),
    Fault(
        40,
        "pointers that go back",
        lambda lp: TensorData([1.0], "float32", [2, 2], [0, 2, 1], [0]),
        ("sparse", "consistent CSR indices"),
    ),
    Fault(
        41,
        "fractions",
        lambda lp: built(target_tokens=[1.7, 2.2]),
        ("target_tokens", "whole numbers, got fractions", "were weights passed?"),
    ),
    Fault(
        41,
        "fractions, tensor",
        lambda lp: built(target_tokens=torch.tensor([1.7, 2.0])),
        ("target_tokens", "whole numbers"),
    ),
    Fault(
        41, "fractions, array", lambda lp: built(target_tokens=np.array([1.7, 2.0])), ("target_tokens", "whole numbers")
    ),
    Fault(41, "negative", lambda lp: built(target_tokens=[-1, 2]), ("target_tokens", "-1")),
    Fault(41, "negative token", lambda lp: datum_from_tokens([5, -6, 7], prompt_length=1), ("tokens", "-6")),
    Fault(41, "beyond 64 bits", lambda lp: built(target_tokens=[1e30]), ("target_tokens",)),
    Fault(41, "nan", lambda lp: built(target_tokens=[1.0, NAN]), ("target_tokens", "whole numbers")),
    Fault(42, "float64", lambda lp: TensorData([1.0], "float64"), ("dtype", "'float32' or 'int64', got 'float64'")),
    Fault(42, "missing", lambda lp: TensorData([1.0]), ("dtype", "'float32' or 'int64', got None")),
    Fault(
        42,
        "bool tensor",
        lambda lp: built(weights=torch.tensor([True])),
        ("weights", "floating point or signed integers, got torch.bool", ".float()"),
    ),
    Fault(42, "bool array", lambda lp: built(weights=np.array([True])), ("weights", "signed integers, got bool")),
    Fault(42, "uint8 array", lambda lp: built(weights=np.ones(1, np.uint8)), ("weights", "signed integers, got uint8")),
    Fault(
        42,
        "uint8 tensor",
        lambda lp: built(weights=torch.ones(1, dtype=torch.uint8)),
        ("weights", "signed integers, got torch.uint8"),
    ),
    Fault(42, "complex tensor", lambda lp: built(weights=torch.tensor([1j])), ("weights", "torch.complex64")),
    Fault(
        42,
        "text",
        lambda lp: built(weights=["1.0"]),
        ("weights", "a rectangular numeric array", "strings are no numbers"),
    ),
    Fault(42, "None", lambda lp: built(weights=[None, 1.0]), ("weights", "a rectangular numeric array", "None")),
    Fault(
        42,
        "tuple",
        lambda lp: built(weights=(1.0, 1.0)),
        ("weights", "a list, array, tensor or TensorData, got a tuple"),
    ),
    Fault(
        42,
        "number",
        lambda lp: built(advantages=1.0),
        ("advantages", "a list, array, tensor or TensorData, got a float"),
    ),
    Fault(
        43,
        "unknown list",
        lambda lp: built(reward=[1.0, 1.0]),
        ("reward", "a known field for a plain list, got the unknown field 'reward'", "Wrap it in TensorData"),
    ),
    Fault(
        44,
        "in a datum",
        lambda lp: built(advantages=lp([1.0, 1.0])),
        ("advantages", "a constant tensor, got a tensor that requires grad", ".detach()"),
    ),
    Fault(
        45,
        "bound",
        lambda lp: policy(lp, old_logprobs=[ROWS[0], [None, -2.0]]),
        ("grpo: datum[1].old_logprobs[0]", "a finite number at every active token, got nan", "null for the prompt"),
    ),
    Fault(
        45,
        "in a datum",
        lambda lp: call(lp, GRPO, ROWS[:1], [datum(logprobs=[None, -2.0])], advantages=[1.0]),
        ("grpo: datum[0].old_logprobs[0]", "got nan", "weight 0"),
    ),
    Fault(
        46,
        "zeros",
        lambda lp: policy(lp, old_logprobs=[[0.0, 0.0], [0.0, 0.0]]),
        ("old_logprobs are 0 at every active token", "left unset?"),
        LossWarning,
    ),
    Fault(
        47,
        "6 nats above",
        lambda lp: policy(lp, old_logprobs=[[-7.0, -8.0], [-7.0, -8.0]]),
        ("mean |log-ratio| is 6", "the old_logprobs those of these tokens?"),
        LossWarning,
    ),
    Fault(
        47,
        "6 nats below",
        lambda lp: policy(lp, [[-7.0, -8.0], [-7.0, -8.0]], old_logprobs=ROWS),
        ("mean |log-ratio| is 6", "the old_logprobs those of these tokens?"),
        LossWarning,
    ),
    Fault(47, "k1", lambda lp: grpo(kl=k1), ("k1 in a loss", "use k2 or k3"), LossWarning),
    Fault(
        48,
        "logprobs",
        lambda lp: GRPO.bind(**SIDE)([datum(), datum()], [lp(ROWS[0]), lp(ROWS[1], device="meta")]),
        ("grpo: datum[1].logprobs", "one device for the whole batch, got meta, while datum[0] has cpu", ".to()"),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.number}, {fault.what}")
def test_a_malformed_input_is_answered_before_any_gradient(fault: Fault) -> None:
    """By the exact type, with the datum, the field, both numbers and the fix in the message."""
    leaves, warns = Leaves(), issubclass(fault.answer, Warning)
    with (pytest.warns if warns else pytest.raises)(fault.answer) as caught:
        fault.call(leaves)
    message = str(caught[0].message if warns else caught.value)
    assert [piece for piece in fault.pieces if piece not in message] == [], message
    assert all(x.grad is None for x in leaves)


def test_the_table_covers_the_list() -> None:
    numbers = {fault.number for fault in FAULTS} | {allowed.number for allowed in ALLOWED}
    assert numbers == set(range(1, 50))


class Allowed(NamedTuple):
    number: int
    call: Callable[[Leaves], Any]
    loss: float
    grads: list[list[float]]
    why: str


ALLOWED = [
    Allowed(
        15,
        lambda lp: call(lp, CE, [[-2.0, NAN]], [datum(weights=[1.0, 0.0])]),
        2.0,
        [[-1.0, 0.0]],
        "nan where nothing is trained: L = −(−2)/1",
    ),
    Allowed(
        16,
        lambda lp: policy(lp, advantages=group_advantages([0.7, 0.7], ["a", "a"])),
        0.0,
        [[0.0, 0.0], [0.0, 0.0]],
        "a constant group has advantage 0, and 0·r has gradient 0",
    ),
    Allowed(
        18,
        lambda lp: call(lp, CE, [[-1.0, -3.0]], [datum(weights=[2.0, -1.0])]),
        -1.0,
        [[-2.0, 1.0]],
        "cross-entropy takes real weights: (2·1 − 1·3)/(2 − 1), and −w/1",
    ),
    Allowed(
        19,
        lambda lp: call(
            lp,
            importance_sampling(),
            [[-1.0, -2.0]],
            [datum(weights=[0.5, 1.5])],
            advantages=[3.0],
            old_logprobs=ROWS[:1],
        ),
        -3.0,
        [[-0.75, -2.25]],
        "fractional weights count as such: r = 1, −(0.5·3 + 1.5·3)/2, and −w·3/2",
    ),
    Allowed(
        21,
        lambda lp: call(lp, CE, [[-1.0, -3.0], [-5.0], []], [datum(), datum(1, weights=[0.0]), datum(0)]),
        2.0,
        [[-0.5, -0.5], [0.0], []],
        "a masked datum and an empty one are inert, their gradients present: (1 + 3)/2",
    ),
    Allowed(
        49,
        lambda lp: CE([datum(1), datum(1)], [lp([-1.0]), lp([-2.0], dtype=torch.float64)]),
        1.5,
        [[-0.5], [-0.5]],
        "float32 and float64 in one batch: (1 + 2)/2",
    ),
]


@pytest.mark.parametrize("allowed", ALLOWED, ids=lambda allowed: str(allowed.number))
def test_what_looks_malformed_but_is_not(allowed: Allowed) -> None:
    """Numbers by hand: see ``why`` in the table."""
    leaves = Leaves()
    loss, metrics = allowed.call(leaves)
    loss.backward()
    assert loss.item() == metrics["loss"] == allowed.loss, allowed.why
    assert [x.grad.tolist() for x in leaves] == allowed.grads, allowed.why


def test_logprobs_without_gradient_still_have_a_loss() -> None:
    """A value to report: L = (1 + 2)/2."""
    loss, metrics = CE([datum()], [torch.tensor([-1.0, -2.0])])
    assert not loss.requires_grad
    assert metrics["loss"] == 1.5


@pytest.mark.parametrize("fault", [x for x in FAULTS if x.answer is LossWarning], ids=lambda fault: fault.what)
def test_a_warning_is_given_once_and_points_at_the_caller(fault: Fault) -> None:
    """The line to mend is outside the library."""
    with pytest.warns(LossWarning) as caught:
        fault.call(Leaves())
    assert [warning.filename for warning in caught] == [__file__]
