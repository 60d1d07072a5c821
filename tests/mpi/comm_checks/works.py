"""What an asynchronous call returns: Work and Future, with callbacks that call collectives themselves."""

import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from comm_checks.reference import assert_same, told
from comm_checks.world import Ranks, rng


def start(ranks: Ranks, tensor: torch.Tensor, group: Any = None) -> Any:
    """An all_reduce under way."""
    return dist.all_reduce(tensor, group=group or ranks.pneumo, async_op=True)


def check_nothing_is_complete_before_the_last_rank_comes(ranks: Ranks) -> None:
    tensor = torch.ones(3)
    late = ranks.size - 1
    if ranks.rank != late:
        work = start(ranks, tensor)
        future = work.get_future()
        assert not work.is_completed()
        assert not future.done()
    ranks.meet()
    if ranks.rank == late:
        work = start(ranks, tensor)
        future = work.get_future()
    assert work.wait() is True
    assert work.is_completed()
    assert work.is_success()
    assert work.exception() is None
    assert_same(work.result(), [torch.full((3,), float(ranks.size))])
    assert_same(future.wait(), [torch.full((3,), float(ranks.size))])


def check_a_future_is_done_when_its_work_is(ranks: Ranks) -> None:
    """And what hangs on it has run, as over Gloo: after a wait, and where is_completed says so."""
    for group in (ranks.pneumo, ranks.gloo):
        for i in range(200):
            called: list[int] = []
            work = start(ranks, torch.ones(100), group)
            future = work.get_future()
            future.then(lambda _future, called=called: called.append(1))
            if i % 2:
                work.wait()
            else:
                while not work.is_completed():
                    time.sleep(0)
            assert future.done(), i
            assert_same(future.value(), [torch.full((100,), float(ranks.size))])
            assert called == [1], i


def check_a_callback_may_wait_for_its_own_work(ranks: Ranks) -> None:
    work = start(ranks, torch.ones(5))
    waited: list[bool] = []
    work.get_future().then(lambda _future: waited.append(work.wait()))
    work.wait()
    assert waited == [True]


def check_a_wait_that_times_out_leaves_the_work_under_way(ranks: Ranks) -> None:
    late = ranks.size - 1
    tensor = torch.full((9_000,), float(ranks.rank))
    if ranks.rank != late:
        work = start(ranks, tensor)
        text = told(lambda: work.wait(timedelta(milliseconds=50)))
        assert "ALLREDUCE" in text, text
        assert not work.is_completed()
    ranks.meet()
    if ranks.rank == late:
        work = start(ranks, tensor)
    assert work.wait(timedelta(seconds=30))
    assert_same(tensor, torch.full((9_000,), float(sum(ranks.everybody))))


