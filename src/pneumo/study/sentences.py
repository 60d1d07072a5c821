"""What the accounts say, in words: every sentence is made of figures of one row or one pair, which it names."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pneumo.study.account import INJECTED, NO_SHARES, Account
from pneumo.study.cells import decimals, name_of
from pneumo.study.common_clock import duration
from pneumo.study.late import by_rank
from pneumo.study.rivals import OPPOSITE, against
from pneumo.study.schema import Compared, Figures, Pair, Rivals, Row, VerdictName

WORDS = {
    "peer_wait": "waiting for late ranks",
    "queue": "waiting for the library to begin",
    "transfer": "transfer",
    "data_stall": "waiting for data",
    "off_cpu": "off-CPU",
    "replicated": "work that every rank repeats",
    "slower_on_cpu": "computing slower than serially",
    "other": "other",
    "residual": "unexplained",
}
CAUSES = {
    "off_cpu": "it was ready to run without a core",
    "compute": "it had more to compute, or computed slower",
    "sleep": "it was blocked, neither computing nor ready to run",
    "data": "the next batch was not there",
    "alone": "it did alone what the others did not do",
    "unknown": "it spent the time between steps, where nothing is measured",
}
FAULTS = {
    "blocks": ("blocks in which not all ranks have the same steps", "they are left out"),
    "phases": (
        "rows of steps.parquet whose phases do not sum to their wall time",
        "what is said of their phases is wrong",
    ),
    "silent": ("ranks that left no record of collectives", "these waits are in other, for them and for the others"),
    "lost": ("records of collectives that are lost", "peer wait is a lower bound there, the rest is in other"),
    "impossible": ("records with stamps that cannot be", "they are taken for lost: the waits are in other"),
    "gaps": ("collectives that no rank has a record of", "their numbers are missing; these waits are in other"),
    "doubled": ("records that are there more than once", "they were counted once"),
    "stray": ("records of no step or no rank of the run", "they are left out"),
    "mismatched": ("collectives in which ranks did not do the same", "what is said of these may be wrong"),
}
PARTS = {
    "outside_s": "outside communication",
    "peer_wait_s": "peer wait",
    "queue_s": "queue",
    "transfer_s": "transfer",
    "queue_and_transfer_s": "queue and transfer",
}
RESIDUAL_LIMIT, OTHER_LIMIT, FAINT, CROWDED, CLOCK_LIMIT = 0.01, 0.05, 0.01, 0.25, 0.01
REPLAY_LIMIT = 0.02  # a replay that misses the recorded time by more says nothing of another one
ALL = 0.995  # a part that is told as the whole


@dataclass(frozen=True, slots=True)
class Sentence:
    """A statement, the row that it is about, and that row's figures which it is made of, by the names of its fields."""

    text: str
    run: int
    figures: dict[str, float]


def sentences(row: Row, account: Account | None, cores: int) -> list[Sentence]:
    """What can be said of one run; `account` adds what is in no row: the replay, and faults of the records."""
    lost, compared = row.lost_rank_s, row.compared
    if row.ranks == 1 or lost is None or compared is None or compared.whole_rank_s <= 0:
        return []
    whole = compared.whole_rank_s
    found = [*_largest(row, lost, whole, cores), *_late(row, compared)]
    if account is not None:
        found += [*_crowded(row, account), *_clock(row, account), *_network(row, account)]
    return [*found, *_defects(row, whole, account), *(_records(row, account) if account else ())]


def _say(row: Row, text: str, **figures: float) -> Sentence:
    return Sentence(text[0].upper() + text[1:], row.run, figures)


def _largest(row: Row, lost: float, whole: float, cores: int) -> Iterable[Sentence]:
    named = {term: value for term, value in row.loss.items() if value is not None}
    named["residual"] = row.residual_rank_s or 0.0
    term = max(named, key=lambda name: named[name])
    if lost <= 0:
        text = f"nothing is lost on balance ({_amount(-lost)} rank-seconds less than serially)"
        if (points := 100 * named[term] / whole) >= 1:
            text += f": {WORDS[term]} costs {points:.0f} points of efficiency, and other parts take less than serially"
        yield _say(row, f"{text}.", lost_rank_s=lost, **{term: named[term]})
        return
    share, crowd = named[term] / lost, row.ranks * row.threads > cores
    why = " (other parts took less than serially)" if round(100 * share) > 100 else ""
    if term == "off_cpu" and crowd:
        why += f": there are more ranks than cores ({row.ranks} x {row.threads} on {cores})"
    yield _say(
        row,
        f"of {_amount(lost)} rank-seconds lost ({100 * lost / whole:.0f} points of efficiency), {100 * share:.0f} % is "
        f"{WORDS[term]}{why}.",
        lost_rank_s=lost,
        **{term: named[term]},
    )


