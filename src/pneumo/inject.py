"""Known causes of lost time, made on purpose: what --inject asks for, to test the account and to teach with it."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pneumo.errors import Refused
from pneumo.flags import nearest

Place = Literal["data", "forward", "backward", "comm", "optimizer", "validate", "checkpoint"]
Cause = Literal["sleep", "compute", "replicated", "alone", "busy"]
MOST_S = 60.0
# Where a cause can act. What is done alone is a row of its own between the steps, of that kind.
PLACES: dict[str, tuple[str, ...]] = {
    "sleep": ("data", "forward", "backward", "comm", "optimizer", "validate"),
    "compute": ("forward", "backward", "optimizer"),
    "replicated": ("forward", "backward", "optimizer"),
    "alone": ("validate", "checkpoint"),
}
_KEYS = ("rank", "phase", "delay", "cause")
_EXAMPLE = "as in rank=1,phase=backward,delay=20ms or rank=0,phase=validate,delay=1s or rank=0,cause=busy"
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class Injection:
    """One cause: what a rank (None: all) does for `delay_s` more, by default in a phase of each step.

    sleep       it sleeps; `comm` delays the transport itself, once a step, `validate` each batch of the validation
    compute     it computes, and uses as much CPU time
    replicated  so does every rank, and the serial reference: work that does not become less with a rank's share
    alone       it validates or writes a checkpoint (it sleeps) before each step, while the others go on and wait for it
    busy        it shares its cores with a busy process

    In `validate` and `checkpoint` one rank does alone what is asked of it where no cause is named, elsewhere it sleeps.
    But for `replicated` only trainings of several ranks are disturbed, so the serial reference stays what it is.
    """

    rank: int | None
    phase: Place | None
    delay_s: float
    cause: Cause = "sleep"


def parse_injections(_type: Any, tokens: Sequence[Any]) -> tuple[Injection, ...]:
    """Read `rank=1,phase=backward,delay=20ms`, several with a semicolon or comma between; a converter of cyclopts."""
    texts: list[str] = []
    for several in (text for token in tokens for text in token.value.split(";")):
        for i, part in enumerate(several.split(",")):
            begins = i == 0 or (part.strip().startswith("rank=") and "rank=" in texts[-1])
            texts[len(texts) if begins else -1 :] = [part if begins else f"{texts[-1]},{part}"]
    return tuple(_one(text.strip()) for text in texts)


def _one(text: str) -> Injection:
    fields: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not value:
            raise Refused(f"--inject {text}: {part or 'nothing'} is no setting; write it {_EXAMPLE}.")
        if key not in _KEYS:
            raise Refused(f"--inject {text}: unknown {key}: {nearest(key, _KEYS)}.")
        fields[key] = value
    phase = fields.get("phase")
    by_default = "alone" if phase in PLACES["alone"] and fields.get("rank") != "all" else "sleep"
    cause = fields.get("cause", by_default)
    for name, known in (("cause", get_args(Cause)), ("phase", get_args(Place))):
        if name in fields and fields[name] not in known:
            raise Refused(f"--inject {text}: unknown {name} {fields[name]}: {nearest(fields[name], known)}.")
    needed = {"rank"} if cause == "busy" else {"rank", "phase", "delay"}
    if missing := sorted(needed - fields.keys()):
        raise Refused(f"--inject {text}: {' and '.join(missing)} missing; write it {_EXAMPLE}.")
    if "phase" in fields and cause != "busy" and phase not in PLACES[cause]:
        raise Refused(f"--inject {text}: cause {cause} acts in {', '.join(PLACES[cause])}, not in {phase}.")
    if cause == "replicated" and fields["rank"] != "all":
        raise Refused(f"--inject {text}: what is replicated every rank does: write rank=all.")
    if cause == "alone" and fields["rank"] == "all":
        raise Refused(f"--inject {text}: what all ranks do none does alone: name one rank.")
    if cause == "busy" and (extra := sorted({"phase", "delay"} & fields.keys())):
        raise Refused(f"--inject {text}: a busy neighbour has no {' and no '.join(extra)}.")
    return Injection(_rank(text, fields["rank"]), phase, _delay(text, fields.get("delay", "0s")), cause)  # type: ignore[arg-type]


def _rank(text: str, value: str) -> int | None:
    if value != "all" and not value.isdecimal():
        raise Refused(f"--inject {text}: rank {value} is neither a number nor all.")
    return None if value == "all" else int(value)


def read_delay(value: str) -> float | None:
    """The seconds of a delay such as 20ms; None where it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", value)
    return float(match[1]) * _UNITS[match[2]] if match else None


def _delay(text: str, value: str) -> float:
    found = read_delay(value)
    if found is None or found > MOST_S:
        raise Refused(f"--inject {text}: a delay is at most 60 s, with us, ms or s, as in 20ms.")
    return found


class Disturbance:
    """What is injected into one rank of one training."""

    def __init__(self, injections: Iterable[Injection], rank: int, world_size: int) -> None:
        mine = [i for i in injections if i.rank in (None, rank) and (world_size > 1 or i.cause == "replicated")]
        self._sleep_s = _sums(one for one in mine if one.cause == "sleep")
        self._compute_s = _sums(one for one in mine if one.cause in ("compute", "replicated"))
        self.alone_s = _sums(one for one in mine if one.cause == "alone")  # before each step, by the kind of its row
        self._busy = any(one.cause == "busy" for one in mine)

    def delay_s(self, phase: str) -> float:
        """The seconds of sleep that a phase is delayed by."""
        return self._sleep_s.get(phase, 0.0)

    def lengthen(self, phase: str) -> None:
        """Sleep and compute as long as was asked for in a phase."""
        if phase in self._sleep_s:
            time.sleep(self._sleep_s[phase])
        if phase in self._compute_s:
            end = time.thread_time() + self._compute_s[phase]
            while time.thread_time() < end:
                pass

    @contextmanager
    def neighbour(self) -> Iterator[None]:
        """A busy process on this rank's cores while inside, where one was asked for; it ends with its parent."""
        if not self._busy:
            yield
            return
        code = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
        with subprocess.Popen([sys.executable, "-c", code]) as process:
            try:
                yield
            finally:
                process.kill()


def _sums(injections: Iterable[Injection]) -> dict[str, float]:
    """The seconds of these by phase."""
    found: dict[str, float] = {}
    for one in injections:
        if one.phase is not None:
            found[one.phase] = found.get(one.phase, 0.0) + one.delay_s
    return found