def check_results_of_every_kind_are_those_of_gloo(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank

    def issue(group: Any) -> dict[str, Any]:
        rows = torch.arange(2.0 * n).view(n, 2)
        mine = torch.tensor([float(me), 1.0])
        at_root = list(torch.zeros(n, 2)) if me == 0 else None
        works: dict[str, Any] = {
            "all_reduce": dist.all_reduce(mine.clone(), group=group, async_op=True),
            "broadcast": dist.broadcast(mine.clone(), 0, group, async_op=True),
            "all_gather": dist.all_gather(list(torch.zeros(n, 2)), mine, group, async_op=True),
            "gather": dist.gather(mine, at_root, 0, group, async_op=True),
            "scatter": dist.scatter(torch.zeros(2), list(rows) if me == 0 else None, 0, group, async_op=True),
            "all_to_all": dist.all_to_all(list(torch.zeros(n, 2)), list(rows + me), group, async_op=True),
            "all_to_all_single": dist.all_to_all_single(torch.zeros(2 * n), rows.flatten(), group=group, async_op=True),
            "barrier": dist.barrier(group, async_op=True),
        }
        if me == 0:  # what other ranks have as a result of a reduction to rank 0 is not defined
            works["reduce"] = dist.reduce(mine.clone(), 0, group=group, async_op=True)
        else:
            dist.reduce(mine.clone(), 0, group=group)
        return works

    ours, gloos = issue(ranks.pneumo), issue(ranks.gloo)
    for name, work in ours.items():
        assert work.wait() is True
        gloos[name].wait()
        assert_same(work.result(), gloos[name].result(), name)
        assert_same(work.get_future().value(), gloos[name].get_future().value(), name)


def check_messages_have_works_too(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    received = torch.zeros(2)
    sending: Any = dist.isend(torch.full((2,), float(me)), (me + 1) % n, ranks.pneumo)
    receiving: Any = dist.irecv(received, (me - 1) % n, ranks.pneumo)
    assert receiving.wait() is True
    assert sending.wait() is True
    assert receiving._source_rank() == (me - 1) % n
    assert receiving.is_success()
    assert sending.is_success()
    assert_same(receiving.get_future().wait(), [torch.full((2,), float((me - 1) % n))])
    assert "recv" in told(sending._source_rank)


def check_synchronous_calls_return_nothing(ranks: Ranks) -> None:
    assert dist.all_reduce(torch.ones(1), group=ranks.pneumo) is None
    assert dist.broadcast(torch.ones(1), 0, ranks.pneumo) is None
    assert dist.barrier(ranks.pneumo) is None


def check_many_in_flight_are_waited_for_in_any_order(ranks: Ranks) -> None:
    tensors = [torch.full((1 + 400 * k,), float(ranks.rank + k)) for k in range(100)]
    works = [start(ranks, tensor) for tensor in tensors]
    for k in [*range(99, 49, -1), *range(50)]:
        works[k].wait()
        expected = float(sum(ranks.everybody) + k * ranks.size)
        assert_same(tensors[k], torch.full((1 + 400 * k,), expected), k)


def check_a_synchronous_call_comes_after_asynchronous_ones(ranks: Ranks) -> None:
    tensor = torch.ones(50_000)
    works = [start(ranks, tensor) for _ in range(3)]
    dist.all_reduce(tensor, group=ranks.pneumo)
    assert all(work.is_completed() for work in works)
    assert_same(tensor, torch.full((50_000,), float(ranks.size) ** 4))


def check_works_that_nobody_keeps(ranks: Ranks) -> None:
    """The operation holds its tensors, whose memory would else be taken by the next ones."""
    outputs = []
    for k in range(20):
        output = torch.zeros(ranks.size, 20_000)
        dist.all_gather_single(output, torch.full((20_000,), float(ranks.rank + k)), ranks.pneumo, async_op=True)
        torch.full((20_000,), -1.0)
        outputs.append(output)
    dist.barrier(ranks.pneumo)
    for k, output in enumerate(outputs):
        assert_same(output, torch.stack([torch.full((20_000,), float(rank + k)) for rank in ranks.everybody]), k)


def check_several_threads_wait_for_one_work(ranks: Ranks) -> None:
    late = ranks.size - 1
    tensor = torch.ones(1)
    seen: list[float] = []
    if ranks.rank != late:
        work = start(ranks, tensor)

        def wait() -> None:
            work.wait()
            seen.append(tensor.item())

        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        ranks.meet()
        for thread in threads:
            thread.join()
        assert seen == [ranks.size] * 3, seen
    else:
        ranks.meet()
        start(ranks, tensor).wait()


def check_a_thread_that_waits_does_not_hold_another_up(ranks: Ranks) -> None:
    """One thread sleeps in a receive, which drives the engine; what another calls begins at once, not when it looks up.

    It would look up every 100 ms.
    """
    if ranks.size == 1:
        return
    mail = torch.zeros(1)
    listener = threading.Thread(target=dist.recv, args=(mail, (ranks.rank - 1) % ranks.size, ranks.pneumo))
    listener.start()
    ranks.meet()
    took = []
    for _ in range(20):
        time.sleep(0.01)
        begin = time.monotonic()
        dist.all_reduce(torch.ones(4), group=ranks.pneumo)
        took.append(time.monotonic() - begin)
    dist.send(torch.ones(1), (ranks.rank + 1) % ranks.size, ranks.pneumo)
    listener.join()
    assert mail.item() == 1
    assert min(took) < 0.05, took


def check_then_sees_the_result_and_passes_on_its_own(ranks: Ranks) -> None:
    for group in (ranks.pneumo, ranks.gloo):
        future = start(ranks, torch.ones(2), group).get_future()
        doubled = future.then(lambda done: done.value()[0] * 2).then(lambda done: done.value() + 1)
        assert_same(doubled.wait(), torch.full((2,), 2.0 * ranks.size + 1))
        called = threading.Event()
        future.add_done_callback(lambda _, called=called: called.set())
        assert called.wait(20)


def check_futures_are_completed_though_nobody_waits_for_their_works(ranks: Ranks) -> None:
    """A wait for one work must leave the others to a thread that goes on with them."""
    groups = [ranks.fresh() for _ in range(2)]
    for turn in range(300):
        works = [start(ranks, torch.ones(20_000), group) for group in groups]
        future = works[1].get_future()
        works[0].wait()
        deadline = time.monotonic() + 10
        while not future.done():
            assert time.monotonic() < deadline, f"turn {turn}: not done after 10 s"
            time.sleep(0.0002)


def check_errors_in_callbacks_reach_who_waits(ranks: Ranks) -> None:
    def fails(_: Any) -> None:
        raise KeyError("of the callback")

    for group in (ranks.pneumo, ranks.gloo):
        future = start(ranks, torch.ones(2), group).get_future().then(fails)
        assert "of the callback" in told(future.wait)


def check_callbacks_that_call_collectives_and_wait(ranks: Ranks) -> None:
    """As communication hooks of DDP do: reduce, then gather, then reduce again, each from the callback before.

    Each callback has a group of its own: in which order the callbacks of several works run is nobody's promise.
    """
    n = float(ranks.size)

    def next_step(done: Any, group: Any) -> torch.Tensor:
        tensor: torch.Tensor = done.value()[0] + 1
        dist.all_reduce(tensor, group=group)
        gathered = [torch.zeros_like(tensor) for _ in ranks.everybody]
        work: Any = dist.all_gather(gathered, tensor + ranks.rank, group, async_op=True)
        work.wait()
        summed: torch.Tensor = work.get_future().then(lambda value: torch.stack(value.value()).sum(0)).wait()
        return summed

    for backend in ("gloo", "pneumo"):
        outer = ranks.gloo if backend == "gloo" else ranks.pneumo
        groups = [ranks.fresh(backend=backend, timeout_s=20) for _ in range(4)]
        for turn in range(5):
            futures = []
            for k in range(4):
                time.sleep(rng("pause", turn, k, ranks.rank).choice([0, 0.003]))
                future = start(ranks, torch.full((3,), float(k)), outer).get_future()
                futures.append(future.then(lambda done, k=k, groups=groups: next_step(done, groups[k])))
            for k, future in enumerate(futures):
                summed = (k * n + 1) * n
                assert_same(future.wait(), torch.full((3,), n * summed + sum(ranks.everybody)), (backend, k))


def check_callbacks_that_begin_in_another_order_on_every_rank(ranks: Ranks) -> None:
    """Two callbacks of two collectives each, on groups of their own: rank 0 begins with one, rank 1 with the other.

    No callback may keep another from going on; Gloo runs them in two threads.
    """
    if ranks.size < 3:
        return
    for backend in ("gloo", "pneumo"):
        outer = [ranks.fresh([k, 2], backend, timeout_s=15) for k in (0, 1)]
        inner = [ranks.fresh([0, 1], backend, timeout_s=15) for _ in range(2)]

        def twice(done: Any, group: Any) -> torch.Tensor:
            tensor: torch.Tensor = done.value()[0]
            for _ in range(2):
                dist.all_reduce(tensor, group=group)
            return tensor

        futures = []
        if ranks.rank < 2:
            group = outer[ranks.rank]
            for k in (0, 1) if ranks.rank == 0 else (1, 0):
                future = start(ranks, torch.ones(1), group).get_future()
                futures.append(future.then(lambda done, k=k, inner=inner, twice=twice: twice(done, inner[k])))
        ranks.meet()  # the callbacks are there before the works can be done, else they would run in the main thread
        if ranks.rank < 2:
            for future in futures:
                assert future.wait().item() == 8, backend
        elif ranks.rank == 2:
            for _ in range(2):
                for group in outer:
                    start(ranks, torch.ones(1), group)
                time.sleep(0.3)


def check_the_callback_of_another_work_does_not_hold_up_a_wait(ranks: Ranks) -> None:
    """A callback may need what the main thread does after a wait for something else."""
    late = ranks.size - 1
    for group in (ranks.gloo, ranks.pneumo):
        go, went = threading.Event(), [late == ranks.rank]
        if ranks.rank != late:  # the callback is there before the work can be done
            future = start(ranks, torch.ones(1), group).get_future()
            called = future.then(lambda _, go=go, went=went: went.append(go.wait(5)))
        ranks.meet()
        if ranks.rank == late:
            start(ranks, torch.ones(1), group)
        start(ranks, torch.ones(1), group).wait()
        go.set()
        if ranks.rank != late:
            called.wait()
        assert went[-1], dist.get_backend(group)


def check_callbacks_on_the_same_group(ranks: Ranks) -> None:
    """Each is issued when the one before is done, so the order is the same on every rank."""

    def again(done: Any) -> Any:
        tensor = done.value()[0]
        dist.all_reduce(tensor, group=ranks.pneumo)
        return [tensor]

    future = start(ranks, torch.ones(20_000)).get_future()
    for _ in range(6):
        future = future.then(again)
    assert_same(future.wait(), [torch.full((20_000,), float(ranks.size) ** 7)])


def check_futures_can_be_collected(ranks: Ranks) -> None:
    tensors = [torch.full((100,), float(k)) for k in range(4)]
    futures = [start(ranks, tensor).get_future() for tensor in tensors]
    values = [future.value() for future in torch.futures.collect_all(futures).wait()]
    assert_same(values, [[torch.full((100,), float(k * ranks.size))] for k in range(4)])
    more = [start(ranks, tensor).get_future() for tensor in tensors]
    torch.futures.wait_all(more)
    assert all(future.done() for future in more)


def check_a_future_asked_for_when_all_is_over(ranks: Ranks) -> None:
    work = start(ranks, torch.ones(2))
    work.wait()
    for _ in range(2):
        future = work.get_future()
        assert future.done()
        assert_same(future.then(lambda done: done.value()[0]).wait(), torch.full((2,), float(ranks.size)))


def check_a_failed_work_says_so_everywhere(ranks: Ranks) -> None:
    if ranks.size == 1:
        return
    group = ranks.fresh()
    work = start(ranks, torch.ones(1 + (ranks.rank == 0)), group)
    called = threading.Event()
    future = work.get_future()
    future.add_done_callback(lambda _: called.set())
    for wait in (work.wait, future.wait):
        text = told(wait)
        assert "rank 0 calls all_reduce(sum, 2 x" in text, text
    assert work.is_completed()
    assert not work.is_success()
    assert "disagree" in str(work.exception())
    assert called.wait(20)
    assert str(group._get_backend(torch.device("cpu")).get_error()) != "ErrorType.SUCCESS"
    dist.all_reduce(tensor := torch.ones(1), group=ranks.pneumo)
    assert tensor.item() == ranks.size, "another group is as usable as before"


def check_the_profiler_names_the_operations(ranks: Ranks) -> None:
    with torch.autograd.profiler.profile() as profile:
        dist.all_reduce(torch.ones(10), group=ranks.pneumo)
        work: Any = dist.broadcast(torch.ones(10), 0, ranks.pneumo, async_op=True)
        work.wait()
    names = {event.name for event in profile.function_events}
    assert {"pneumo:all_reduce", "pneumo:broadcast"} <= names, names
