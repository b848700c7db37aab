"""``loss.compiled()``: the eager loss in every form, one graph for batches of any size, and eager where that fails."""

import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import torch
from test_tensors import PAIR_LOSSES, TOKEN_LOSSES, batch, columns_of, datums, run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import lossfns
from lossfns import Loss, LossInputError, LossWarning
from lossfns.preset import make_loss

LOSSES = [*TOKEN_LOSSES, *PAIR_LOSSES]
FEW = [lossfns.reinforce(weigh=lossfns.sequence_mean), lossfns.orpo()]
FORMS = ("datums", "padded", "packed")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Compile with a backend that counts its graphs, and needs no C++ compiler."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    yield counter
    torch.compiler.reset()


def in_form(loss: Any, form: str, given: dict[str, Tensor]) -> tuple[Tensor, list[Tensor], Any]:
    """Call the loss on a batch ``[B, T]`` in one of its forms. Packed rows are cut to unequal lengths."""
    if form == "padded":
        leaf = given["logprobs"].clone().requires_grad_()
        return run(loss.padded, [leaf], leaf, **columns_of(given))
    count = len(given["logprobs"])
    lengths = [given["logprobs"].shape[1] - i % 3 for i in range(count)]
    rows = {name: [x[:n] if x.ndim else x for x, n in zip(column, lengths)] for name, column in given.items()}
    if form == "datums":
        leaves = [x.clone().requires_grad_() for x in rows["logprobs"]]
        bound = loss.bind(**{name: x for name, x in rows.items() if name not in ("logprobs", "weights")})
        return run(bound, leaves, datums(rows["weights"]), leaves)
    flat = {name: torch.cat(x) if x[0].ndim else torch.stack(x) for name, x in rows.items()}
    leaf = flat.pop("logprobs").clone().requires_grad_()
    return run(loss.packed, [leaf], leaf, **flat, lengths=lengths)


def check_equal(loss: Loss, compiled: Any, form: str, dtype: torch.dtype) -> None:
    exact = dtype is torch.float64
    for seed in range(2):
        given = batch(loss, seed, dtype)
        eager, fused = in_form(loss, form, given), in_form(compiled, form, given)
        rtol, atol = (1e-12, 1e-14) if exact else (2e-5, 2e-6)
        torch.testing.assert_close(fused[0], eager[0], rtol=rtol, atol=atol)
        assert [x.dtype for x in fused[1]] == [x.dtype for x in eager[1]]
        narrow = {"rtol": 1e-2, "atol": 1e-4} if dtype is torch.bfloat16 else {"rtol": rtol, "atol": atol}
        torch.testing.assert_close(fused[1], eager[1], **narrow)
        assert fused[2] == pytest.approx(eager[2], rel=1e-10 if exact else 1e-4, abs=1e-12 if exact else 1e-5)


@pytest.mark.parametrize("loss", FEW, ids=repr)
def test_compiled_is_the_eager_loss(graphs: Any, loss: Loss) -> None:
    """One graph for each form."""
    compiled = replace(loss).compiled()  # a copy has a kernel of its own
    for form in FORMS:
        check_equal(loss, compiled, form, torch.float64)
    assert graphs.frame_count == 3


@pytest.mark.exhaustive
@pytest.mark.parametrize(("loss", "form"), [*zip(LOSSES, cycle(("padded", "packed")))], ids=repr)
def test_every_compiled_loss_is_the_eager_one(graphs: Any, loss: Loss, form: str) -> None:
    """Each in one form; a few in every form above."""
    check_equal(loss, replace(loss).compiled(), form, torch.float64)


def test_every_dtype_is_computed_as_in_eager(graphs: Any) -> None:
    loss = lossfns.gspo(clip=(0.9, 1.1))
    for dtype in (torch.float32, torch.bfloat16):
        check_equal(loss, loss.compiled(), "padded", dtype)


