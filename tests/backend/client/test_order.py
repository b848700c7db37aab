"""Futures and order: many threads on one client, and many readers of one future."""

import asyncio
import gc
import itertools
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from tiny import client, gradients, same, texts, weights
from torch import Tensor

import lossfns
from lossfns import LossInputError
from lossfns.backend import (
    AdamParams,
    APIFuture,
    ForwardBackwardOutput,
    LocalSamplingClient,
    LocalTrainingClient,
    futures,
)
from lossfns.backend.futures import NotRun
from lossfns.backend.types import GetInfoResponse, LoadWeightsResponse, OptimStepResponse, SaveResponse

ADAM = AdamParams(learning_rate=1e-2)
THREADS = 8


def half_squared(data: Any, logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return torch.stack([lp.square().sum() for lp in logprobs_list]).sum() / 2, {}


def bad_data() -> list[Any]:
    """One target for two tokens."""
    fields = {"target_tokens": lossfns.TensorData([2], "int64")}
    return [lossfns.Datum(lossfns.ModelInput.from_ints([1, 2]), fields)]


# Many threads, one client


class Broken(Exception):
    """The error of a user's own loss."""


def breaks(data: Any, logprobs_list: list[Tensor]) -> Any:
    logprobs_list[0].sum().backward()
    raise Broken


Order = tuple[str, int]
"""A kind of request, and the seed of what it is about."""


def perform(c: LocalTrainingClient, order: Order, folder: Path) -> Any:
    """Make the request and return its future, or the answer that the client returns at once."""
    kind, seed = order
    rng = Random(seed)
    match kind:
        case "forward":
            return c.forward(texts(rng), "cross_entropy")
        case "builtin":
            return c.forward_backward(texts(rng), "cross_entropy")
        case "custom":
            return c.forward_backward_custom(texts(rng), half_squared)
        case "ours":
            return c.forward_backward_custom(texts(rng), lossfns.cross_entropy(weigh=lossfns.token_sum))
        case "step":
            return c.optim_step(ADAM)
        case "save":
            return c.save_state(folder / f"{seed}.npz")
        case "save weights":
            return c.save_weights_for_sampler(folder / f"weights-{seed}.npz")
        case "load":
            return c.load_state_with_optimizer(folder / "start.npz")
        case "load weights":
            return c.load_state(folder / f"weights-{seed}.npz")
        case "info":
            return c.get_info()
        case "sampler":
            return c.save_weights_and_get_sampling_client()
        case "bad data":
            return c.forward_backward(bad_data(), "cross_entropy")
        case "bad loss":
            return c.forward_backward_custom(texts(rng), breaks)
    raise AssertionError(kind)


SHARES = {
    "forward": 30,
    "builtin": 40,
    "custom": 40,
    "ours": 30,
    "step": 30,
    "save": 2,
    "save weights": 10,
    "load": 1,
    "load weights": 4,
    "info": 10,
    "sampler": 8,
    "bad data": 2,
    "bad loss": 2,
}


class Submitted(NamedTuple):
    """A request, its number in the worker's order, the beginning and end of its submission, and its outcome."""

    number: int
    order: Order
    began: int
    ended: int
    outcome: Any


class Watch:
    """Numbers requests in the order of the worker's queue, and logs the numbers in the order of execution."""

    def __init__(self, c: LocalTrainingClient) -> None:
        self.executed: list[int] = []
        self.numbers = itertools.count()
        self.last: dict[int, int] = {}
        pool = c._worker.thread
        submit = pool.submit

        def numbered(request: Callable[..., Any], *args: Any) -> Any:
            number = self.last[threading.get_ident()] = next(self.numbers)

            def run() -> Any:
                self.executed.append(number)
                return request(*args)

            return submit(run)

        pool.submit = numbered  # type: ignore[method-assign, assignment]


class Crowd:
    """Threads that send requests to one client and read results at once, late, together, in an event loop, or never."""

    def __init__(self, c: LocalTrainingClient, folder: Path, requests: int) -> None:
        self.client, self.folder, self.requests, self.watch = c, folder, requests, Watch(c)
        self.clock = itertools.count()
        self.taken: list[list[Submitted]] = [[] for _ in range(THREADS)]
        self.common: list[APIFuture[Any]] = []
        self.read: list[BaseException] = []
        self.raised: list[BaseException] = []
        self.crashed: list[str] = []

    def run(self) -> None:
        threads = [threading.Thread(target=self.guarded, args=(i,), daemon=True) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
        assert not self.crashed, self.crashed[0]
        while self.call(self.client.get_info) is None:
            pass

    def guarded(self, i: int) -> None:
        try:
            self.one_thread(i)
        except BaseException:
            self.crashed.append(traceback.format_exc())

    def one_thread(self, i: int) -> None:
        rng = Random(i)
        late: list[APIFuture[Any]] = []
        saved: list[int] = []
        for j in range(self.requests):
            (kind,) = rng.choices(list(SHARES), list(SHARES.values()))
            seed = i * self.requests + j
            if kind == "save weights":
                saved.append(seed)
            outcome = self.submit(i, (kind, rng.choice(saved) if kind == "load weights" and saved else seed))
            if not isinstance(outcome, APIFuture):
                continue
            match rng.choices(("now", "loop", "common", "late", "never"), (4, 3, 2, 2, 1))[0]:
                case "now":
                    self.take(outcome)
                case "loop":
                    asyncio.run(self.gather([outcome, *late[-2:]]))
                case "common":
                    self.common.append(outcome)
                    self.take(rng.choice(self.common))
                case "late":
                    late.append(outcome)
        for future in late:
            self.take(future)

    def submit(self, i: int, order: Order) -> Any:
        """Repeat the call until the request is queued: it may raise an unread error of another request instead."""
        while True:
            began = next(self.clock)
            outcome = self.call(lambda: perform(self.client, order, self.folder))
            if outcome is not None:
                number = self.watch.last[threading.get_ident()]
                self.taken[i].append(Submitted(number, order, began, next(self.clock), outcome))
                return outcome

    def call(self, method: Callable[[], Any]) -> Any:
        try:
            return method()
        except (LossInputError, Broken) as error:
            self.raised.append(error)
            return None

    def take(self, future: APIFuture[Any]) -> None:
        try:
            future.result(60)
        except (LossInputError, Broken) as error:
            self.read.append(error)

    async def gather(self, several: list[APIFuture[Any]]) -> None:
        results = await asyncio.gather(*(future.result_async(60) for future in several), return_exceptions=True)
        self.read += [result for result in results if isinstance(result, BaseException)]


def comparable(outcome: Any, folder: Path) -> Any:
    """Return the outcome of a request in a form that can be compared."""
    if isinstance(outcome, APIFuture):
        try:
            outcome = outcome.result(60)
        except (LossInputError, Broken) as error:
            return type(error), str(error).replace(str(folder), "")
    match outcome:
        case ForwardBackwardOutput():
            return outcome.metrics, [output["logprobs"].data for output in outcome.loss_fn_outputs]
        case LocalSamplingClient():
            return outcome.compute_logprobs(lossfns.ModelInput.from_ints([1, 2, 3, 4])).result()
        case SaveResponse() | LoadWeightsResponse():
            return Path(outcome.path).name
        case GetInfoResponse():
            return outcome.steps
    assert isinstance(outcome, OptimStepResponse)
    return outcome.metrics["grad_norm"]


@pytest.mark.parametrize(
    "count", [pytest.param(50, marks=pytest.mark.repeated), pytest.param(70, marks=pytest.mark.exhaustive)]
)
def test_many_threads_act_in_the_order_of_submission_and_as_one_thread_would(tmp_path: Path, count: int) -> None:
    folders = [tmp_path / "many", tmp_path / "one"]
    many, one = (client(), client())
    for c, folder in zip((many, one), folders):
        c.save_state(folder / "start.npz").result()
    crowd = Crowd(many, folders[0], count)
    crowd.run()

    taken = sorted(request for requests in crowd.taken for request in requests)
    assert len(taken) == THREADS * count
    assert crowd.watch.executed == list(range(len(crowd.watch.executed)))  # each once, as numbered
    for requests in crowd.taken:
        assert [r.number for r in requests] == sorted(r.number for r in requests)
    latest = 0
    for request in taken:
        assert request.ended > latest, "a request overtook one that had been submitted before it"
        latest = max(latest, request.began)

    told_by_many = [comparable(outcome, folders[0]) for *_, outcome in taken]
    for (number, order, *_), was in zip(taken, told_by_many):
        if not isinstance(was, tuple) or was[0] is not NotRun:
            assert was == comparable(perform(one, order, folders[1]), folders[1]), (number, order)
    assert same(weights(many), weights(one)) and same(gradients(many), gradients(one))
    assert many.get_info().steps == one.get_info().steps
    stepped = [was for (_, order, *_), was in zip(taken, told_by_many) if order[0] == "step" and isinstance(was, float)]
    assert len(set(stepped)) > count * 30 / 200

    failed = [r.outcome.future().exception() for r in taken if isinstance(r.outcome, APIFuture)]
    errors = {id(error) for error in failed if error is not None}
    not_run = {id(error) for error in failed if isinstance(error, NotRun)}
    assert errors - not_run <= {id(error) for error in (*crowd.read, *crowd.raised)} <= errors
    assert len({id(error) for error in crowd.raised}) == len(crowd.raised) > 0


# Every reader of a future


class Gate:
    """A loss that signals its beginning and waits for permission to end."""

    def __init__(self) -> None:
        self.begun, self.end = threading.Event(), threading.Event()

    def __call__(self, data: Any, logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        self.begun.set()
        assert self.end.wait(60)
        return half_squared(data, logprobs_list)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.end.set()


def test_threads_and_coroutines_that_wait_get_the_same_result(gate: Gate) -> None:
    c = client()
    future = c.forward_backward_custom(texts(Random(1)), gate)
    results: list[Any] = []

    async def wait_thrice() -> None:
        results.extend(await asyncio.gather(future, future.result_async(60), asyncio.create_task(future.coroutine())))

    waiters = [threading.Thread(target=lambda: results.append(future.result(60))) for _ in range(4)]
    waiters += [threading.Thread(target=lambda: asyncio.run(wait_thrice())) for _ in range(2)]
    for waiter in waiters:
        waiter.start()
    gate.end.set()
    for waiter in waiters:
        waiter.join(60)
    assert len(results) == 10 and all(result is future.result() for result in results)


def test_one_that_gives_up_leaves_the_request_as_it_is(gate: Gate) -> None:
    c = client()
    future = c.forward_backward_custom(texts(Random(1)), gate)
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)

    async def impatient() -> None:
        with pytest.raises(TimeoutError):
            await future.result_async(timeout=0.01)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await future
        cancelled, patient = asyncio.create_task(future.coroutine()), asyncio.create_task(future.coroutine())
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert not patient.done()
        gate.end.set()
        assert await patient is future.result()

    asyncio.run(impatient())
    assert any(g is not None for g in gradients(c))


def test_a_loop_that_ends_before_the_request_does_no_harm(gate: Gate) -> None:
    c = client()
    future = c.forward_backward_custom(texts(Random(1)), gate)

    async def leave() -> None:
        asyncio.get_running_loop().create_task(future.coroutine())
        await asyncio.sleep(0)

    asyncio.run(leave())
    gate.end.set()
    assert future.result(60).metrics


def test_an_error_has_the_same_traceback_for_every_reader() -> None:
    c = client()
    future = c.forward_backward_custom(texts(Random(1)), breaks)

    def frames() -> list[str]:
        with pytest.raises(Broken) as caught:
            future.result()
        return [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]

    first = frames()
    assert "breaks" in first and all(frames() == first for _ in range(5))
    before = threading.Thread(target=frames)
    before.start()
    before.join()
    assert frames() == first

    async def awaited() -> None:
        with pytest.raises(Broken):
            await future

    asyncio.run(awaited())
    assert frames() == first


def test_an_error_that_nobody_read_is_raised_once_and_with_its_own_traceback() -> None:
    c = client()
    c.forward_backward(texts(Random(1)), "cross_entropy").result()
    before = gradients(c)
    failed = c.forward_backward_custom(texts(Random(1)), breaks)
    wait_for(lambda: failed.future().done())
    with pytest.raises(Broken) as caught:
        c.forward(texts(Random(2)), "cross_entropy")
    assert "breaks" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert c.forward(texts(Random(2)), "cross_entropy").result().metrics
    assert same(gradients(c), before)
    with pytest.raises(Broken):
        failed.result()  # a late reader gets it all the same
    assert c.get_info().steps == 0


def test_each_of_two_errors_that_nobody_read_is_raised_by_a_call_of_its_own(gate: Gate) -> None:
    c = client()
    c.forward_backward_custom(texts(Random(1)), gate)
    bad = [c.forward_backward(bad_data(), "cross_entropy"), c.forward_backward_custom(texts(Random(1)), breaks)]
    gate.end.set()
    wait_for(lambda: bad[1].future().done())
    with pytest.raises(LossInputError, match="target_tokens"):
        c.get_info()
    with pytest.raises(Broken):
        c.get_info()
    assert c.get_info().steps == 0


@pytest.mark.parametrize("loop", [False, True])
def test_an_error_that_somebody_waits_for_is_theirs_alone(gate: Gate, loop: bool) -> None:
    """A thread that reads its own requests gets no errors of another thread, which reads its own."""
    c = client()
    future = c.forward_backward_custom(texts(Random(1)), raising_after(gate))
    read: list[BaseException] = []
    value = future._value

    def late() -> Any:
        """Delay the reader between waking up and reading."""
        time.sleep(0.2)
        return value()

    future._value = late  # type: ignore[method-assign]

    def reader() -> None:
        try:
            asyncio.run(future.coroutine()) if loop else future.result(60)
        except Broken as error:
            read.append(error)

    thread = threading.Thread(target=reader)
    thread.start()
    wait_for(lambda: bool(future._readers))
    gate.end.set()
    wait_for(lambda: future.future().done())
    assert c.get_info().steps == 0
    thread.join(60)
    assert len(read) == 1


def raising_after(gate: Gate) -> Callable[..., Any]:
    def loss_fn(data: Any, logprobs_list: list[Tensor]) -> Any:
        gate(data, logprobs_list)
        raise Broken

    return loss_fn


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


UNREAD = """
import lossfns
from lossfns.backend import Decoder, LocalTrainingClient

def loses_its_way(data, logprobs_list):
    raise KeyError("a loss of the user's own")

model = Decoder(vocab_size=31, dim=8, layers=1, heads=2, kv_heads=1, hidden=12)
client = LocalTrainingClient(model, device="cpu")
data = [lossfns.datum_from_tokens([1, 2, 3], prompt_length=1)]
client.forward_backward_custom(data, loses_its_way)
print("the end of the program")
"""


@pytest.mark.parametrize(
    "hold", ["", pytest.param("del client; import gc; gc.collect()", marks=pytest.mark.exhaustive)]
)
def test_an_error_that_is_unread_at_the_end_of_the_program_is_logged(hold: str) -> None:
    ran = subprocess.run([sys.executable, "-c", UNREAD + hold], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and "the end of the program" in ran.stdout
    assert ran.stderr.count("nobody read its error") == 1
    assert "in loses_its_way" in ran.stderr and 'KeyError: "a loss of the user\'s own"' in ran.stderr


def test_standard_tools_take_the_standard_future() -> None:
    c = client()
    standard = [c.forward_backward(texts(Random(i)), "cross_entropy").future() for i in range(4)]
    assert {id(future) for future in standard} == {id(future) for future in as_completed(standard, 60)}


def test_a_request_that_is_cancelled_before_it_begins_is_not_run(gate: Gate) -> None:
    """The client stays usable. A step behind it is refused, since a part of its gradient is missing."""
    c = client()
    first = c.forward_backward_custom(texts(Random(1)), gate)
    second = c.forward_backward_custom(texts(Random(2)), half_squared)
    step = c.optim_step(ADAM)
    assert gate.begun.wait(60)
    assert second.future().cancel() and not first.future().cancel()
    gate.end.set()
    with pytest.raises(CancelledError):
        second.result()
    with pytest.raises(NotRun, match="requests before it that succeed"):
        step.result()
    alone = client()
    alone.forward_backward_custom(texts(Random(1)), half_squared).result()
    assert same(gradients(c), gradients(alone))
    assert c.optim_step(ADAM).result().metrics["grad_norm"] > 0


# Order within one client


def test_a_step_behind_a_request_that_fails_is_refused_and_the_gradient_before_is_intact(gate: Gate) -> None:
    c = client()
    c.forward_backward(texts(Random(1)), "cross_entropy").result()
    before, held = gradients(c), weights(c)
    blocked = c.forward(texts(Random(3)), "cross_entropy")
    gated = c.forward_backward_custom(texts(Random(2)), raising_after(gate))
    step, another = c.optim_step(ADAM), c.optim_step(ADAM)
    gate.end.set()
    with pytest.raises(NotRun, match="Broken"):
        step.result()
    with pytest.raises(NotRun, match="Broken"):
        another.result()
    with pytest.raises(Broken):
        gated.result()
    assert blocked.result().metrics
    assert same(gradients(c), before) and same(weights(c), held)
    c.optim_step(ADAM).result()
    assert c.get_info().steps == 1


def test_a_step_that_arrives_while_a_failure_is_being_noted_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the error lost: the call raises it, or the step is refused because of it."""
    c, noting, clear_frames = client(), threading.Event(), futures.clear_frames
    c.forward_backward(texts(Random(1)), "cross_entropy").result()

    def slowly(error: BaseException) -> None:
        noting.set()
        time.sleep(0.1)
        clear_frames(error)

    monkeypatch.setattr(futures, "clear_frames", slowly)
    failed = c.forward_backward_custom(texts(Random(1)), breaks)
    assert noting.wait(60)
    with pytest.raises((Broken, NotRun)):
        c.optim_step(ADAM).result(60)
    with pytest.raises(Broken):
        failed.result(60)
    assert c.get_info().steps == 0


def test_a_failure_that_has_been_read_is_counted_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that the reader of the error submits at once runs, however long it takes to note the error."""
    c, record = client(), futures.GradientFailures.record
    c.forward_backward(texts(Random(1)), "cross_entropy").result()

    def slowly(*args: Any) -> None:
        time.sleep(0.1)
        record(*args)

    monkeypatch.setattr(futures.GradientFailures, "record", slowly)
    with pytest.raises(Broken):
        c.forward_backward_custom(texts(Random(1)), breaks).result(60)
    assert c.optim_step(ADAM).result(60).metrics["grad_norm"] > 0


def test_a_failure_between_the_check_for_errors_and_the_queue_stops_the_step_too(gate: Gate) -> None:
    c = client()
    c.forward_backward(texts(Random(1)), "cross_entropy").result()
    failed = c.forward_backward_custom(texts(Random(1)), raising_after(gate))
    worker = c._worker
    check = worker._raise_unread_failure

    def check_too_early() -> None:
        check()
        gate.end.set()
        wait_for(lambda: worker._failures.count > 0)

    worker._raise_unread_failure = check_too_early  # type: ignore[method-assign]
    with pytest.raises(NotRun):
        c.optim_step(ADAM).result(60)
    with pytest.raises(Broken):
        failed.result(60)


def test_a_step_that_is_submitted_once_the_failure_is_known_runs(gate: Gate) -> None:
    """Even while a step that will be refused because of it is still in the queue."""
    c = client()
    bad = c.forward_backward(bad_data(), "cross_entropy")
    refused = c.optim_step(ADAM)
    blocked = c.forward_backward_custom(texts(Random(1)), gate)
    with pytest.raises(LossInputError):
        bad.result()
    step = c.optim_step(ADAM)
    gate.end.set()
    assert step.result().metrics["grad_norm"] > 0 and blocked.result()
    with pytest.raises(LossInputError):
        refused.result()


def test_a_loss_that_waits_for_a_later_request_of_its_client_is_refused() -> None:
    c = client()
    later: list[APIFuture[Any]] = []

    def waits(data: Any, logprobs_list: list[Tensor]) -> Any:
        later.append(c.forward(texts(Random(1)), "cross_entropy"))
        return later[0].result(60)

    def awaits(data: Any, logprobs_list: list[Tensor]) -> Any:
        return asyncio.run(c.forward(texts(Random(1)), "cross_entropy").coroutine())

    def asks(data: Any, logprobs_list: list[Tensor]) -> Any:
        return c.get_info()

    def samples(data: Any, logprobs_list: list[Tensor]) -> Any:
        return c.save_weights_and_get_sampling_client()

    for loss_fn in (waits, awaits, asks, samples):
        with pytest.raises(LossInputError, match="cannot wait for a later one"):
            c.forward_backward_custom(texts(Random(1)), loss_fn).result(60)
    with pytest.raises(CancelledError):
        later[0].result(60)
    assert all(g is None for g in gradients(c))


def in_a_thread(wait: Callable[[], Any]) -> None:
    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()


def in_a_pool(wait: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(wait).result()


POOL = ThreadPoolExecutor(1)


def in_a_pool_that_is_there(wait: Callable[[], Any]) -> None:
    POOL.submit(int).result()
    POOL.submit(wait).result()


def in_a_thread_of_a_thread(wait: Callable[[], Any]) -> None:
    in_a_thread(lambda: in_a_thread(wait))


def in_a_loop(wait: Callable[[], Any]) -> None:
    asyncio.run(asyncio.to_thread(wait))


def in_a_timer(wait: Callable[[], Any]) -> None:
    timer = threading.Timer(0, wait)
    timer.start()
    timer.join()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "start", [in_a_thread, in_a_pool, in_a_pool_that_is_there, in_a_thread_of_a_thread, in_a_loop, in_a_timer]
)
@pytest.mark.parametrize("swallowed", [True, False])
def test_a_loss_that_starts_a_thread_which_waits_for_the_client_is_refused(
    start: Callable[[Callable[[], Any]], None], swallowed: bool
) -> None:
    """It is refused even if the loss never learns of the thread's error."""
    c, errors = client(), []
    c.forward_backward(texts(Random(1)), "cross_entropy").result()
    before = gradients(c)
    POOL.submit(int).result()

    def wait() -> None:
        try:
            c.forward(texts(Random(1)), "cross_entropy").result(60)
        except LossInputError as error:
            errors.append(error)
            if not swallowed:
                raise

    def loss_fn(data: Any, logprobs_list: list[Tensor]) -> Any:
        start(wait)
        return half_squared(data, logprobs_list)

    with pytest.raises(LossInputError, match="cannot wait for a later one"):
        c.forward_backward_custom(texts(Random(1)), loss_fn).result(60)
    assert len(errors) == 1 and same(gradients(c), before)
    c.forward_backward_custom(texts(Random(1)), half_squared).result(60)


def test_a_thread_of_a_loss_may_wait_once_the_loss_is_done_and_other_threads_at_any_time(gate: Gate) -> None:
    c, results, begun = client(), [], threading.Event()

    def late() -> None:
        begun.wait(60)
        results.append(c.forward(texts(Random(1)), "cross_entropy").result(60))

    def loss_fn(data: Any, logprobs_list: list[Tensor]) -> Any:
        threads.append(threading.Thread(target=late))
        threads[0].start()
        return half_squared(data, logprobs_list)

    threads: list[threading.Thread] = []
    c.forward_backward_custom(texts(Random(1)), loss_fn).result(60)
    begun.set()
    threads[0].join(60)
    assert len(results) == 1
    custom = c.forward_backward_custom(texts(Random(2)), gate)
    assert gate.begun.wait(60)
    other = threading.Thread(target=lambda: results.append(c.forward(texts(Random(1)), "cross_entropy").result(60)))
    other.start()
    gate.end.set()
    other.join(60)
    assert len(results) == 2 and custom.result(60)


def test_a_thread_of_a_loss_may_use_another_client() -> None:
    c, other, results = client(), client(), []

    def loss_fn(data: Any, logprobs_list: list[Tensor]) -> Any:
        in_a_thread(lambda: results.append(other.forward(data, "cross_entropy").result(60)))
        return half_squared(data, logprobs_list)

    c.forward_backward_custom(texts(Random(1)), loss_fn).result(60)
    assert len(results) == 1


def test_a_loss_may_submit_later_requests_and_read_earlier_ones() -> None:
    c = client()
    earlier = c.forward(texts(Random(1)), "cross_entropy")
    later: list[APIFuture[Any]] = []

    def loss_fn(data: Any, logprobs_list: list[Tensor]) -> Any:
        assert earlier.result().metrics
        later.append(c.optim_step(ADAM))
        return half_squared(data, logprobs_list)

    c.forward_backward_custom(texts(Random(1)), loss_fn).result(60)
    assert later[0].result(60).metrics["grad_norm"] > 0


def test_nothing_runs_between_a_custom_loss_and_its_backward(gate: Gate) -> None:
    """Requests that other threads submit during the loss run after its backward pass."""
    c, serial = client(), client()
    for each in (c, serial):
        each.forward_backward(texts(Random(1)), "cross_entropy").result()
    before = weights(c)
    custom = c.forward_backward_custom(texts(Random(2)), gate)
    assert gate.begun.wait(60)
    others: list[APIFuture[Any]] = []
    threads = [threading.Thread(target=lambda: others.append(c.optim_step(ADAM)))]
    threads += [threading.Thread(target=lambda: others.append(c.forward(texts(Random(3)), "cross_entropy")))]
    for thread in threads:
        thread.start()
        thread.join()
    assert not any(other.future().done() for other in others) and same(weights(c), before)
    gate.end.set()
    expected = serial.forward_backward_custom(texts(Random(2)), half_squared).result()
    serial.optim_step(ADAM).result()
    assert custom.result().metrics == expected.metrics
    assert others[0].result() and others[1].result() and same(weights(c), weights(serial))


def test_saves_and_loads_act_where_they_stand_in_the_queue(tmp_path: Path) -> None:
    c, data = client(), texts(Random(1))

    def train() -> tuple[Any, Any]:
        return c.forward_backward(data, "cross_entropy"), c.optim_step(ADAM)

    queue = [train(), train()]
    saved = c.save_state(tmp_path / "two.npz")
    queue += [train(), train()]
    loaded = c.load_state_with_optimizer(tmp_path / "two.npz")
    queue += [train(), train()]
    weighed = c.load_state(tmp_path / "two.npz")
    queue += [train()]
    losses = [fb.result().metrics["loss:sum"] for fb, step in queue if step.result()]
    assert saved.result().path == loaded.result().path == weighed.result().path
    assert losses[4:6] == losses[2:4] and losses[6] == losses[2]
    assert c.get_info().steps == 1


def test_data_is_taken_as_it_is_at_the_call(gate: Gate) -> None:
    c, data = client(), texts(Random(1), 3)
    expected = c.forward(data, "cross_entropy").result().metrics
    c.forward_backward_custom(data, gate)
    later = [c.forward(data, "cross_entropy"), c.forward_backward_custom(data, half_squared)]
    data[0].loss_fn_inputs["target_tokens"] = lossfns.TensorData([0], "int64")
    data.clear()
    gate.end.set()
    assert later[0].result().metrics == expected
    assert len(c.forward(texts(Random(1), 3), "cross_entropy").result().loss_fn_outputs) == 3


# A client that goes out of scope


def threads_of_clients() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("lossfns")}


@pytest.mark.parametrize("left", ["nothing", "a result", "an error", "an unread error", "a request"])
def test_a_client_that_goes_out_of_scope_frees_its_thread(left: str, caplog: pytest.LogCaptureFixture) -> None:
    gc.collect()
    caplog.clear()
    before = threads_of_clients()
    c = client()
    (thread,) = threads_of_clients() - before
    gone = weakref.ref(c.model)
    if left != "nothing":
        data = bad_data() if "error" in left else texts(Random(1))
        future = c.forward_backward(data, "cross_entropy")
        wait_for(lambda: left == "a request" or future.future().done())
        if left == "an error":
            with pytest.raises(LossInputError):
                future.result()
        del future
    del c

    def left_behind() -> bool:
        gc.collect()
        return thread.is_alive() or gone() is not None

    wait_for(lambda: not left_behind())
    assert ("nobody read its error" in caplog.text) == (left == "an unread error")
