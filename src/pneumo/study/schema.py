"""What run.json and summary.json hold: strict, typed, versioned; everything else in a study reads or writes these.

Light on purpose (msgspec only): flags, dry runs and the training side import it too.
"""

from typing import Any, Literal

import msgspec

VERSION = 1
PHASES = ("data", "forward", "backward", "comm", "optimizer", "other")

State = Literal["running", "done", "failed", "stopped"]
VerdictName = Literal["faster", "slower", "equivalent", "undecided"]


def names_a_folder(study: str) -> bool:
    """Whether results can be kept in a folder of this name beside the link `latest`."""
    return study not in ("", ".", "..", "latest") and "/" not in study and "\0" not in study


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A record that refuses fields it does not know, on reading as on making."""


class RunEntry(_Strict, frozen=True, kw_only=True):
    """One training of a study: what ran, where, and how much memory it held.

    `answers` says whether its model gives boxes beside the probability; `groups` are the virtual ones of a batch.
    """

    run: int
    model: str
    backend: str
    comm: str
    ranks: int
    threads: int
    binding: str
    device: str
    global_batch: int
    groups: int = 1
    answers: Literal["probability", "boxes"] = "probability"
    parameters: int
    gradient_bytes: int
    state_bytes: int | None = None
    step_peak_bytes: int | None = None
    note: str | None = None


class Absent(_Strict, frozen=True, kw_only=True):
    """A row that was asked for and could not run, with the reason as a sentence's part ("not built: no compiler")."""

    backend: str
    comm: str
    ranks: int
    why: str


class Part(_Strict, frozen=True, kw_only=True):
    """One part of the split: its images, and how many of them show pneumonia."""

    images: int
    positives: int


class DataFacts(_Strict, frozen=True, kw_only=True):
    """The data of a study: counts, the parts of the split, and what was left out and why (counts by reason).

    `natural_prevalence` is the share of positives among all sound images, before any balancing. The built-in sample
    has none of its own: metrics are formed at RSNA's (see `metrics.natural_prevalence`).
    """

    images: int
    patients: int
    classes: dict[str, int]
    parts: dict[str, Part]
    quarantine: dict[str, int]
    fingerprint: str
    natural_prevalence: float
    split_by: Literal["image", "person"]


class Effort(_Strict, frozen=True, kw_only=True):
    """What a rank's time went to while the images were preprocessed, in seconds; the parts sum to the whole of it.

    `data_s`: reading, decoding, resizing and writing images, in tasks of Dask's; `dask_s`: in Dask beside that, where
    it starts, hands out tasks, has none left, and ends; `comm_s`: waiting for other ranks by MPI; `other_s`: checksums,
    tables, and making the built-in sample. Of images that were in the cache there are only the last two.
    """

    data_s: float
    dask_s: float
    comm_s: float
    other_s: float


