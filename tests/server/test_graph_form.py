"""The form of an uploaded graph: nodes, inputs and what is returned."""

from typing import Any

import pytest
import torch
from graphs import INPUTS, PLACEHOLDERS, ROWS, X, function, method, node, refusal, returned, whole

from lossfns import LossInputError
from lossfns.server.graph import DEEPEST, MOST_INPUTS, MOST_ITEMS, MOST_METRICS, MOST_NODES, rebuild


def test_a_graph_of_another_form_is_refused_with_the_place() -> None:
    nested: Any = X
    for _ in range(DEEPEST + 1):
        nested = [nested]
    deep: Any = X
    for _ in range(300):
        deep = {"tuple": [deep]}
    total = method("sum", X, name="total")
    end = returned({"ref": "total"})
    attacks: dict[str, tuple[Any, str]] = {
        "no graph": (None, "graph: expected a record of format, nodes"),
        "a list": ([], "graph: expected a record"),
        "another format": ({"format": 2, "nodes": [total, end]}, "graph.format: expected 1"),
        "a format that is true": ({"format": True, "nodes": [total, end]}, "graph.format: expected 1"),
        "code": ({"format": 1, "nodes": [], "code": "import os"}, "'code'"),
        "no nodes": ({"format": 1, "nodes": []}, "graph.nodes: expected a list of 1"),
        "nodes of text": ({"format": 1, "nodes": "abc"}, "graph.nodes: expected a list"),
        "too many nodes": (whole(*[function("torch.exp", X)] * MOST_NODES), f"got {MOST_NODES + 4}"),
        "a node of text": ({"format": 1, "nodes": ["a"]}, "nodes[0]: expected a record"),
        "a node with code": ({"format": 1, "nodes": [{**total, "code": "1"}]}, "'code'"),
        "a node without a name": ({"format": 1, "nodes": [{"op": "output", "target": "output"}]}, "nodes[0]: expected"),
        "a name that is a number": (whole({**total, "name": 5}), "nodes[2].name: expected at most 128"),
        "a long name": (whole({**total, "name": "a" * 999}), "nodes[2].name: expected at most 128"),
        "a long target": (whole({**total, "target": "a" * 99_999}), "nodes[2].target: expected at most 128"),
        "a target that is a list": (whole({**total, "target": ["sum"]}), "nodes[2].target: expected at most 128"),
        "a name with a line": (whole({**total, "name": "a\nroot"}), r"nodes[2].name: expected at most 128 letters"),
        "a target with a NUL": (whole({**total, "target": "sum\0"}), r"got 'sum\x00'"),
        "a target with a line": (whole({**total, "target": "sum\n"}), r"got 'sum\n'"),
        "a target in other letters": (whole({**total, "target": "ѕum"}), "got 'ѕum'"),
        "an attribute of lists too deep": (whole(function("getattr", nested, "shape")), "lists of at most"),
        "a loss of tuples too deep": (whole(loss=deep), "loss: expected the result of a node"),
        "a name twice": (whole(method("exp", X), method("exp", X)), "nodes[3] y (exp): expected a name of its own"),
        "the name of an input": (whole(method("exp", X, name="weights")), "that of an earlier node"),
        "arguments that are no list": (whole({**total, "args": {"0": X}}), "a list of arguments"),
        "keywords that are no dict": (whole({**total, "kwargs": [X]}), "a list of arguments"),
        "a module": (whole(node("call_module", "layer", X)), "got 'call_module'"),
        "a captured tensor": (whole(node("get_attr", "weight")), "got 'get_attr'"),
        "an operation that is none": (whole(node("exec", "print")), "got 'exec'"),
        "a third placeholder": (whole(node("placeholder", "share")), "placeholders logprobs, weights in order"),
        "a placeholder after a node": ({"format": 1, "nodes": [PLACEHOLDERS[0], total, PLACEHOLDERS[1]]}, "in order"),
        "placeholders in another order": ({"format": 1, "nodes": [*PLACEHOLDERS[::-1], total, end]}, "in order"),
        "a placeholder too few": ({"format": 1, "nodes": [PLACEHOLDERS[0], total, end]}, "with 2 placeholders"),
        "a default": ({"format": 1, "nodes": [{**PLACEHOLDERS[0], "args": [5]}]}, "without defaults"),
        "no output": ({"format": 1, "nodes": [*PLACEHOLDERS, total]}, "an output as the last node"),
        "two outputs": ({"format": 1, "nodes": [*PLACEHOLDERS, total, end, end]}, "an output after all other nodes"),
        "lists too deep": (whole(function("torch.cat", nested)), f"lists of at most {DEEPEST} levels"),
        "tuples too deep": (whole(function("torch.cat", deep)), f"lists of at most {DEEPEST} levels"),
        "a list too long": (whole(function("torch.cat", [X] * MOST_ITEMS)), f"at most {MOST_ITEMS} arguments"),
        "a returned tensor alone": (whole()["nodes"][:3], "graph: expected a record"),
    }
    for name, (graph, expected) in attacks.items():
        message = refusal(graph)
        assert expected in message, (name, message)


