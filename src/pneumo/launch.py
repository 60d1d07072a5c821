"""python -m pneumo.launch: the study, from the data to the printed comparison, in one MPI world."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from pneumo import process
from pneumo.config import Command, Study, parse
from pneumo.errors import PneumoError, Refused
from pneumo.job import Job
from pneumo.plan import Plan, make_plan
from pneumo.progress import Progress
from pneumo.world import Together, World, launched

if TYPE_CHECKING:
    import pandas as pd

    from pneumo.data.split import Split
    from pneumo.data.store import Store
    from pneumo.study.results import ResultFolder

T = TypeVar("T")

SAMPLE_PATIENTS = 800
VALIDATE, CALIBRATE = 0.5, 0.1  # of the images in the subset; the rest trains


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study; returns the exit code: 0 done, 1 failed, 2 refused."""
    command, refused = None, None
    try:
        command = parse(sys.argv[1:] if argv is None else argv)
    except Refused as error:
        refused = error
    if refused is None and (command is None or command.dry_run):
        return _without_world(command)
    process.keep_memory()
    process.stay_offline()
    with World.start() as world:
        if refused is not None:
            return world.refuse(refused)
        assert command is not None
        try:
            return _run(command, world)
        except Together as error:
            return world.refuse(error)
    return 1


def _without_world(command: Command | None) -> int:
    """Help has been printed by the parser; a dry run prints its plan. Of several ranks the first one speaks."""
    started = launched()
    if command is None or (started and started[2] != 0):
        return 0
    cores = len(os.sched_getaffinity(0))
    size = started[1] if started else max(command.study.ranks or (8,))
    try:
        plan = make_plan(command.study, world_size=size, cores=cores, local_size=size, gpus=process.gpu_count())
        _show_plan(command, plan, size, cores)
    except Refused as error:
        print(f"pneumo: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _show_plan(command: Command, plan: Plan, size: int, cores: int) -> None:
    """Print which runs a study would make, with images, steps and bytes of gradient."""
    from pneumo.models import MODELS

    study = command.study
    train = len(_split(study, _labels(study)).train)
    gradient_bytes = 4 * MODELS[study.model].parameters(study.size)
    rows = [
        {
            **asdict(run),
            "train_images": train,
            "steps_per_epoch": -(-train // run.global_batch),
            "gradient_bytes": gradient_bytes,
        }
        for run in plan.runs
    ]
    print(f"{len(rows)} runs, interleaved in {study.blocks} timed blocks, in a world of {size} ranks on {cores} cores:")
    for row, run in zip(rows, plan.runs, strict=True):
        print(
            f"  {run}: about {train} images an epoch, {row['steps_per_epoch']} steps of {run.global_batch}, "
            f"{gradient_bytes / 1e6:.1f} MB of gradient a step"
        )
    for gone in plan.missing:
        print(f"  {gone.backend} on {gone.ranks} ranks: left out, {gone.why}")
    if command.json:
        command.json.write_bytes(msgspec.json.encode({"runs": rows, "missing": plan.missing}))


def _labels(study: Study) -> "pd.DataFrame":
    """What the tables say of the patients, before any image is read: the columns that `split` needs."""
    import pandas as pd

    from pneumo.data.patients import SampleConfig, person
    from pneumo.data.rsna import read_tables

    if study.data is not None:
        known = [(p.patient_id, p.label, p.detailed) for p in read_tables(study.data)[0]]
    else:
        config = SampleConfig(patients=SAMPLE_PATIENTS, seed=study.seed)
        people = [person(config, index) for index in range(SAMPLE_PATIENTS)]
        known = [(p.patient_id, int(bool(p.boxes)), p.detailed) for p in people]
    return pd.DataFrame(known, columns=["patient", "label", "detailed"])


def _run(command: Command, world: World) -> int:
    """The spine: plan, data, trainings, results; everything that can be refused is refused before work begins."""
    study = command.study
    plan = _agree(
        lambda: make_plan(
            study,
            world_size=world.size,
            cores=len(world.cores),
            local_size=world.local_size,
            gpus=process.gpu_count(),
        ),
    )
    process.limit_threads(plan.threads)
    world.run_on_first(lambda: _check_places(study))
    say = Progress(world)
    say(_describe(world, plan))
    store = _preprocess(study, world, say)
    split = world.run_on_first(lambda: _split(study, store.index))
    results = world.run_on_first(lambda: _create(study))
    say.log_to(results.path / "log.txt")
    job = Job(command, plan, world, store, split, results, say)
    try:
        job.train()
    except BaseException:
        if world.rank == 0:
            with contextlib.suppress(Exception):
                results.flush()
                job.write_run("failed")
        raise
    world.run_on_first(job.finish)
    return 0


def _agree(function: Callable[[], T]) -> T:
    """Call what raises a PneumoError on every rank alike or on none, so that the error is said once."""
    try:
        return function()
    except PneumoError as error:
        raise Together(error) from None


def _check_places(study: Study) -> None:
    """Refuse data that is not there and a place for results that cannot be written."""
    if study.data is not None:
        from pneumo.data.rsna import read_tables

        read_tables(study.data)
    if study.mapping is not None and not study.mapping.is_file():
        raise Refused(f"--mapping {study.mapping}: there is no such file.")
    for place in (study.out / study.study, _cache(study)):
        try:
            place.mkdir(parents=True, exist_ok=True)
            if not os.access(place, os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise Refused(f"Cannot write to {place} ({error.strerror}); choose another place.") from None


def _cache(study: Study) -> Path:
    if study.cache is not None:
        return study.cache
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pneumo"


def _preprocess(study: Study, world: World, say: Progress) -> "Store":
    from pneumo.data.preprocess import DataConfig, preprocess
    from pneumo.data.sample import SampleConfig

    config = DataConfig(
        data=study.data,
        cache=_cache(study),
        sizes=(study.size,),
        sample=SampleConfig(patients=SAMPLE_PATIENTS, seed=study.seed),
        strict=study.strict,
    )
    return _agree(lambda: preprocess(config, world.comm, interface=world.interface, report=say))


def _split(study: Study, index: "pd.DataFrame") -> "Split":
    from pneumo.data.rsna import read_mapping
    from pneumo.data.split import split

    mapping = read_mapping(study.mapping) if study.mapping else None
    return split(
        index,
        seed=study.seed,
        subset=study.subset,
        validate=VALIDATE,
        calibrate=CALIBRATE,
        mapping=mapping,
    )


def _create(study: Study) -> "ResultFolder":
    from pneumo.study.results import ResultFolder

    return ResultFolder.create(study.out, study.study)


def _describe(world: World, plan: Plan) -> str:
    ranks, cores = world.size, world.total_cores
    more = ": more ranks than cores" if ranks * plan.threads > cores else ""
    hosts = f"{len(world.hosts)} hosts" if not world.one_node else world.hosts[0]
    bindings = ", ".join(
        f"{k} rank{'s' if k > 1 else ''} {world.binding(k, plan.threads)}" for k in sorted({r.ranks for r in plan.runs})
    )
    return f"{ranks} ranks on {cores} cores of {hosts}{more}; {plan.threads} thread(s) a rank; binding: {bindings}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = main()
    if code:
        time.sleep(0.2)  # the first rank that leaves with an error makes the launcher kill those still leaving
    sys.exit(code)