def _late(row: Row, compared: Compared) -> Iterable[Sentence]:
    """The rank that cost the others most, over all phases and causes, and what it did where it cost most of that."""
    waited, late = row.loss["peer_wait"] or 0.0, by_rank(row.late)
    if not late or late[0].rank_s < FAINT * compared.whole_rank_s:
        return
    worst, main = late[0], late[0].parts[0]
    each = _ms(worst.rank_s / (row.ranks - 1) / compared.steps)
    part = main.rank_s / worst.rank_s
    by = "by" if part >= ALL else f"{100 * part:.0f} % of that by"
    yield _say(
        row,
        f"rank {worst.rank} was the last at {worst.count} collective{'s'[: worst.count != 1]} and cost the others "
        f"{_amount(worst.rank_s)} rank-seconds ({each} ms a step each), "
        f"{100 * worst.rank_s / waited:.0f} % of all peer wait, {by} "
        f"what it did in {main.phase}: {CAUSES[main.cause]}.",
        late_rank_s=worst.rank_s,
        late_count=worst.count,
        main_rank_s=main.rank_s,
        peer_wait=waited,
    )


def _crowded(row: Row, account: Account) -> Iterable[Sentence]:
    """How much of the blocked time was no waiting for anybody, but for a core to go on."""
    delay = float(account.aside["delay within comm"].sum())
    blocked = sum(row.loss[term] or 0.0 for term in ("peer_wait", "queue", "transfer"))
    if delay > CROWDED * blocked > 0:
        yield _say(
            row,
            f"{100 * delay / blocked:.0f} % of the time in collectives a rank was ready to go on and had no core, "
            "which counts there and not as off-CPU.",
            delay_within_comm=delay,
            blocked=blocked,
        )


def _clock(row: Row, account: Account) -> Iterable[Sentence]:
    """Which parts of blocked time the error of the ranks' clocks can change by more than a hundredth."""
    error_s = account.clock_ns * account.num_waits / 1e9
    terms = {term: row.loss[term] or 0.0 for term in ("peer_wait", "queue", "transfer")}
    parts = [
        f"{WORDS[term]} ({100 * min(error_s / value, 1):.0f} % of it)"
        for term, value in terms.items()
        if value > 0 and error_s > CLOCK_LIMIT * value
    ]
    if parts:
        yield _say(
            row,
            f"the ranks' clocks agree within {duration(account.clock_ns)}, over {account.num_waits} waits up to "
            f"{error_s:.3f} rank-seconds: that much is uncertain of {', '.join(parts)}.",
            clock_ns=account.clock_ns,
            num_waits=account.num_waits,
        )


def _network(row: Row, account: Account) -> Iterable[Sentence]:
    """How much a faster network could gain, by the replay where that is right, and not by the sum of transfer."""
    serial = account.length_s.sum() * row.ranks - (row.lost_rank_s or 0.0)
    found = account.what_if
    if found is None or abs(found.error) > REPLAY_LIMIT or serial <= 0:
        return
    now, then = (serial / (row.ranks * s) for s in (found.replayed_s, found.scenarios_s["no transfer"]))
    yield _say(
        row,
        f"a faster network would gain at most {100 * (then - now):.1f} points of efficiency.",
        replayed_s=found.replayed_s,
        no_transfer_s=found.scenarios_s["no transfer"],
    )


def _defects(row: Row, whole: float, account: Account | None) -> Iterable[Sentence]:
    residual, other = row.residual_rank_s or 0.0, row.loss["other"] or 0.0
    if row.loss["slower_on_cpu"] is None:
        yield _say(row, f"{NO_SHARES}; they are in the residual.", residual_rank_s=residual)
    if abs(residual) > RESIDUAL_LIMIT * whole:
        share = 100 * residual / whole
        yield _say(
            row, f"{share:+.1f} % of N*T_N is explained by no measurement (above 1 %).", residual_rank_s=residual
        )
    parts = {name: float(x.sum()) for name, x in account.items.get("other", {}).items()} if account else {}
    if (injected := parts.pop(INJECTED, 0.0)) > OTHER_LIMIT * whole:
        yield _say(row, f"of other, {100 * injected / whole:.1f} % of N*T_N was injected.", injected=injected)
    if abs(other := other - injected) > OTHER_LIMIT * whole:
        most = max(parts, key=lambda name: abs(parts[name]), default=None)
        which = f": {most} {100 * parts[most] / whole:+.1f} %" if most else ""
        yield _say(row, f"other is {100 * other / whole:+.1f} % of N*T_N (above 5 %){which}.", other=other)


