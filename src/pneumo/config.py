"""A study: what the flags and a TOML file ask for; parsed once, checked, frozen."""

import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from pneumo.backends import BACKENDS, COMMS
from pneumo.errors import Refused
from pneumo.flags import nearest, one_sentence, split
from pneumo.inject import Injection, parse_injections
from pneumo.models import MODELS, Settings, Usual
from pneumo.study.schema import names_a_folder

DETECTOR_LAYERS = 22  # below its head
MAX_SEED = 2**63 - 1  # what torch and NumPy take
_COMPARE, _DATA, _TRAIN = "What to compare", "Data", "Training and timing"
_DETECTOR, _OUTPUT = "The detector", "Results"


def _split_numbers(_type: Any, tokens: Sequence[Any]) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in split(_type, tokens)))
    except ValueError:
        raise Refused(f"--ranks {tokens[0].value}: ranks are whole numbers with commas between, as in 1,2,4.") from None


def _option(group: str, converter: Any = None) -> Parameter:
    if converter is None:
        return Parameter(group=group)
    return Parameter(group=group, converter=converter, n_tokens=1, accepts_keys=False, negative_iterable="")


@dataclass(frozen=True, slots=True)
class Study:
    """Everything that is asked for. What is None follows from the world: its ranks, cores and GPUs."""

    model: Annotated[str, _option(_COMPARE)] = "cnn"
    "The model: cnn, yolo; or sleep, whose compute is sleep: no model, but a way to learn with --inject."
    backends: Annotated[tuple[str, ...] | None, _option(_COMPARE, split)] = None
    "Backends with commas between: serial,ddp,fsdp,horovod (all that are installed); fsdp-async gathers a layer ahead."
    comm: Annotated[tuple[str, ...] | None, _option(_COMPARE, split)] = None
    "Communication libraries of ddp and fsdp(-async): gloo,pneumo,nccl (nccl with a GPU a rank, else gloo and pneumo)."
    ranks: Annotated[tuple[int, ...] | None, _option(_COMPARE, _split_numbers)] = None
    "Numbers of ranks, as in 1,2,4 (powers of two and the world, as far as a batch of at most 64 can be divided)."
    threads: Annotated[int | None, _option(_COMPARE)] = None
    "Threads a rank (cores divided by ranks of the world, at least 1)."

    data: Annotated[Path | None, _option(_DATA)] = None
    "A folder in RSNA's layout (the built-in, generated sample)."
    mapping: Annotated[Path | None, _option(_DATA)] = None
    "RSNA's mapping file: splits by person instead of by image."
    subset: Annotated[Literal["balanced", "all"], _option(_DATA)] = "balanced"
    "balanced (as many negatives as positives) or all."
    size: Annotated[int | None, _option(_DATA)] = None
    "Edge of the square pictures, in pixels (128 for cnn, 416 for yolo)."
    cache: Annotated[Path | None, _option(_DATA)] = None
    "Where preprocessed pictures are kept (pneumo in the user's cache)."
    strict: Annotated[bool, _option(_DATA)] = False
    "Refuse data with anything in quarantine."

    epochs: Annotated[int | None, _option(_TRAIN)] = None
    "Train for this many epochs (5 where the budget allows, 60 for yolo)."
    budget: Annotated[str | None, _option(_TRAIN)] = None
    "Time for all trainings together, as in 240s or 10m (240s, 800s for yolo; none where --epochs is given)."
    blocks: Annotated[int, _option(_TRAIN)] = 6
    "Timed blocks a run."
    global_batch: Annotated[int | None, _option(_TRAIN)] = None
    "Images a step over all ranks (32, or 24 where 3 ranks are among them; 8 to 24 for yolo)."
    rank_batch: Annotated[int | None, _option(_TRAIN)] = None
    "Weak scaling: images a step and rank, instead of --global-batch."
    learning_rate: Annotated[float | None, _option(_TRAIN)] = None
    "Adam's step size, the highest one where it has a schedule (0.001 for cnn, 0.002 for yolo)."
    inject: Annotated[tuple[Injection, ...], _option(_TRAIN, parse_injections)] = ()
    (
        "Known causes of loss, as in rank=1,phase=backward,delay=20ms,cause=sleep (or compute, replicated, busy), or "
        "rank=0,phase=validate,delay=20ms (or checkpoint): before each step, alone, while the others wait."
    )
    patience: Annotated[int, _option(_TRAIN)] = 0
    (
        "Stop all runs early, after the same block: that after which no run's AUC (of yolo mAP@0.5) on the calibration "
        "patients has improved for this many blocks, never before 6 (0 is never). Evaluated and kept are the weights "
        "of the stop, not the best ones."
    )
    seed: Annotated[int, _option(_TRAIN)] = 0
    "Decides the split, the order, the augmentation and the first parameters (the built-in sample stays the same)."

    batch_norm: Annotated[Literal["sync", "ghost", "local"], _option(_DETECTOR)] = "ghost"
    "Statistics of batch norm: sync (over all ranks), ghost (over groups of images, the same for all runs), or local."
    groups: Annotated[int | None, _option(_DETECTOR)] = None
    (
        "Groups of the global batch for --batch-norm ghost: about 8 images each, as far as all --ranks divide their "
        "number. Studies with other --ranks train the same model only with the same number."
    )
    weights: Annotated[Path | None, _option(_DETECTOR)] = None
    "A YOLOv8n checkpoint to begin with (random numbers)."
    freeze: Annotated[int, _option(_DETECTOR)] = 0
    "Keep this many of the first layers of --weights as they are."

    study: Annotated[str, _option(_OUTPUT)] = "main"
    "The study's name: results go to a folder OUT/STUDY/TIME."
    out: Annotated[Path, _option(_OUTPUT)] = Path("results")
    "Where results go."
    save: Annotated[bool, _option(_OUTPUT)] = False
    "Keep each trained model in checkpoints/."
    trace: Annotated[bool, _option(_OUTPUT)] = False
    "Write trace.json.gz: sampled steps as a timeline for ui.perfetto.dev or chrome://tracing."

    @property
    def budget_s(self) -> float | None:
        """The budget in seconds; None where the epochs alone decide."""
        if self.budget is not None:
            return seconds(self.budget)
        return None if self.epochs is not None else self._usual.budget_s

    @property
    def most_epochs(self) -> int:
        """The epochs that are trained for, where the budget allows them."""
        return self.epochs or self._usual.epochs

    @property
    def settings(self) -> Settings:
        """What is asked of the model."""
        size = self._usual.size if self.size is None else self.size
        rate = self._usual.learning_rate if self.learning_rate is None else self.learning_rate
        return Settings(size, rate, self.batch_norm, self.weights, self.freeze)

    @property
    def _usual(self) -> Usual:
        return MODELS[self.model].usual


