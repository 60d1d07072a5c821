"""How runs scale: POP's efficiencies from an account, and Amdahl's and Gunther's laws fitted to speedups.

POP (Performance Optimisation and Productivity centre, its standard metrics for parallel performance): time outside
communication is useful; parallel efficiency = load balance * communication efficiency, and global efficiency is that
times computation scalability, useful time of the serial run over that of all ranks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pneumo.study.account import Account
from pneumo.study.collectives import Floats
from pneumo.study.statistics import LEVEL, hodges_lehmann


@dataclass(frozen=True, slots=True)
class Pop:
    """POP's metrics of one run over its timed blocks, each 1 where nothing is lost.

    `transfer_efficiency` is the time without transfer (from the replay) over the time, `serialisation_efficiency` what
    else communication efficiency consists of: ranks that wait for each other in turns. Both None without a replay.
    `computation_scalability` is None without a serial reference; above 1 where the ranks together computed less.
    """

    load_balance: float
    communication_efficiency: float
    computation_scalability: float | None
    transfer_efficiency: float | None
    serialisation_efficiency: float | None

    @property
    def parallel_efficiency(self) -> float:
        """Useful time over all time."""
        return self.load_balance * self.communication_efficiency

    @property
    def global_efficiency(self) -> float | None:
        """Parallel efficiency times computation scalability."""
        return None if self.computation_scalability is None else self.parallel_efficiency * self.computation_scalability


def pop(account: Account) -> Pop | None:
    """POP's metrics of an account; None where no rank has computed anything."""
    mean, most = float(account.useful_s.mean(1).sum()), float(account.useful_s.max(1).sum())
    length = float(account.length_s.sum())
    if mean <= 0 or length <= 0:
        return None
    communication, serial = most / length, account.reference_useful_s
    ideal = account.what_if.scenarios_s["no transfer"] if account.what_if else None
    return Pop(
        load_balance=mean / most,
        communication_efficiency=communication,
        computation_scalability=None if serial is None else float(serial.sum()) / float(account.useful_s.sum()),
        transfer_efficiency=None if ideal is None else ideal / length,
        serialisation_efficiency=None if ideal is None else most / ideal,
    )


