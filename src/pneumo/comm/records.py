"""Records of a process group's calls over any c10d backend, from the hooks that torch fires before and after each."""

import contextlib
from time import perf_counter_ns
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist

from pneumo.comm import native
from pneumo.timing.record import UNTOLD, Collective, Source

_WORK: Any = dist.Work
_HOOK = 0x706E6D  # torch asks for a number that nobody else uses


class Call(NamedTuple):
    """A call as the hooks saw it on this rank; stamps in ns of CLOCK_MONOTONIC, None where nobody can tell."""

    op: str
    dtype: Any
    bytes: int
    sequence: int
    peer: int | None
    enqueued: int
    started: int | None
    finished: int | None
    wait_begin: int | None
    wait_end: int | None


class GroupRecords(Source):
    """The calls of one process group, while attached to it. `name` stands in the records: equal on all its ranks.

    `in_python`: by hooks in Python also where the native layer is built, whose place they take where it is not.

    Exact are the moment of issue, the moment of completion where the backend's Works have a Future (all of Gloo's but
    reduce-scatter and messages), and, of the backend `pneumo`, the moment when the operation's turn came. Blocking is
    exact where the issuing thread blocks in the call or in Python's `Work.wait`; waits inside of torch's own C++ (DDP
    for its buckets, functional collectives) are not seen here. Collectives are numbered in the order of their issue,
    which c10d demands to be equal on all ranks; messages for each pair of ranks and direction.
    """

    def __init__(self, group: Any, name: str, *, in_python: bool = False) -> None:
        self._group, self._name, self._in_python = group, name, in_python
        self._first = self._count = 0
        self._listener: Any = None

    def attach(self) -> None:
        """Begin to record, going on with the numbers of the last time."""
        if self._listener is None:
            self._first = self._count
            module = None if self._in_python else native()
            self._listener = _Hooks(self._group) if module is None else module.Recorder.attach(self._group)
            _time_waits(module.timed_wait if module is not None else _Hooks.timed_wait)

    def detach(self) -> None:
        """Stop; what was not taken is forgotten."""
        if self._listener is not None:
            self.take()
            self._listener.detach()
            self._listener = None
            _time_waits(None)

    def take(self, *, ended: bool = False) -> list[Collective]:
        """Return the calls that were issued since the last time, in order; with `ended`, others stay for later."""
        found = [Call(*one) for one in self._listener.take(ended)] if self._listener is not None else []
        return [self._collective(call) for call in found]

    def _collective(self, call: Call) -> Collective:
        seq, group = self._first + call.sequence, self._name
        if call.peer is None:
            self._count = max(self._count, seq + 1)
        else:
            me = self._group.rank()
            pair = (me, call.peer) if call.op == "send" else (call.peer, me)
            seq, group = call.sequence, f"{group}, {pair[0]} to {pair[1]}"
        dtype = str(call.dtype).removeprefix("torch.") if call.dtype is not None else "none"
        made = Collective(seq, call.op, dtype, call.bytes, group, *call[5:])
        if made.started_ns is None:
            made.bounded(UNTOLD)
        return made


_attached = 0
_untimed_wait: Any = None


def _time_waits(wait: Any) -> None:
    """Have Python's Work.wait timed while anybody records; None: one fewer does."""
    global _attached, _untimed_wait
    _attached += 1 if wait is not None else -1
    if wait is not None and _attached == 1:
        _untimed_wait, _WORK.wait = _WORK.wait, wait
    elif wait is None and _attached == 0:
        _WORK.wait = _untimed_wait


class _Hooks:
    """The same records made in Python, where the native layer is not built: a few microseconds a call."""

    _waited: ClassVar[dict[Any, list[Any]]] = {}  # the records of Works that are still held, by Work

    def __init__(self, group: Any) -> None:
        self._group = group
        self._calls: list[list[Any]] = []
        self._numbers: dict[Any, int] = {}
        self._current: tuple[int, list[Any]] | None = None
        group.register_pre_hook(_HOOK, self._before)
        group.register_post_hook(_HOOK, self._after)

    def detach(self) -> None:
        self._group.unregister_pre_hook(_HOOK)
        self._group.unregister_post_hook(_HOOK)
        self.take()

    def take(self, ended: bool = False) -> list[list[Any]]:
        over = [not ended or call[7] is not None or call[9] is not None for call in self._calls]
        taken = [call for call, is_over in zip(self._calls, over, strict=True) if is_over]
        self._calls = [call for call, is_over in zip(self._calls, over, strict=True) if not is_over]
        for call in taken:
            _Hooks._waited.pop(call.pop(), None)
        return taken

    def _before(self, args: Any) -> None:
        op = args.name.name.lower()
        if op in ("split", "new_window", "unknown"):
            return
        sides = [args.input_tensors, args.output_tensors]
        dtype = next((t.dtype for side in sides for t in side if isinstance(t, torch.Tensor)), None)
        size = max(sum(t.numel() * t.element_size() for t in side) for side in sides)
        peer = args.root if op in ("send", "recv") else None
        self._current = args.op_id, [op, dtype, size, 0, peer, perf_counter_ns(), None, None, None, None, None]

    def _after(self, args: Any) -> None:
        if self._current is None or self._current[0] != args.op_id:
            return
        call, self._current = self._current[1], None
        key = (call[0], call[4]) if call[4] is not None else None
        call[3] = self._numbers.get(key, 0)
        self._numbers[key] = call[3] + 1
        self._calls.append(call)
        if args.work is None or (not args.async_op and args.work.is_completed()):  # it has blocked until its end
            call[7] = call[9] = perf_counter_ns()
            call[8] = call[5]
            return
        call[-1] = args.work
        _Hooks._waited[args.work] = call
        with contextlib.suppress(RuntimeError):  # a Work without a Future
            args.work.get_future().add_done_callback(lambda _: call.__setitem__(7, perf_counter_ns()))

    @staticmethod
    def timed_wait(work: Any, *timeout: Any) -> Any:
        """Work.wait, noted in the record of the call."""
        call = _Hooks._waited.get(work)
        if call is None or call[8] is not None:
            return _untimed_wait(work, *timeout)
        call[8] = perf_counter_ns()
        try:
            return _untimed_wait(work, *timeout)
        finally:
            call[9] = perf_counter_ns()
