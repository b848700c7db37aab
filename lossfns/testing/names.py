"""The names that frameworks give to the columns of a batch: parameters of losses, and fields of datums."""

from __future__ import annotations

from functools import cache

PARAMETER_NAMES = {
    "logprobs": "logprobs logprob logps logp log_probs log_prob log_ps log_p lps lp per_token_logps per_token_logprobs "
    "per_token_logp per_token_log_probs token_logps token_logprobs token_log_probs completion_logps "
    "completion_logprobs completion_log_probs response_logps response_logprobs response_log_probs action_log_probs "
    "action_logprobs target_logprobs target_logps selected_logprobs seq_logps seq_logprobs seq_log_probs "
    "sequence_logps sequence_logprobs sequence_log_probs sum_logps sum_logprobs summed_logps avg_logps average_logps "
    "logprobs_list logps_list log_probs_list",
    "weights": "mask masks loss_mask loss_masks response_mask response_masks completion_mask completion_masks "
    "action_mask action_masks token_mask token_masks valid_mask target_mask assistant_mask assistant_masks label_mask "
    "train_mask eos_mask attention_mask mask_list weights weight token_weights loss_weights weights_list",
    "lengths": "lengths length lens seq_lens seq_lengths response_lengths completion_lengths num_tokens",
    "advantages": "advantages advantage adv advs token_advantages seq_advantages sequence_advantages group_advantages "
    "advantages_list adv_list rewards reward returns",
    "labels": "labels label is_desirable desirable desirability is_chosen is_preferred is_good kto_labels kto_tags "
    "kto_tag preference_labels binary_labels",
}
"""Column → the names that frameworks use for it. Parameters and fields of these names are filled from the datums."""

POLICIES = {
    "ref": "ref reference base sft",
    "teacher": "teacher expert",
    "sampler": "sampler rollout behavior behaviour inference vllm sglang engine generator",
    "old": "old prev previous proximal prox behave mu sampling inf",
    "": "policy pi model actor new current cur student trainer learner theta",
}
"""Policy → the words before or after a name of logprobs that say whose they are: ``old_per_token_logps``."""

SIDES = {
    "chosen": "chosen preferred winner winning win w positive pos better accepted",
    "rejected": "rejected dispreferred loser losing lose l negative neg worse",
    "KL": "kl",
}
"""Side of a pair → the words that say so: ``policy_chosen_logps``. KTO's KL term has logprobs of its own."""

COLUMN_BY_NAME = {name: column for column, names in PARAMETER_NAMES.items() for name in names.split()}
POLICY_BY_WORD = {word: policy for policy, words in POLICIES.items() for word in words.split()}
SIDE_BY_WORD = {word: side for side, words in SIDES.items() for word in words.split()}


@cache
def parse_name(name: str) -> tuple[str, str, str] | None:
    """Return (side, policy, column) of a parameter or field of this name; None if it names no column."""
    if name.lower() in COLUMN_BY_NAME:
        return "", "", COLUMN_BY_NAME[name.lower()]
    words = name.lower().split("_")
    sides = [SIDE_BY_WORD[word] for word in words if word in SIDE_BY_WORD]
    policies = [POLICY_BY_WORD[word] for word in words if word in POLICY_BY_WORD]
    rest = "_".join(word for word in words if word not in SIDE_BY_WORD and word not in POLICY_BY_WORD)
    if len(sides) > 1 or not (sides or policies):
        return None
    side, policy = (*sides, "")[0], max(policies, key=len, default="")
    if not rest:  # ref_chosen, policy_rejected, chosen
        is_side = side in ("chosen", "rejected") and (bool(policies) or words == [side])
        return (side, policy, "logprobs") if is_side else None
    column = COLUMN_BY_NAME.get(rest)
    if column is None or (policies and column != "logprobs") or (column in ("labels", "advantages")):
        return None
    return side, policy, column


def column_of(name: str) -> str | None:
    """Return the column that fills a parameter or a field of this name, or None. Upper case does not matter.

    A column of one side of the pairs has the side before it.

    >>> column_of("old_per_token_logps"), column_of("response_mask"), column_of("temperature")
    ('old_logprobs', 'weights', None)
    >>> column_of("policy_chosen_logps"), column_of("reference_rejected_logps"), column_of("teacher_logprobs")
    ('chosen logprobs', 'rejected ref_logprobs', 'ref_logprobs')
    """
    parsed = parse_name(name)
    if parsed is None:
        return None
    side, policy, column = parsed
    policy = "ref" if policy == "teacher" else policy
    return " ".join(filter(None, (side, "_".join(filter(None, (policy, column))))))


def names_teacher(name: str) -> bool:
    """Return whether a parameter or field of this name holds the logprobs of a teacher."""
    return (parse_name(name) or ("", "", ""))[1] == "teacher"