def test_a_kernel_of_the_real_compiler_is_the_eager_loss() -> None:
    """``tools/gpu_check.py``, which a test runs, has the padded form."""
    loss = lossfns.grpo(kl_beta=0.1, weigh=lossfns.sequence_mean)
    check_equal(loss, loss.compiled(), "packed", torch.float32)


# No size is compiled twice


def sized(loss: Loss, sequences: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = (sequences, length)
    columns = {name: -3 * torch.rand(shape, generator=g) for name in ("logprobs", *loss.reads) if name != "advantages"}
    numbers = {"advantages": torch.randn(sequences, generator=g)} if "advantages" in loss.reads else {}
    return {"weights": torch.ones(shape), **columns, **numbers}


def test_one_graph_for_all_sizes(graphs: Any) -> None:
    """For each form one graph, one more if a denominator is bound, and one without gradient."""
    loss = lossfns.reinforce(weigh=lossfns.sequence_mean)
    compiled = loss.compiled()
    sizes = [(4, 6), (4, 9), (10, 6), (3, 3), (64, 33), (8, 4)]
    for number, (sequences, length) in enumerate(sizes):
        given = sized(loss, sequences, length)
        for form in FORMS:
            in_form(compiled, form, given)
        in_form(compiled.bind(denominator=3.0 + number), "padded", given)
        compiled.deferred().padded(given["logprobs"].clone().requires_grad_(), **columns_of(given))
        with torch.no_grad():
            compiled.padded(given["logprobs"], **columns_of(given))
        assert graphs.frame_count == 4, (sequences, length)


def test_layouts_masks_and_slices_need_few_graphs(graphs: Any) -> None:
    """Pairs have a graph for each layout, and a slice of a wider tensor takes the same one."""
    loss = lossfns.dpo()
    for sequences, length in ((4, 6), (8, 5)):
        given = sized(loss, sequences, length)
        for layout in ("interleaved", "halves"):
            leaf = given["logprobs"].clone().requires_grad_()
            run(loss.compiled().padded, [leaf], leaf, **columns_of(given), layout=layout)
        wide = {name: torch.cat([x, x], 1)[:, 1 : length + 1] for name, x in given.items()}
        leaf = wide["logprobs"].detach().requires_grad_()
        run(loss.compiled().padded, [leaf], leaf, **columns_of(wide))
    assert graphs.frame_count == 2
    masks = given | {"weights": given["weights"].bool()}
    leaf = masks["logprobs"].clone().requires_grad_()
    run(loss.compiled().padded, [leaf], leaf, **columns_of(masks))
    assert graphs.frame_count == 3  # bytes


def test_one_sequence_or_one_token_is_a_size_of_its_own(graphs: Any) -> None:
    """torch.compile makes a graph for the size 1, once; no form of the loss reaches the limit of 8 graphs by it."""
    loss = lossfns.reinforce()
    compiled = loss.compiled()
    for repeat in range(2):
        for sequences, length in ((3, 4), (1, 4), (1, 7), (5, 1), (9, 1), (1, 1), (6, 8)):
            given = sized(loss, sequences, length)
            for form in ("padded", "packed") if length > 2 else ("padded",):
                eager, fused = in_form(loss, form, given), in_form(compiled, form, given)
                torch.testing.assert_close(fused[:2], eager[:2])
            in_form(compiled.bind(denominator=2), "padded", given)
        if repeat == 0:
            first = graphs.frame_count
    assert first == graphs.frame_count == 10


def test_many_losses_do_not_exhaust_the_limit_of_graphs(graphs: Any) -> None:
    """torch gives a function 8 graphs; here 9 losses have one each."""
    given = sized(lossfns.cross_entropy(), 4, 6)
    for _ in range(9):
        in_form(lossfns.cross_entropy().compiled(), "padded", given)
    assert graphs.frame_count == 9


# Where it cannot be compiled


def own_loss(terms: Any) -> Loss:
    return make_loss(terms, (), lossfns.token_mean)


def test_a_loss_that_cannot_be_traced_runs_eagerly_and_warns_once(graphs: Any) -> None:
    def terms(t: Any) -> Any:
        return (-t.logprobs if t.logprobs.sum().item() < 0 else t.logprobs), {}

    logprobs = torch.full((2, 3), -2.0, requires_grad=True)
    compiled = own_loss(terms).compiled()
    with pytest.warns(LossWarning, match="^the loss runs without torch.compile: .+") as warned:
        loss, _ = compiled.padded(logprobs, torch.ones(2, 3))
    assert len(warned) == 1 and "\n" not in str(warned[0].message) and warned[0].filename == __file__
    loss.backward()
    assert loss.item() == 2.0 and logprobs.grad is not None and logprobs.grad.sum().item() == -1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled.padded(logprobs, torch.ones(2, 3))


def test_a_loss_with_learnable_tensors_runs_eagerly_so_that_they_get_their_gradient(graphs: Any) -> None:
    scale = torch.nn.Parameter(torch.tensor(2.0))
    logprobs = torch.full((2, 3), -2.0, requires_grad=True)
    compiled = own_loss(lambda t: (-scale * t.logprobs, {})).compiled()
    with torch.no_grad():
        assert compiled.padded(logprobs, torch.ones(2, 3))[0] == 4.0
    for given in (logprobs, logprobs.detach()):
        scale.grad = None
        compiled = own_loss(lambda t: (-scale * t.logprobs, {})).compiled()
        with pytest.warns(LossWarning, match="without torch.compile: the loss has learnable tensors of its own"):
            loss, _ = compiled.padded(given, torch.ones(2, 3))
        loss.backward()
        assert scale.grad is not None and scale.grad.item() == 2.0
    assert logprobs.grad is not None and logprobs.grad.sum().item() == -2.0


def test_tangents_of_forward_mode_pass_through() -> None:
    with torch.autograd.forward_ad.dual_level():
        logprobs = torch.autograd.forward_ad.make_dual(torch.full((2, 3), -2.0), torch.ones(2, 3))
        loss, _ = lossfns.cross_entropy().compiled().deferred().padded(logprobs, torch.ones(2, 3))
        assert torch.autograd.forward_ad.unpack_dual(loss).tangent == -1.0


def test_a_scaled_gradient_of_float16_is_that_of_the_eager_loss(graphs: Any) -> None:
    """The usual scale, 65536, is inf in float16, and the gradient without it is 0."""
    loss, gradients = lossfns.reinforce(), []
    for each in (loss, loss.compiled()):
        logprobs = torch.full((2, 500), -2.0, dtype=torch.float16, requires_grad=True)
        total, _ = each.padded(logprobs, torch.ones(2, 500), advantages=torch.full((2,), 1e-5))
        (65536 * total).backward()
        gradients.append(logprobs.grad)
    assert gradients[1].dtype is torch.float16 and gradients[1].all()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=0)


