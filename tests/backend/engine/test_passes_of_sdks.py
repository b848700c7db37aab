"""A request with the datums of an SDK has the same gradient in every pass. It stands apart: CI repeats it."""

from batches import sdks
from test_passes import assert_cut_changes_nothing, rl_data


def test_datums_of_an_sdk_are_cut_alike() -> None:
    for sdk in sdks():
        data = rl_data("ppo", sdk)
        assert_cut_changes_nothing(lambda c, data=data: c.forward_backward(data, "ppo").result(), data)
