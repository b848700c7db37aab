"""Strategies draw the datums of either SDK. These tests stand apart: CI repeats them."""

from typing import Any

import pytest
from batches import sdks
from test_strategies import drawn, every_kind

from lossfns.testing.strategies import datums


@pytest.mark.parametrize("sdk", sdks(), ids=lambda sdk: sdk.__name__)
@every_kind
def test_datums_carry_their_columns_in_either_sdk(sdk: Any, options: dict[str, Any]) -> None:
    for data in drawn(datums(sdk=sdk, **options), 20):
        for datum in data:
            assert isinstance(datum, sdk.Datum)
            shape = datum.loss_fn_inputs["target_tokens"].to_numpy().shape
            assert datum.model_input.length == shape[0]
            assert {"weights", *options["reads"]} <= set(datum.loss_fn_inputs)
            assert all(x.to_numpy().shape == shape for x in datum.loss_fn_inputs.values())