class Sampling(_Strict, frozen=True, kw_only=True):
    """Which steps have their phases in spans.parquet as intervals: of every timed block the first, and every k-th on.

    k is the least with which a block has at most `steps_per_block` of them. Only the number of steps and the result's
    own record decide, so all ranks keep the same steps. Warm-up steps, validation and shares are never sampled.
    """

    steps_per_block: int

    def __post_init__(self) -> None:
        if self.steps_per_block < 1:
            raise ValueError("a block has at least one sampled step")

    def of_block(self, steps: int) -> range:
        """The sampled ones of a block's steps, counted from 0 within it."""
        return range(0, steps, max(1, -(-steps // self.steps_per_block)))


class ClockHost(_Strict, frozen=True, kw_only=True):
    """Ranks that read one and the same clock, since they run under one kernel and in one time namespace of it.

    `check_ns` is what round trips between the first of them and the others told of it: that their clocks differ by no
    more. None where the rank is alone.
    """

    name: str
    ranks: list[int]
    check_ns: int | None = None


class ClockSample(_Strict, frozen=True, kw_only=True):
    """One measurement of a clock against rank 0's, for all ranks of its host: `rank` is their first.

    At `at_ns` of that clock it was `offset_ns` ahead of rank 0's, give or take `bound_ns`, which holds for certain.
    """

    rank: int
    at_ns: int
    offset_ns: int
    bound_ns: int


class Clock(_Strict, frozen=True, kw_only=True):
    """The clocks (CLOCK_MONOTONIC) behind a result's stamps: who shares one, rank 0's first, and how far they differ.

    `source` is the clock source of rank 0's kernel, `resolution_ns` the clock's unit.
    """

    resolution_ns: int
    source: str | None
    hosts: list[ClockHost]
    samples: list[ClockSample] = []


class EarlyStopping(_Strict, frozen=True, kw_only=True):
    """What --patience watched, and whether it ended the trainings of a study, all after the same block.

    `figures` has, for each run, its `figure` on the calibration patients after each block but the last planned one;
    null where it is undefined. Where the trainings stopped, it was after the block `stopped_after` of `blocks`, the
    last `unimproved` of which had improved no run's figure.
    """

    patience: int
    blocks: int
    figure: Literal["AUC", "mAP@0.5"]
    figures: dict[int, list[float | None]]
    stopped_after: int | None = None
    unimproved: int = 0

    @property
    def sentence(self) -> str | None:
        """That the trainings stopped early, and why; None where they did not."""
        if self.stopped_after is None:
            return None
        return (
            f"stopped early after block {self.stopped_after} of {self.blocks}: no run's {self.figure} on the "
            f"calibration patients has improved for {self.unimproved} block{'s' if self.unimproved > 1 else ''}"
        )


class RunFile(_Strict, frozen=True, kw_only=True):
    """run.json: the configuration, the runs and the provenance of a result; `cores` are those of all hosts together.

    Where `clock` has more than one host, the stamps of the tables are each rank's own; `results.load_table` moves them.
    `early_stopping` is null where there was no --patience.
    """

    schema: int = VERSION
    study: str
    started: str
    ended: str | None = None
    state: State
    command: list[str]
    config: dict[str, Any]
    runs: list[RunEntry]
    absent: list[Absent] = []
    cores: int
    hosts: list[str]
    warmup_steps: int
    sampling: Sampling | None = None
    data: DataFacts
    preprocessing: list[Effort] = []  # by rank of the world
    clock: Clock | None = None
    early_stopping: EarlyStopping | None = None
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        _check_version(self.schema)


class Spread(_Strict, frozen=True, kw_only=True):
    """An estimate with its interval, or with its range where the blocks are too few for an interval.

    `median` is the blocks' median for a time, and for a ratio the pseudo-median of Hodges and Lehmann: the median of
    all pairs' (geometric) means.
    """

    median: float
    low: float
    high: float


class Verdict(_Strict, frozen=True, kw_only=True):
    """How a run compares with another one, in speed or in a cost; `more_blocks` says about how many more would decide.

    `margin` is the relative difference that still counts as equivalent; of a cost it is in the cost's own unit.
    """

    verdict: VerdictName
    margin: float
    more_blocks: int | None = None


class AucDifference(_Strict, frozen=True, kw_only=True):
    """The AUC of a run minus the serial reference's on the same patients, with its paired interval and p-value."""

    estimate: float
    low: float
    high: float
    p: float


class MapDifference(_Strict, frozen=True, kw_only=True):
    """The mAP@0.5 of a run minus the serial reference's on the same images, with its paired bootstrap interval."""

    estimate: float
    low: float
    high: float


class Subgroup(_Strict, frozen=True, kw_only=True):
    """The quality within one view, sex or age group."""

    by: Literal["view", "sex", "age"]
    group: str
    n: int
    positives: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    auc: float
    auc_interval: tuple[float, float]


class Late(_Strict, frozen=True, kw_only=True):
    """A rank that the others waited for: in which phase, why, for how many rank-seconds, how often."""

    rank: int
    phase: str
    cause: str
    rank_s: float
    count: int


class Compared(_Strict, frozen=True, kw_only=True):
    """What an account is about: the timed blocks that the serial reference has too, all of them where there is none.

    `steps` are a rank's over these blocks, `whole_rank_s` is their N*T_N.
    """

    blocks: list[int]
    steps: int
    whole_rank_s: float


class Losses(_Strict, frozen=True, kw_only=True):
    """The account of a run's validation or checkpoints, against the same of its serial reference; fields as in Row."""

    lost_rank_s: float | None
    loss: dict[str, float | None]
    items: dict[str, dict[str, float]]
    residual_rank_s: float | None
    residual_fraction: float | None
    late: list[Late]
    compared: Compared


class Replayed(_Strict, frozen=True, kw_only=True):
    """Seconds of all compared blocks: as recorded, as replayed with nothing changed, and by scenario (see `replay`)."""

    recorded_s: float
    replayed_s: float
    scenarios_s: dict[str, float]


class Efficiencies(_Strict, frozen=True, kw_only=True):
    """POP's metrics over the compared blocks (see `scaling.Pop`)."""

    parallel_efficiency: float
    load_balance: float
    communication_efficiency: float
    transfer_efficiency: float | None
    serialisation_efficiency: float | None
    computation_scalability: float | None
    global_efficiency: float | None


class Row(_Strict, frozen=True, kw_only=True):
    """One line of the comparison, identified by (backend, comm, ranks, threads).

    `time_s` is a block's; `total_s` and `cpu_s` are about the timed training steps of all blocks, the rank-seconds
    about those of the blocks in `compared`, of whose N*T_N `residual_fraction` is the residual's part. Fields that need
    a serial reference are null where the study has none. `loss` has the terms of the account (see `account`), null
    where the study cannot tell them, `items` the parts of some of them. `accounts` are those of the run's validation
    and checkpoints, by kind.
    """

    model: str
    backend: str
    comm: str
    ranks: int
    threads: int
    blocks: int
    steps: int
    images: int
    total_s: float
    time_s: Spread
    images_per_s: float
    speedup: Spread | None
    efficiency: Spread | None
    state_bytes: int | None
    step_peak_bytes: int | None
    cpu_s: float
    metrics: dict[str, int | float | None]
    intervals: dict[str, tuple[float, float]]
    lost_rank_s: float | None
    loss: dict[str, float | None]
    residual_rank_s: float | None
    residual_fraction: float | None
    late: list[Late]
    # What goes beyond the contract's keys.
    run: int
    interval_kind: Literal["interval", "range"]
    reference_threads: int | None = None
    attainable: float | None = None
    verdict: Verdict | None = None
    mcnemar_p: float | None = None
    auc_difference: AucDifference | None = None
    map_difference: MapDifference | None = None
    subgroups: list[Subgroup] = []
    warmup_steps: int = 0
    compared: Compared | None = None
    items: dict[str, dict[str, float]] = {}
    what_if: Replayed | None = None
    pop: Efficiencies | None = None
    accounts: dict[str, Losses] = {}


class Figures(_Strict, frozen=True, kw_only=True):
    """What a step of one run takes and moves: medians of the blocks, the ranks' means; null what cannot be told.

    `step_s` is from the first rank's begin to the last rank's end; it consists of `outside_s` (of which `off_cpu_s` was
    spent without a core) and `exposed_s`, and that of `peer_wait_s`, `queue_s` and `transfer_s` (see `account`; a queue
    that cannot be told is part of the transfer).
    `calls` and `bytes` are a rank's. `bytes_per_s` is the bandwidth of `traffic`.
    """

    run: int
    backend: str
    comm: str
    blocks: int
    step_s: Spread
    outside_s: float | None
    off_cpu_s: float | None
    exposed_s: float | None
    peer_wait_s: float | None
    queue_s: float | None
    transfer_s: float | None
    hidden_s: float | None
    calls: float | None
    bytes: float | None
    bytes_per_s: float | None


class Difference(_Strict, frozen=True, kw_only=True):
    """An estimated difference or ratio of two runs with its limits, and what can be said of it."""

    estimate: Spread
    verdict: Verdict


class Pair(_Strict, frozen=True, kw_only=True):
    """Run `ours` against run `theirs` (run numbers), within each block that both have.

    `speed` and `bandwidth` are ratios, above 1 where ours is faster. `seconds` are differences of a step's times by the
    names of `Figures` and `queue_and_transfer_s`, negative where ours takes less, which is called faster (hidden time
    is no cost; there it means less, too). Null where it cannot be told of both: a transfer that holds the queue is not
    compared with one that does not.
    """

    ours: int
    theirs: int
    blocks: int
    interval_kind: Literal["interval", "range"]
    speed: Difference
    bandwidth: Difference | None
    seconds: dict[str, Difference | None]


class Rivals(_Strict, frozen=True, kw_only=True):
    """The parallel runs on as many ranks and threads, and each two of them compared that share a block."""

    ranks: int
    threads: int
    runs: list[Figures]
    pairs: list[Pair]


class Summary(_Strict, frozen=True, kw_only=True):
    """summary.json: derived from a result's other files, and reproducible from them."""

    schema: int = VERSION
    study: str
    cores: int
    rows: list[Row]
    comparisons: list[Rivals] = []

    def __post_init__(self) -> None:
        _check_version(self.schema)


def _check_version(found: int) -> None:
    if found != VERSION:
        raise ValueError(f"schema version {found}, this program reads version {VERSION}")
