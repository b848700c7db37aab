"""Other frameworks' names of settings, and our names of these. The errors for unknown names quote them.

Sources of the names: TRL, verl, OpenRLHF, Tinker, Fireworks, SkyRL, slime, AReaL, NeMo-RL; docs/rosetta.md has their
values with numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from lossfns.errors import did_you_mean


class Setting(NamedTuple):
    """A setting of other frameworks.

    Attributes:
        names: how they spell it.
        knob: our setting; "" if it is another loss, or no setting of a loss.
        translate: writes its value as our call.
    """

    names: tuple[str, ...]
    knob: str
    translate: Callable[[Any], str]


def number(value: Any) -> float | None:
    """Return a number; None for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def both_bounds(value: Any) -> str:
    x = number(value)
    bounds = "(1 - ε, 1 + ε)" if x is None else f"({1 - x:g}, {1 + x:g})"
    return f"clip has the bounds of the ratio itself: clip={bounds}."


def one_bound(clip: str, unknown: str, bound: Callable[[float], float]) -> Callable[[Any], str]:
    """Return the translation of a setting that has one bound: ``clip`` shows its place, ``unknown`` its formula."""

    def translate(value: Any) -> str:
        x = number(value)
        shown = unknown if x is None else f"{bound(x):g}"
        return f"clip has both bounds of the ratio itself: clip={clip.format(shown)}."

    return translate


lower_bound = one_bound("({}, high)", "1 - ε", lambda x: 1 - x)
upper_bound = one_bound("(low, {})", "1 + ε", lambda x: 1 + x)
lower_ratio = one_bound("({}, high)", "low", lambda x: x)
upper_ratio = one_bound("(low, {})", "high", lambda x: x)


def both_epsilons(value: Any) -> str:
    pair = [number(x) for x in value] if isinstance(value, (list, tuple)) else []
    if len(pair) != 2 or None in pair:
        return both_bounds(None)
    low, high = value
    return f"clip has the bounds of the ratio itself: clip=({1 - low:g}, {1 + high:g})."


WEIGHINGS_ELSEWHERE = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum-norm": "fixed_length(L)",
    "seq_mean_token_sum_norm": "fixed_length(L)",
    "sequence_mean": "sequence_mean",
    "token_mean": "token_mean",
}
"""Values of the settings of the reduction."""

ESTIMATORS = {
    "kl": "kl=k1",
    "k1": "kl=k1",
    "mse": "kl=k2",
    "k2": "kl=k2",
    "abs": "kl=k_abs",
    "k3": "kl=k3",
    "low_var_kl": "kl=k3, and with_kl(..., kl_cap=10.0) for its bound of 10",
}
"""Values of the settings of the KL estimator."""

LOSSES = {
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo_norm",
    "robust": "robust_dpo",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "aot_pair": "aot",
    "apo_zero_unpaired": "kto, with reference_point=0",
    "ppo_clip": "ppo",
    "regular": "ppo",
    "vanilla": "ppo",
    "gpo": "gpo",
    "sft": "cross_entropy",
    "nll": "cross_entropy",
    "gspo": "gspo or gspo_token",
    "dapo": "bnpo for TRL's default bounds, dapo for the paper's",
}
"""Values of ``loss_type`` and similar settings, with the loss that they name here."""


def name_here(names: Mapping[str, str], value: Any, default: Any) -> Any:
    """Return the name here of a value elsewhere; the default for an unknown value, or one that is no string."""
    return names.get(value, default) if isinstance(value, str) else default


def weighing(value: Any) -> str:
    known = "token_mean, sequence_mean, sequence_sum_mean, token_sum or fixed_length(L)"
    return f"Pass weigh={name_here(WEIGHINGS_ELSEWHERE, value, known)}."


def estimator(value: Any) -> str:
    return f"Pass {name_here(ESTIMATORS, value, 'kl=k1, k2 or k3')}."


def another_loss(value: Any) -> str:
    name = name_here(LOSSES, value, value if isinstance(value, str) and value.isidentifier() else None)
    return f"Each loss is a function of its own: {name or 'lossfns list names them'}."


def unknown_loss(name: Any, known: Iterable[str]) -> str:
    """Return a hint for a name that no loss has here: what it is here, or the most similar known name."""
    here = name_here(LOSSES, name, None)
    return f"Here it is {here}." if here else did_you_mean(name, known)


