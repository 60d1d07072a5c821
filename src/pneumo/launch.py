"""python -m pneumo.launch: the study, from the data to the printed comparison, in one MPI world."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import msgspec

from pneumo import machine, places, process
from pneumo.command import leave
from pneumo.config import Command, Study, parse
from pneumo.errors import PneumoError, Refused
from pneumo.job import Job
from pneumo.models import MODELS
from pneumo.plan import Plan, make_plan, make_schedule
from pneumo.progress import Progress
from pneumo.world import Together, World, in_world, launched, speaks

if TYPE_CHECKING:
    import pandas as pd

    from pneumo.data.split import Split
    from pneumo.data.store import Store
    from pneumo.study.results import ResultFolder
    from pneumo.study.schema import Effort

T = TypeVar("T")

# The sample is the same for every seed of a study: its seeds change how it is split, shuffled and learnt from.
SAMPLE_PATIENTS, SAMPLE_SEED = 800, 0
RESULT_BYTES = 32 << 20  # of a result without its models, generously
VALIDATE, CALIBRATE = 0.5, 0.1  # of the images in the subset; the rest trains


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study; returns the exit code: 0 done, 1 failed, 2 refused."""
    command, refused = None, None
    try:
        command = parse(sys.argv[1:] if argv is None else argv, show_help=speaks())
    except Refused as error:
        refused = error
    if refused is None and (command is None or command.dry_run):
        return _without_world(command)
    process.keep_memory()
    process.share_cores()
    process.stay_offline()
    return in_world(lambda world: _run(cast(Command, command), world), refused)