def speedups(account: Account) -> dict[int, float]:
    """The speedup over the reference in each block, by block number; none without a reference."""
    if account.lost_s is None:
        return {}
    # N*T_N less what is lost is the reference's time for as many images.
    found = account.entry.ranks - account.lost_s.sum(1) / account.length_s
    return dict(zip(account.blocks, found.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Parameter:
    """A fitted parameter with its limits; None where neither blocks nor points leave freedom to estimate any."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Fit:
    """A law fitted to speedups by least squares of their logarithms; `cannot_tell` says in words what it does not.

    `parameters` is empty where there are too few points. `limits` says what theirs are: of the fits of each block
    (interval or range, see `hodges_lehmann`), or of how far the points are from the law, by the delta method with
    Student's t. No limit leaves the parameter's domain.
    """

    law: str
    points: dict[int, float]
    parameters: dict[str, Parameter]
    cannot_tell: tuple[str, ...]
    limits: Literal["interval", "range", "misfit"] | None = None

    def speedup(self, ranks: int) -> float:
        """What the law gives for this many ranks."""
        return float(_LAWS[self.law][1](np.array([float(ranks)]), [p.value for p in self.parameters.values()])[0])


def _amdahl(n: Floats, p: Sequence[float]) -> Floats:
    return 1 / (p[0] + (1 - p[0]) / n)


def _usl(n: Floats, p: Sequence[float]) -> Floats:
    return n / (1 + p[0] * (n - 1) + p[1] * n * (n - 1))


_Law = Callable[[Floats, Sequence[float]], Floats]
_LAWS: dict[str, tuple[dict[str, float], _Law]] = {  # the parameters, each from 0 to here
    "Amdahl": ({"serial fraction": 1.0}, _amdahl),
    "USL": ({"contention": 1.0, "coherency": math.inf}, _usl),
}
AT_LIMIT, EXACT = 1e-6, 1e-3  # how near to a limit, or to its point relative to it, counts as there


def fit(
    law: str, speedups: Mapping[int, float], cores: int, blocks: Mapping[int, Mapping[int, float]] | None = None
) -> Fit:
    """Fit "Amdahl" (1967) or "USL" (Gunther's universal scalability law, 2007) to {ranks: speedup}.

    The speedup at one rank is 1 by definition and tells nothing. `cores` are those that the ranks share. `blocks` are
    the speedups of each block, {ranks: {block: speedup}}; where at least two of them have all ranks, a fit to each of
    these gives the limits.
    """
    domain = _LAWS[law][0]
    points = {n: s for n, s in sorted(speedups.items()) if n > 1}
    if len(points) < len(domain):
        many = f"{len(points)} number{'s' if len(points) != 1 else ''} of ranks above one"
        return Fit(law, points, {}, (f"{law} has {len(domain)} parameters; {many} cannot give them.",))
    x, jacobian, residual = _solve(law, points)
    of_block = [_solve(law, one)[0] for one in _by_block(points, blocks or {})]
    pairs: list[tuple[float | None, float | None]] = [(None, None)] * x.size
    limits: Literal["interval", "range", "misfit"] | None = None
    if len(of_block) > 1:
        found = [hodges_lehmann(values) for values in np.transpose(of_block)]
        pairs, limits = [(min(e.low, v), max(e.high, v)) for e, v in zip(found, x.tolist(), strict=True)], found[0].kind
    elif residual.size > x.size:
        half, limits = _half_width(jacobian, residual), "misfit"
        ends = np.maximum(x - half, 0), np.minimum(x + half, list(domain.values()))
        pairs = list(zip(*(end.tolist() for end in ends), strict=True))
    parameters = {name: Parameter(v, *pair) for name, v, pair in zip(domain, x.tolist(), pairs, strict=True)}
    untold = _untold(law, points, parameters, float(np.abs(residual).max()), cores)
    return Fit(law, points, parameters, tuple(untold), limits)


def _by_block(points: Mapping[int, float], blocks: Mapping[int, Mapping[int, float]]) -> list[dict[int, float]]:
    """The speedups {ranks: speedup} of each block in which all of the points' ranks have one."""
    shared = set.intersection(*(set(blocks.get(n, ())) for n in points))
    return [{n: blocks[n][block] for n in points} for block in sorted(shared)]


def _solve(law: str, points: Mapping[int, float]) -> tuple[Floats, Floats, Floats]:
    """The parameters (p,) that fit best, the Jacobian (points, p) there, and the logarithmic residuals (points,)."""
    from scipy.optimize import least_squares

    domain, function = _LAWS[law]
    n, logs = np.array(list(points), dtype=np.float64), np.log(list(points.values()))
    start, bounds = np.full(len(domain), 0.05), (0, list(domain.values()))
    found = least_squares(lambda p: np.log(function(n, p)) - logs, start, bounds=bounds)
    return found.x, found.jac, found.fun


def _half_width(jacobian: Floats, residual: Floats) -> Floats:
    """By the delta method, half of each parameter's interval."""
    from scipy.stats import t

    freedom = residual.size - jacobian.shape[1]
    variance = float(residual @ residual) / freedom
    half: Floats = np.sqrt(np.diag(np.linalg.pinv(jacobian.T @ jacobian)) * variance)
    return half * float(t.ppf((1 + LEVEL) / 2, freedom))


def _untold(
    law: str, points: Mapping[int, float], parameters: Mapping[str, Parameter], miss: float, cores: int
) -> list[str]:
    """What the fit does not tell, as sentences; `miss` is the largest logarithmic residual."""
    said, domain = [], _LAWS[law][0]
    many = f"{len(points)} point{'s' if len(points) > 1 else ''}"
    if miss > EXACT:
        said.append(f"{law} misses its {many} by up to {100 * math.expm1(miss):.0f} %.")
    elif len(points) == len(domain):
        said.append(f"{law} goes through its {many} exactly: nothing is left to check it by.")
    crowded = [n for n in points if n > cores]
    if crowded:
        ranks = ", ".join(map(str, crowded))
        said.append(f"At {ranks} ranks on {cores} cores the lack of cores is taken for a property of the program.")
    for name, p in parameters.items():
        limit = next((x for x in (0.0, domain[name]) if abs(p.value - x) < AT_LIMIT), None)
        if limit is not None:
            why = ": slower than serial, which Amdahl cannot describe" if law == "Amdahl" and limit else ""
            said.append(f"The {name} is at its limit of {limit:.0f}{why}.")
    if law == "Amdahl":
        said.append("What does not shrink with the ranks is called serial, whether it is communication or waiting.")
    elif (coherency := parameters["coherency"].value) > 1e-9:
        peak = math.sqrt(max(0.0, 1 - parameters["contention"].value) / coherency)
        if peak > max(points):
            said.append(f"Its peak at {peak:.0f} ranks lies beyond what was measured.")
    return said