@dataclass(frozen=True, slots=True)
class Command:
    """A study, and what to do with it."""

    study: Study
    dry_run: bool = False
    json: Path | None = None


def seconds(text: str) -> float:
    """Read a duration such as 240s, 4m, 1.5h or a plain number of seconds; raises Refused."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h|)", text.strip())
    if not match or float(match[1]) <= 0:
        raise Refused(f"--budget {text}: a duration is a number above 0 with s, m or h, as in 240s.")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def parse(argv: Sequence[str], *, show_help: bool = True) -> Command | None:
    """Read flags, and a TOML file where one is named, which flags override; None where --help was asked for.

    Of several ranks only one should `show_help`. Raises Refused with one sentence for anything that is unknown or out
    of range.
    """
    found: list[tuple[tuple[str, ...], Command]] = []
    app = _app(found)
    flags = [f"--{f.name.replace('_', '-')}" for f in fields(Study)] + ["--dry-run", "--json", "--help"]
    with one_sentence(flags):
        # Read twice: only the first reading tells the file's name from the flags' values.
        if not _read(app, argv, show_help):
            return None
        if files := found[0][0]:
            _read(app, [*_from_file(_only(files), argv), *argv], show_help)
    made = found[-1][1]
    _check(made.study)
    return made


def _app(found: list[tuple[tuple[str, ...], Command]]) -> App:
    """The command line; what it is called with is added to `found`: what stood without a flag, and the command."""
    app = App(
        name="python -m pneumo.launch",
        usage="Usage: python -m pneumo.launch [FILE.toml] [OPTIONS]",
        help="Train with serial, DDP, FSDP and Horovod in one MPI world, interleaved, and compare.",
        version_flags=[],
    )

    @app.default
    def command(
        *file: Annotated[str, Parameter(help="A TOML file with any of the settings below.")],
        study: Annotated[Study, Parameter(name="*")] = Study(),
        dry_run: Annotated[bool, Parameter(negative="", help="Print the plan; needs no mpirun.")] = False,
        json: Annotated[Path | None, Parameter(help="Also write the summary (or the plan) to this file.")] = None,
    ) -> None:
        found.append((file, Command(study, dry_run, json)))

    return app


def _read(app: App, tokens: Sequence[str], show_help: bool) -> bool:
    """Call what the tokens ask for; False where that is help, which is shown only if it should be."""
    function, bound, _ = app.parse_args(tokens, print_error=False, exit_on_error=False)
    is_ours = function is app.default_command
    if is_ours or show_help:
        function(*bound.args, **bound.kwargs)
    return is_ours


def _only(files: Sequence[str]) -> str:
    """The one TOML file among what stands on the command line without a flag."""
    stray = next((name for name in files if not name.endswith(".toml")), files[-1])
    if stray != files[0] or len(files) > 1 or not stray.endswith(".toml"):
        hint = "values of a flag have commas and no spaces between them, as in --ranks 1,2"
        raise Refused(f"{stray}: one TOML file is all that can be given without a flag ({hint}).")
    return stray


def _from_file(file: str, tokens: Sequence[str]) -> list[str]:
    """Turn a TOML file into flags, without those that the tokens give themselves."""
    try:
        content = tomllib.loads(Path(file).read_text())
    except OSError as error:
        raise Refused(f"Cannot read {file} ({error.strerror}); name an existing TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refused(f"{file} is not valid TOML: {error}.") from None
    known = [f.name for f in fields(Study)]
    flags: list[str] = []
    for key, value in {"study": Path(file).stem, **content}.items():
        if key not in known:
            raise Refused(f"Unknown key {key} in {file}: {nearest(key, known)}.")
        flag = f"--{key.replace('_', '-')}"
        if any(t.split("=")[0] in (flag, flag.replace("--", "--no-")) for t in tokens):
            continue
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-"))
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            flags.append(f"{flag}={text}")
    return flags


def _check(study: Study) -> None:
    """Refuse what can be refused without knowing the world."""
    if study.model not in MODELS:
        raise Refused(f"Unknown model {study.model}: {nearest(study.model, MODELS)}.")
    for name in study.backends or ():
        if name not in BACKENDS:
            raise Refused(f"Unknown backend {name}: {nearest(name, BACKENDS)}.")
    for name in study.comm or ():
        if name not in COMMS:
            raise Refused(f"Unknown comm {name}: {nearest(name, COMMS)}.")
    at_least_one = ("threads", "epochs", "blocks", "global_batch", "rank_batch", "groups")
    for name in at_least_one:
        value = getattr(study, name)
        if value is not None and value < 1:
            raise Refused(f"--{name.replace('_', '-')} {value}: this has to be at least 1 ({name}).")
    for ranks in study.ranks or ():
        if ranks < 1:
            raise Refused(f"--ranks {ranks}: a run has at least 1 rank.")
    if study.ranks == () or study.backends == () or study.comm == ():
        raise Refused("--ranks, --backends and --comm need at least one value each.")
    if study.patience:
        from pneumo.patience import require_effect

        require_effect(study.patience, study.blocks)
    if not 0 <= study.seed <= MAX_SEED:
        raise Refused(f"--seed {study.seed}: a seed is from 0 to {MAX_SEED}.")
    if not names_a_folder(study.study):
        raise Refused(f"--study {study.study!r}: this cannot name a folder of results; choose a plain name.")
    size, multiple, rate = study.settings.size, MODELS[study.model].usual.multiple, study.settings.learning_rate
    least = max(16, 2 * multiple)
    if size % multiple or not least <= size <= 1024:
        raise Refused(f"--size {size}: pictures have an edge of {least} to 1024 pixels, a multiple of {multiple}.")
    if not rate > 0 or math.isinf(rate):
        raise Refused(f"--learning-rate {rate}: a step size is above 0.")
    _check_detector(study)
    if study.global_batch and study.rank_batch:
        raise Refused("--global-batch and --rank-batch exclude each other; give one.")
    _ = study.budget_s


def _check_detector(study: Study) -> None:
    """Refuse what only the detector has, of another model or out of range."""
    if not 0 <= study.freeze <= DETECTOR_LAYERS:
        raise Refused(f"--freeze {study.freeze}: the detector has 0 to {DETECTOR_LAYERS} layers that can be frozen.")
    if study.model != "yolo":
        for flag in ("weights", "freeze", "groups", "batch_norm"):
            if getattr(study, flag) != Study.__dataclass_fields__[flag].default:
                name = flag.replace("_", "-")
                raise Refused(f"--{name} belongs to --model yolo, and the model is {study.model}.")
    if study.freeze and study.weights is None:
        raise Refused(f"--freeze {study.freeze} keeps layers of a checkpoint; name one with --weights FILE.")
    if study.groups and (study.batch_norm != "ghost" or study.rank_batch):
        raise Refused("--groups are those of a --global-batch in --batch-norm ghost.")