def _without_world(command: Command | None) -> int:
    """Help has been printed by the parser; a dry run prints its plan. Of several ranks the first one speaks."""
    if command is None or not speaks():
        return 0
    started, cores = launched(), machine.usable_cores()
    size = started[1] if started else max(command.study.ranks or (8,))
    try:
        if command.json:
            places.require_file(command.json, "--json")
        if (weights := command.study.weights) is not None and not weights.is_file():
            raise Refused(f"--weights {weights}: there is no such file; name a YOLOv8n checkpoint.")
        plan = make_plan(command.study, world_size=size, cores=cores, local_size=size, gpus=process.gpu_count())
        _show_plan(command, plan, size, cores)
    except Refused as error:
        print(f"pneumo: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _show_plan(command: Command, plan: Plan, size: int, cores: int) -> None:
    """Print which runs a study would make, with images, steps and bytes of gradient."""
    study = command.study
    train = len(_parts(study, plan, _labels(study)).train)
    schedule = make_schedule(study, plan, train)
    gradient_bytes = 4 * MODELS[study.model].parameters(study.settings.size)
    rows = [
        {
            **asdict(run),
            "train_images": train,
            "steps_per_epoch": -(-train // run.global_batch),
            "gradient_bytes": gradient_bytes,
        }
        for run in plan.runs
    ]
    print(
        f"{len(rows)} runs, interleaved in {schedule.blocks} timed blocks of at most {schedule.steps} steps, "
        f"in a world of {size} ranks on {cores} cores:"
    )
    for row, run in zip(rows, plan.runs, strict=True):
        print(
            f"  {run}: about {train} images an epoch, {row['steps_per_epoch']} steps of {run.global_batch}, "
            f"{'at most ' * bool(study.freeze)}{gradient_bytes / 1e6:.1f} MB of gradient a step"
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
        config = SampleConfig(patients=SAMPLE_PATIENTS, seed=SAMPLE_SEED)
        people = [person(config, index) for index in range(SAMPLE_PATIENTS)]
        known = [(p.patient_id, int(bool(p.boxes)), p.detailed) for p in people]
    return pd.DataFrame(known, columns=["patient", "label", "detailed"])


def _run(command: Command, world: World) -> int:
    """The spine: plan, data, trainings, results; everything that can be refused is refused before work begins."""
    study = command.study
    plan = _plan(study, world)
    process.limit_threads(plan.threads)
    world.run_on_first(lambda: _check(command, plan))
    say = Progress(world)
    say(_describe(world, plan))
    if MODELS[study.model].answers == "boxes":
        say(world.run_on_first(lambda: _first_weights(study)))
        say(_statistics(study, plan))
    store, efforts = _preprocess(study, world, say)
    split = world.run_on_first(lambda: _parts(study, plan, store.index))
    results = world.run_on_first(lambda: _create(study))
    say.log_to(results.path / "log.txt")
    job = Job(command, plan, world, store, split, results, efforts, say)
    world.on_failure = job.fail
    job.train()
    world.run_on_first(job.finish)
    return 0


def _first_weights(study: Study) -> str:
    """What the detector begins with; raises Refused where the file is not one of its weights. On rank 0, once."""
    if study.weights is None:
        return "the detector begins with random numbers; --weights FILE begins with a checkpoint"
    from pneumo.models import weights, yolov8

    fitted = weights.fit(yolov8.build(), weights.read(study.weights)).sentence
    return f"{fitted} The first {study.freeze} layers stay as they are." if study.freeze else fitted


def _statistics(study: Study, plan: Plan) -> str:
    """Over which images batch norm takes its statistics."""
    if study.batch_norm != "ghost":
        return f"batch norm over {'all ranks' if study.batch_norm == 'sync' else 'the images of each rank'}"
    shapes = {(run.groups, run.global_batch / run.groups) for run in plan.runs}
    texts = [f"{_counted(groups, 'group')} of {_counted(images, 'image')}" for groups, images in sorted(shapes)]
    return f"batch norm over {' or '.join(texts)} of a batch (--groups)"


def _counted(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def _plan(study: Study, world: World) -> Plan:
    """Lay out the study on one rank, for the scarcest node: ranks of unequal nodes would plan differently."""
    nodes = world.comm.allgather((len(world.cores), world.local_size, process.gpu_count()))
    cores, ranks, gpus = zip(*nodes, strict=True)
    plan: Plan = world.run_on_first(
        lambda: make_plan(study, world_size=world.size, cores=min(cores), local_size=max(ranks), gpus=min(gpus))
    )
    return plan


def _agree(function: Callable[[], T]) -> T:
    """Call what raises a PneumoError on every rank alike or on none, so that the error is said once."""
    try:
        return function()
    except PneumoError as error:
        raise Together(error) from None


def _check(command: Command, plan: Plan) -> None:
    """Refuse data that will not do, as far as its tables tell, and places that cannot be written or are too small."""
    from pneumo.data.patients import SampleConfig

    study, cache = command.study, _cache(command.study)
    labels = _labels(study)
    _parts(study, plan, labels)
    models_bytes = 4 * MODELS[study.model].parameters(study.settings.size) * len(plan.runs) if study.save else 0
    places.require_folder(study.out / study.study, "--out", RESULT_BYTES + models_bytes)
    # What is in the cache already needs no room; whether it is this data is known only once all of it has been read.
    new_images = 0 if any(cache.glob("store-*")) else len(labels)
    file_bytes = SampleConfig().size ** 2 // 5 if study.data is None else 0
    places.require_folder(cache, "--cache", new_images * (study.settings.size**2 + file_bytes))
    if command.json:
        places.require_file(command.json, "--json")


def _cache(study: Study) -> Path:
    return places.picture_cache(study.cache)


def _preprocess(study: Study, world: World, say: Progress) -> "tuple[Store, list[Effort]]":
    from pneumo.data import effort
    from pneumo.data.preprocess import DataConfig, preprocess
    from pneumo.data.rsna import count_reasons
    from pneumo.data.sample import SampleConfig
    from pneumo.data.store import QUARANTINE

    config = DataConfig(
        data=study.data,
        cache=_cache(study),
        sizes=(study.settings.size,),
        sample=SampleConfig(patients=SAMPLE_PATIENTS, seed=SAMPLE_SEED),
        strict=study.strict,
    )
    say(f"preprocessing {study.data or 'the built-in sample'}")

    def work() -> "Store":
        return _agree(lambda: preprocess(config, world.comm, interface=world.interface, report=say.now_and_then))

    store, efforts = effort.measured(world.comm, work)
    left_out = "none left out"
    if store.quarantine:
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(store.quarantine).items())
        left_out = f"{len(store.quarantine)} left out ({reasons}): {store.path / QUARANTINE}"
    say(f"{len(store.index)} images, {left_out}")
    say(f"preprocessing took {effort.sentence(efforts)}")
    return store, efforts


def _parts(study: Study, plan: Plan, index: "pd.DataFrame") -> "Split":
    """Split the images of an index; raises Refused where they are too few, of one label, or make too few steps."""
    from pneumo.data.rsna import read_mapping
    from pneumo.data.split import split

    mapping = read_mapping(study.mapping) if study.mapping else None
    parts = split(
        index,
        seed=study.seed,
        subset=study.subset,
        validate=VALIDATE,
        calibrate=CALIBRATE,
        mapping=mapping,
    )
    make_schedule(study, plan, len(parts.train))
    if study.patience:
        from pneumo.patience import require_labels

        require_labels(study.patience, MODELS[study.model].answers, index["label"].to_numpy()[parts.calibrate])
    return parts


def _create(study: Study) -> "ResultFolder":
    from pneumo.study.results import ResultFolder

    return ResultFolder.create(study.out, study.study)


def _describe(world: World, plan: Plan) -> str:
    ranks, cores = world.size, world.total_cores
    most = max(run.ranks for run in plan.runs)
    sleep = f"; {ranks - most} of them only preprocess" if most < ranks else ""
    more = ": more ranks than cores" if ranks * plan.threads > cores else ""
    hosts = f"{len(world.hosts)} hosts" if not world.one_node else world.hosts[0]
    bindings = ", ".join(
        f"{k} rank{'s' if k > 1 else ''} {world.binding(k, plan.threads)}" for k in sorted({r.ranks for r in plan.runs})
    )
    batches = ", ".join(map(str, sorted({run.global_batch for run in plan.runs})))
    return (
        f"{ranks} ranks on {cores} cores of {hosts}{more}{sleep}; {plan.threads} thread(s) a rank; "
        f"binding: {bindings}; {batches} images a step"
    )


if __name__ == "__main__":
    leave(main)
