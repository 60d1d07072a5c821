"""How runs scale: POP's efficiencies from an account, and Amdahl's and Gunther's laws fitted to speedups.

POP (Performance Optimisation and Productivity centre, its standard metrics for parallel performance): time outside
communication is useful; parallel efficiency = load balance * communication efficiency, and global efficiency is that
times computation scalability, useful time of the serial run over that of all ranks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pneumo.study.account import Account
from pneumo.study.collectives import Floats
from pneumo.study.statistics import LEVEL


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


@dataclass(frozen=True, slots=True)
class Parameter:
    """A fitted parameter with its interval; None where the points leave no freedom to estimate one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Fit:
    """A law fitted to speedups by least squares of their logarithms; `cannot_tell` says in words what it does not.

    `parameters` is empty where there are too few points. Intervals are by the delta method with Student's t.
    """

    law: str
    points: dict[int, float]
    parameters: dict[str, Parameter]
    cannot_tell: tuple[str, ...]

    def speedup(self, ranks: int) -> float:
        """What the law gives for this many ranks."""
        return float(_LAWS[self.law][1](np.array([float(ranks)]), [p.value for p in self.parameters.values()])[0])


def _amdahl(n: Floats, p: Sequence[float]) -> Floats:
    return 1 / (p[0] + (1 - p[0]) / n)


def _usl(n: Floats, p: Sequence[float]) -> Floats:
    return n / (1 + p[0] * (n - 1) + p[1] * n * (n - 1))


_Law = Callable[[Floats, Sequence[float]], Floats]
_LAWS: dict[str, tuple[tuple[str, ...], _Law]] = {
    "Amdahl": (("serial fraction",), _amdahl),
    "USL": (("contention", "coherency"), _usl),
}


def fit(law: str, speedups: Mapping[int, float], cores: int) -> Fit:
    """Fit "Amdahl" (1967) or "USL" (Gunther's universal scalability law, 2007) to {ranks: speedup}.

    The speedup at one rank is 1 by definition and tells nothing. `cores` are those that the ranks share.
    """
    from scipy.optimize import least_squares

    names, function = _LAWS[law]
    points = {n: s for n, s in sorted(speedups.items()) if n > 1}
    n, logs = np.array(list(points), dtype=np.float64), np.log(list(points.values()))
    if n.size < len(names):
        many = f"{n.size} number{'s' if n.size != 1 else ''} of ranks above one"
        return Fit(law, points, {}, (f"{law} has {len(names)} parameter(s); {many} cannot give them.",))
    found = least_squares(
        lambda p: np.log(function(n, p)) - logs, np.full(len(names), 0.05), bounds=(0, [1, math.inf][: len(names)])
    )
    return Fit(
        law, points, _parameters(names, found.x, found.jac, found.fun), tuple(_limits(law, points, found.x, cores))
    )


def _parameters(names: tuple[str, ...], x: Floats, jacobian: Floats, residual: Floats) -> dict[str, Parameter]:
    from scipy.stats import t

    freedom = residual.size - x.size
    if freedom < 1:
        return {name: Parameter(float(v), None, None) for name, v in zip(names, x, strict=True)}
    variance = float(residual @ residual) / freedom
    half = t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(np.diag(np.linalg.pinv(jacobian.T @ jacobian)) * variance)
    return {
        name: Parameter(float(v), max(0.0, float(v - h)), float(v + h))
        for name, v, h in zip(names, x, half, strict=True)
    }


def _limits(law: str, points: Mapping[int, float], x: Floats, cores: int) -> list[str]:
    """What the fit does not tell, as sentences."""
    said = []
    if len(points) == x.size:
        said.append(f"{law} goes through its {len(points)} point(s) exactly: nothing is left to check it by.")
    crowded = [n for n in points if n > cores]
    if crowded:
        ranks = ", ".join(map(str, crowded))
        said.append(f"At {ranks} ranks on {cores} cores the lack of cores is taken for a property of the program.")
    if (x <= 1e-6).any():
        said.append("A parameter is at its limit of 0, where its interval holds on one side only.")
    if law == "Amdahl":
        said.append("What does not shrink with the ranks is called serial, whether it is communication or waiting.")
    elif x[1] > 1e-9:
        peak = math.sqrt(max(0.0, 1 - x[0]) / x[1])
        if peak > max(points):
            said.append(f"Its peak at {peak:.0f} ranks lies beyond what was measured.")
    return said