def _records(row: Row, account: Account) -> Iterable[Sentence]:
    for kind, (what, therefore) in FAULTS.items():
        if fault := account.faults.get(kind):
            first = "" if fault.count == 1 else "first: "
            yield _say(row, f"{what}: {fault.count} ({first}{fault.examples[0]}); {therefore}.", count=fault.count)


def rivalry(found: Rivals) -> list[Sentence]:
    """How the fastest run compares with the fastest of each other backend, and by what; or that it is not decided.

    With the runs of one backend only: how it compares with the next one. The figures are those of the pair.
    """
    fastest, *others = sorted(found.runs, key=lambda run: run.step_s.median)
    rivals: dict[str, Figures] = {}
    for run in others:
        if run.backend != fastest.backend:
            rivals.setdefault(run.backend, run)
    where = f"On {found.ranks} ranks" + (f" of {found.threads} threads" if found.threads > 1 else "")
    said: list[Sentence] = []
    for run in list(rivals.values()) or others[:1]:
        pair = against(found, fastest.run, run.run)
        if pair is not None:
            said += _rivals(fastest, run, pair, where)
    return said


def _rivals(ours: Figures, theirs: Figures, pair: Pair, where: str) -> Iterable[Sentence]:
    names = [f"{run.backend} {run.comm}" for run in (ours, theirs)]
    speed, verdict = pair.speed.estimate, pair.speed.verdict
    figures = {"speed": speed.median, "low": speed.low, "high": speed.high}
    if verdict.verdict == "equivalent":
        text = f"{where} {names[0]} and {names[1]} are equally fast within {verdict.margin:.0%}."
        yield Sentence(text, ours.run, figures)
    elif verdict.verdict == "undecided":
        if pair.interval_kind == "interval":
            more = f"; about {verdict.more_blocks} more blocks would tell" if verdict.more_blocks else ""
            text = f"{where} {names[0]} and {names[1]} cannot be told apart: {speed.low:.2f} to {speed.high:.2f} times"
            yield Sentence(f"{text} as fast{more}.", ours.run, figures)
    else:
        times = f"{speed.median:.2f} ({speed.low:.2f} to {speed.high:.2f}) times as fast as"
        why = _why(pair, verdict.verdict)
        told = ", ".join(_less_or_more(part, why) for part in why if part != "off_cpu_s")
        told = told.replace(" ms", " ms a step", 1) or "no single part of the step is known to differ that much"
        yield Sentence(f"{where} {names[0]} is {times} {names[1]}: {told}.", ours.run, figures | why)


def _why(pair: Pair, how: VerdictName) -> dict[str, float]:
    """Seconds of the parts of a step that decide: the two largest, and the largest that goes the other way.

    With that outside of communication goes its part off-CPU where that decides too, in the same way.
    """
    parts = ["outside_s", "peer_wait_s", "queue_s", "transfer_s"]
    if pair.seconds["transfer_s"] is None:
        parts[2:] = ["queue_and_transfer_s"]
    found = {part: difference for part in parts if (difference := pair.seconds[part]) is not None}
    order = sorted(found, key=lambda part: -abs(found[part].estimate.median))
    along = [part for part in order if found[part].verdict.verdict == how]
    opposed = [part for part in order if found[part].verdict.verdict == OPPOSITE[how]]
    told = along[:2] + opposed[:1]
    outside, off_cpu = pair.seconds["outside_s"], pair.seconds["off_cpu_s"]
    if outside and off_cpu and "outside_s" in told and outside.verdict.verdict == off_cpu.verdict.verdict:
        found["off_cpu_s"] = off_cpu
        told.append("off_cpu_s")
    return {part: found[part].estimate.median for part in told}


def _less_or_more(part: str, seconds: Mapping[str, float]) -> str:
    text = f"{_ms(seconds[part])} ms {'less' if seconds[part] < 0 else 'more'} {PARTS[part]}"
    if part == "outside_s" and "off_cpu_s" in seconds:
        text += f" (waiting for a core: {_ms(seconds['off_cpu_s'])})"
    return text


def _amount(rank_s: float) -> str:
    """Rank-seconds with one decimal, or what is less than 1 with one or two digits."""
    return f"{rank_s:.1f}" if rank_s >= 1 else f"{rank_s:.2g}"


def _ms(seconds: float) -> str:
    ms = abs(1e3 * seconds)
    return f"{ms:.{max(0, decimals([ms]) - 1)}f}"


def paragraphs(rows: Sequence[Row], accounts: Mapping[int, Account], cores: int) -> list[str]:
    """What can be said of each run, in one paragraph that begins with its name; without those that need no words."""
    said = ((row, sentences(row, accounts.get(row.run), cores)) for row in rows)
    return [f"{name_of(row)}: " + " ".join(one.text for one in found) for row, found in said if found]