def test_what_cannot_be_compiled_leaves_the_other_forms_compiled(graphs: Any) -> None:
    """Without a gradient the term can be traced."""

    def terms(t: Any) -> Any:
        return -t.logprobs * (2.0 if torch.is_grad_enabled() and t.logprobs.sum().item() < 0 else 1.0), {}

    compiled = own_loss(terms).compiled()
    logprobs = torch.full((2, 3), -2.0)
    with pytest.warns(LossWarning, match="runs without torch.compile"):
        compiled.padded(logprobs.clone().requires_grad_(), torch.ones(2, 3))
    with torch.no_grad():
        assert compiled.padded(logprobs, torch.ones(2, 3))[0].item() == 2.0
    assert graphs.frame_count == 1


def test_an_error_of_the_loss_itself_comes_through(graphs: Any) -> None:
    def reduced(t: Any) -> Any:
        return (-t.logprobs).sum(), {}

    def broken(t: Any) -> Any:
        raise KeyError("mine")

    given = torch.full((2, 3), -2.0, requires_grad=True), torch.ones(2, 3)
    with pytest.raises(LossInputError, match="Do not reduce it"):
        own_loss(reduced).compiled().padded(*given)
    with pytest.raises(KeyError, match="mine"):
        own_loss(broken).compiled().padded(*given)
    compiled = lossfns.cross_entropy().compiled()
    with pytest.raises(LossInputError, match=r"datum\[0\].logprobs\[0\]: expected a finite number"):
        compiled.padded(torch.full((2, 3), torch.nan, requires_grad=True), torch.ones(2, 3))
    assert compiled.padded(*given)[1]["loss"] == 2.0 and graphs.frame_count == 1