def test_only_a_loss_and_named_metrics_of_one_number_are_returned() -> None:
    total = method("sum", X, name="total")
    count = method("long", {"ref": "total"}, name="count")
    shape = function("getattr", X, "shape", name="shape")
    one = {"ref": "total"}

    def with_output(*args: Any, **kwargs: Any) -> dict[str, Any]:
        output = {"op": "output", "name": "output", "target": "output", "args": [*args], "kwargs": kwargs}
        return {"format": 1, "nodes": [*PLACEHOLDERS, total, count, shape, output]}

    pair = lambda loss, metrics: with_output({"tuple": [loss, metrics]})  # noqa: E731
    many = {f"custom/m{i}:sum": one for i in range(MOST_METRICS + 1)}
    for graph, expected in (
        (with_output(), "expected (loss, metrics)"),
        (with_output(one), "expected (loss, metrics)"),
        (with_output({"tuple": [one]}), "expected (loss, metrics)"),
        (with_output({"tuple": [one, {"dict": {}}]}, one), "expected (loss, metrics)"),
        (with_output({"tuple": [one, {"dict": {}}]}, hidden=one), "expected (loss, metrics)"),
        (pair(one, one), "a dict of at most"),
        (pair(one, {"dict": []}), "a dict of at most"),
        (pair(one, {"dict": many}), f"a dict of at most {MOST_METRICS} metrics"),
        (pair(1.0, {"dict": {}}), "loss: expected the result of a node, got 1.0"),
        (pair("total", {"dict": {}}), "loss: expected the result of a node, got 'total'"),
        (pair({"tuple": [one]}, {"dict": {}}), "loss: expected the result of a node"),
        (pair(X, {"dict": {}}), "loss: expected a 0-d tensor of floats, got shape (4,)"),
        (pair({"ref": "count"}, {"dict": {}}), "of torch.int64"),
        (pair({"ref": "shape"}, {"dict": {}}), "got a Size"),
        (pair(one, {"dict": {"custom/a:sum": 1.0}}), "metrics['custom/a:sum']: expected the result of a node"),
        (pair(one, {"dict": {"custom/a:sum": X}}), "metrics['custom/a:sum']: expected a 0-d tensor, got shape (4,)"),
        (pair(one, {"dict": {"custom/a:sum": {"ref": "shape"}}}), "got a Size"),
    ):
        assert expected in refusal(graph), (expected, refusal(graph))
    names = (
        "loss:sum",
        "a",
        "custom/a",
        "custom/a:max",
        "custom/A:sum",
        "custom/:sum",
        "custom/a:sum\n",
        "custom/a b:sum",
    )
    for name in (*names, "custom/" + "a" * 65 + ":sum", "loss:sum/custom/a:sum"):
        assert "metrics named custom/" in refusal(pair(one, {"dict": {name: one}})), name
    fn = rebuild(pair(one, {"dict": {"custom/a:sum": one, "custom/b:mean": {"ref": "count"}}}), INPUTS)
    assert fn(*ROWS)[1] == {"custom/a:sum": torch.tensor(-6.5), "custom/b:mean": torch.tensor(-6)}


def test_inputs_are_named_once_have_a_rank_and_come_with_it() -> None:
    graph = whole()
    lp, w = INPUTS
    for inputs, expected in (
        (None, "inputs: expected a list"),
        ("logprobs", "inputs: expected a list"),
        ([], "inputs: expected a list"),
        ([lp, *({"name": f"x{i}", "rank": 1} for i in range(MOST_INPUTS))], "inputs: expected a list of 1 to"),
        ([lp, "weights"], "inputs[1]: expected a record of name, rank"),
        ([lp, {**w, "default": 1}], "'default'"),
        ([lp, {**w, "name": "__class__.x"}], "inputs[1].name"),
        ([lp, {**w, "name": ["a"]}], "inputs[1].name"),
        ([lp, lp], "inputs[1].name"),
        ([lp, {**w, "rank": 3}], "inputs[1].rank: expected 0, 1 or 2, got 3"),
        ([lp, {**w, "rank": True}], "inputs[1].rank"),
        ([w, lp], "inputs[0]: expected logprobs"),
        ([{**lp, "rank": 0}, w], "inputs[0]: expected logprobs, of rank 1 or 2"),
    ):
        assert expected in refusal(graph, inputs), (expected, refusal(graph, inputs))
    fn = rebuild(graph, INPUTS)
    for rows, expected in (
        (ROWS[:1], "inputs: expected 2 tensors"),
        ((*ROWS, ROWS[0]), "inputs: expected 2 tensors"),
        ((ROWS[0], ROWS[1][None]), "weights: expected a tensor of 1 dimensions, got 2"),
        ((ROWS[0], 1.0), "weights: expected a tensor of 1 dimensions, got a float"),
    ):
        with pytest.raises(LossInputError) as error:
            fn(*rows)
        assert expected in str(error.value)