def same_value(knob: str) -> Callable[[Any], str]:
    def translate(value: Any) -> str:
        x = number(value)
        return f"Pass {knob}={'...' if x is None else f'{x:g}'}."

    return translate


SETTINGS = (
    Setting(("epsilon", "eps_clip", "cliprange", "clip_range", "clip_eps", "clip_ratio", "ratio_clip", "clip_epsilon"),
            "clip", both_bounds),
    Setting(("epsilon_low", "clip_ratio_low", "eps_clip_low", "cliprange_low", "ratio_clip_min", "clip_low"),
            "clip", lower_bound),
    Setting(("epsilon_high", "clip_ratio_high", "eps_clip_high", "cliprange_high", "ratio_clip_max", "clip_high"),
            "clip", upper_bound),
    Setting(("eps_clip_low_high",), "clip", both_epsilons),
    Setting(("clip_low_threshold",), "clip", lower_ratio),
    Setting(("clip_high_threshold",), "clip", upper_ratio),
    Setting(("ratio_log_cap",), "log_ratio_cap", same_value("log_ratio_cap")),
    Setting(("dpo_beta", "dro_beta"), "beta", same_value("beta")),
    Setting(("clip_ratio_c", "eps_clip_c", "ratio_clip_c", "dual_clip_coef", "clip_c", "delta"),
            "dual_clip", same_value("dual_clip")),
    Setting(("beta", "kl_coef", "kl_loss_coef", "init_kl_coef", "kl_penalty_coef", "kl_ctl", "kl_coeff",
             "reference_policy_kl_penalty"), "kl_beta", same_value("kl_beta")),
    Setting(("kl_loss_type", "kl_penalty", "kl_estimator", "kl_estimator_type", "use_kl_estimator_k3"),
            "kl", estimator),
    Setting(("loss_agg_mode", "loss_reduction", "reduction", "aggregate", "token_level_loss", "loss_scale_factor"),
            "weigh", weighing),
    Setting(("simpo_gamma", "gamma_beta_ratio"), "gamma", same_value("gamma")),
    Setting(("cpo_alpha",), "nll_weight", same_value("nll_weight")),
    Setting(("lambda", "lambda_", "orpo_beta", "orpo_lambda"), "lam", same_value("lam")),
    Setting(("desirable_weight_d", "lambda_d"), "desirable_weight", same_value("desirable_weight")),
    Setting(("lambda_u",), "undesirable_weight", same_value("undesirable_weight")),
    Setting(("loss_type", "policy_loss", "policy_loss_type", "loss_mode", "loss_fn", "importance_sampling_level"), "",
            another_loss),
    Setting(("tis_imp_ratio_cap", "use_tis", "tis_cap", "vllm_importance_sampling_cap", "imp_ratio_cap",
             "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
             "vllm_importance_sampling_clip_max", "rollout_is", "is_correction_level"), "",
            lambda value: "Wrap the loss: with_tis(loss, cap=2.0)."),
    Setting(("temperature",), "", lambda value: "Pass it to target_logprobs(logits, targets, temperature=...)."),
    Setting(("scale_rewards", "norm_adv_by_std_in_grpo", "no_std_norm", "num_generations"), "",
            lambda value: 'Advantages are made before: group_advantages(rewards, groups, scale="std" or "none").'),
    Setting(("entropy_coeff", "entropy_coef", "ent_coef", "entropy_loss_coef"), "",
            lambda value: "Wrap the loss: with_entropy(loss, ...)."),
    Setting(("num_items_in_batch", "gradient_accumulation_steps"), "",
            lambda value: "Bind the count of the whole batch: loss.bind(denominator=...)."),
)  # fmt: skip


def hint(name: str, value: Any, knobs: Iterable[str]) -> str:
    """Return a hint for an unknown setting of a loss: its name here, or else the nearest of the loss's settings.

    >>> hint("epsilon", 0.2, ["clip", "weigh"])
    'clip has the bounds of the ratio itself: clip=(0.8, 1.2).'
    >>> hint("loss_agg_mode", "seq-mean-token-mean", ["clip", "weigh"])
    'Pass weigh=sequence_mean.'
    """
    known = list(knobs)
    for setting in SETTINGS:
        if name.lower() in setting.names and (not setting.knob or setting.knob in known):
            return setting.translate(value)
    return did_you_mean(name, known)