WITHOUT_COMPILER = """
import warnings, torch, lossfns
logprobs = torch.full((2, 3), -2.0, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loss, metrics = lossfns.cross_entropy().compiled().padded(logprobs, torch.ones(2, 3))
loss.backward()
print(loss.item(), metrics["nll"], logprobs.grad.sum().item())
print([str(w.message) for w in caught if issubclass(w.category, lossfns.LossWarning)])
"""


def test_without_a_compiler_it_is_eager_and_says_so(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    ran = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], capture_output=True, text=True, check=True)
    numbers, messages = ran.stdout.splitlines()
    assert numbers == "2.0 2.0 -1.0"
    assert messages[2:].startswith("the loss runs without torch.compile: ") and "compiler" in messages
    assert messages.count("without torch.compile") == 1


# Where it is called


def test_grad_modes_autocast_and_threads(graphs: Any) -> None:
    loss = lossfns.reinforce()
    given = batch(loss, dtype=torch.float32)
    compiled, expected = loss.compiled(), in_form(loss, "padded", given)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu")):
        with mode:
            value, metrics = compiled.padded(given["logprobs"], **columns_of(given))
        torch.testing.assert_close(value, expected[0])
        assert metrics == pytest.approx(expected[2], rel=1e-5)
    found: list[Any] = []

    def work() -> None:
        found.extend(in_form(compiled, "padded", given) for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    for value, gradients, _ in found:
        torch.testing.assert_close([value, *gradients], [expected[0], *expected[1]])


def test_backward_twice_and_the_metric_of_the_gradient(graphs: Any) -> None:
    loss = lossfns.dro()
    given = batch(loss)
    leaf = given["logprobs"].clone().requires_grad_()
    value, metrics = loss.compiled().bind(grad_l1=True).padded(leaf, **columns_of(given))
    (2 * value).backward(retain_graph=True)
    doubled = leaf.grad
    leaf.grad = None
    value.backward()
    torch.testing.assert_close(doubled, 2 * leaf.grad)
    assert metrics["grad_l1"] == pytest.approx(leaf.grad.abs().sum().item())
    value, _ = loss.compiled().padded(leaf, **columns_of(given))
    with pytest.raises(LossInputError, match="without compiled"):
        torch.autograd.grad(value, leaf, create_graph=True)


def test_a_compiled_loss_is_compiled_once_and_never_wrapped(graphs: Any) -> None:
    loss = lossfns.ppo()
    given = batch(loss)
    assert loss.compiled().compiled().measure is loss.compiled().measure
    assert loss.bind(denominator=2).compiled().divisor == 2
    with pytest.raises(LossInputError, match="Wrap the loss first, and call bind"):
        lossfns.with_kl(loss.compiled())
    again = pickle.loads(pickle.dumps(lossfns.cross_entropy().compiled()))
    assert again.padded(given["logprobs"], given["weights"])[1]["nll"] > 0


def test_it_is_a_part_of_a_compiled_step_and_of_a_transformation() -> None:
    loss = lossfns.ppo()
    given = batch(loss)
    eager = in_form(loss, "padded", given)
    compiled = loss.compiled().deferred()

    def step(logprobs: Tensor) -> Tensor:
        return compiled.padded(logprobs, **columns_of(given))[0]

    leaf = given["logprobs"].clone().requires_grad_()
    torch.compile(step, fullgraph=True, backend="aot_eager")(leaf).backward()
    torch.testing.assert_close(leaf.grad, eager[1][0])
    torch.testing.assert_close(torch.func.grad(step)(given["logprobs"]), eager[1][0])
    assert loss.kernel is loss.compiled().measure and not loss.kernel.failed
