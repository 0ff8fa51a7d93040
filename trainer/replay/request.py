"""What the trainer asks of its samplers for one task, and what that will cost.

Everything about a replay point (its trajectory, label, seeds, timestep, the step that uses it) is a function of this
request and the point's position alone: trainers and samplers of any number agree without talking.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import (
    Config,
    DataConfig,
    MethodName,
    Missing,
    OnStarved,
    OwnPoints,
    Placement,
    Points,
    Precision,
    Retirement,
    Solver,
    Timesteps,
)
from trainer.data.shards import IMAGE_LIMIT, read_regular, write_atomic
from trainer.errors import ConfigError, UserError, one_line
from trainer.run import RunDir
from trainer.steps import checkpoint_interval, replay_steps

if TYPE_CHECKING:
    from trainer.models.teacher import TeacherCard

REQUEST_SCHEMA = 5
_BLOCK, _RECORD, _NPY_HEADER = 512, 10240, 128  # of tar and npy files
_LABELLED_FIELDS = ("local_teacher_id", "local_classes", "outputs", "candidates", "missing")  # of labelled pools alone
# What may change between attempts without making another pool.
_FREE_FIELDS = (
    *("teacher", "local_teacher", "positions", "step_positions", "shards", "reuse"),
    *("pool_bytes", "pool_shards", "low_watermark", "store", "store_timeout", "request_timeout"),
)
REQUEST_LIMIT = 1 << 26  # bytes of request.json
KEPT_SHARDS = 4  # on_starved=reuse draws on so many of the latest shards
_STEPS_AHEAD = 5  # a trainer's present step, and those that it reads ahead
_SPARE_SHARDS = 3  # beside those used between two checkpoints: one kept back, one at each end of the interval


@dataclass(frozen=True)
class ReplayRequest:
    """`tasks/<k>/replay/request.json`, for learning task `task` (>= 2) with the teacher of the task before.

    `classes` are the global ids of all classes the teacher knows, in their fixed order. `points` is "renoised" (an end
    point x_0 and fresh noise), "trajectory" (states on the sampling path), "both" (of a trajectory's points the first
    half, rounded up, lie on its path, the others are re-noised), "noise" (nothing but noise: no path is sampled) or
    "labelled" (re-noised, see below); `targets` is "teacher" (its prediction) or "noise".
    The R re-noised points of a trajectory have independent timesteps, or one in each R-th part of the schedule
    (`stratified`). `positions` replay points are used over the whole task, `step_positions` in each step, from `shards`
    shards, each stored point `reuse` times. A shard holds `shard_trajectories` trajectories of `points_per_trajectory`
    points and is sampled in micro-batches of `sampler_batch`, its paths guided where `guidance` is not 1, against the
    predictions for `null_label` (-1: not guided). No more than `pool_bytes` of shards lie on disk at once;
    a pool is full with `pool_shards` unused ones (0: as many as there is room for), and filled again once no more than
    the share `low_watermark` of them is left.

    The pool lies in the run directory or in a `store`, which may be away for `store_timeout` seconds and has
    `request_timeout` for one answer.

    A "labelled" pool has two teachers: beside that of the classes before, `local_teacher` of the `local_classes` that
    are learnt now. Their classifiers, of `outputs` outputs, tell the class of what they sample; every class has as many
    trajectories, of at most `candidates` times as many sampled images, and `missing` says what stands in for the rest.
    """

    task: int
    teacher: str  # directory, relative to the run directory
    teacher_id: str
    seed: int
    classes: list[int]
    conditional: bool
    image_size: int
    channels: int
    timesteps: int
    points: str
    targets: str
    stratified: bool
    steps: int
    solver: str
    eta: float
    guidance: float
    null_label: int
    clip_sample: bool
    points_per_trajectory: int
    jitter: bool
    shard_trajectories: int
    sampler_batch: int
    precision: str
    compile: bool
    positions: int
    step_positions: int
    shards: int
    reuse: int
    pool_bytes: int
    pool_shards: int
    low_watermark: float
    local_teacher: str = ""  # directory, relative to the run directory
    local_teacher_id: str = ""
    local_classes: list[int] = field(default_factory=list)
    outputs: int = 0
    candidates: float = 1.0
    missing: str = Missing.repeat.value
    store: str = ""  # where the pool lies; empty: in the run directory
    store_timeout: float = DataConfig.store_timeout
    request_timeout: float = DataConfig.request_timeout
    schema: int = REQUEST_SCHEMA

    @property
    def labelled(self) -> bool:
        """Whether two teachers label their own images."""
        return self.points == OwnPoints.labelled.value

    @property
    def sampled(self) -> bool:
        """Whether trajectories are sampled; else they are groups of points with a label in common, which the teacher
        is asked about directly."""
        return self.labelled or self.points in [points.value for points in Points]

    @property
    def known_classes(self) -> list[int]:
        """Labels of the trajectories, of all teachers; none where they have no labels."""
        return [*self.classes, *self.local_classes] if self.conditional or self.labelled else []

    @property
    def path_points(self) -> int:
        """Points of a trajectory that lie on its path; they are the first, the others are re-noised."""
        pathless = self.labelled or not self.sampled
        return 0 if pathless else Points(self.points).on_path(self.points_per_trajectory)

    @property
    def renoised_points(self) -> int:
        return self.points_per_trajectory - self.path_points if self.sampled else 0

    @property
    def teacher_targets(self) -> bool:
        return self.targets == "teacher"

    @property
    def shard_points(self) -> int:
        """Points of one shard (S)."""
        return self.shard_trajectories * self.points_per_trajectory

    @property
    def shard_uses(self) -> int:
        """Positions that one shard serves."""
        return self.shard_points * self.reuse

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, self.image_size, self.image_size

    @property
    def evaluations_per_trajectory(self) -> int:
        """Network evaluations per image: the sampler's, two in each guided step, one to tell a class, and one for each
        teacher target at a point that does not lie on the path. Of a labelled pool as if every image were kept."""
        if not self.sampled:
            return self.points_per_trajectory
        relabelled = self.renoised_points if self.teacher_targets else 0
        return self.steps * (1 if self.guidance == 1.0 else 2) + self.labelled + relabelled

    @property
    def shard_bytes(self) -> int:
        """Upper bound of the size of one shard's tar."""
        image = 2 * math.prod(self.image_shape)  # fp16
        arrays = [image] if self.renoised_points else []
        arrays += [self.path_points * image] if self.path_points else []
        arrays += [self.points_per_trajectory * image] if self.teacher_targets else []
        arrays += [2 * self.outputs] if self.outputs else []
        longest = {
            "schema": REQUEST_SCHEMA,
            "trajectory": 2**63,
            "label": 2**31,
            "seed": -(2**63),
            "timesteps": [self.timesteps] * self.points_per_trajectory,
            "seeds": [-(2**63)] * self.points_per_trajectory,
        }
        members = [len(json.dumps(longest))] + [_NPY_HEADER + size for size in arrays]
        content = self.shard_trajectories * sum(_BLOCK + _round_up(size, _BLOCK) for size in members)
        return _round_up(content + 2 * _BLOCK, _RECORD)

    @property
    def capacity(self) -> int:
        """Shards that the pool may hold at once."""
        return self.pool_bytes // self.shard_bytes

    @property
    def shards_ahead(self) -> int:
        """Shards that a trainer may want at once, for its present step and those that it reads ahead."""
        return math.ceil(_STEPS_AHEAD * self.step_positions / self.shard_uses) + 1

    def shard_of(self, position: int) -> int:
        return position // self.shard_uses

    def sampler(self) -> dict[str, Any]:
        """What decides the bytes of a shard, beside the teacher: kept in the manifest with each shard."""
        free = (*_FREE_FIELDS, "teacher_id", *(() if self.labelled else _LABELLED_FIELDS))
        return {key: value for key, value in asdict(self).items() if key not in free}


def make_request(
    config: Config,
    run: RunDir,
    task: int,
    classes: Sequence[int],
    card: TeacherCard,
    steps: int,
    local: TeacherCard | None = None,
) -> ReplayRequest:
    """The request for learning `task` from the teacher of `task - 1`, checked.

    Args:
        classes: global ids of the classes learnt before `task`.
        card: of the teacher in `run.teacher(task - 1)`.
        steps: that learn from replay.
        local: of the teacher in `run.local_teacher(task)`, where the pool is labelled.

    Raises:
        UserError: a teacher of something else, or settings that cannot be served, naming the file or key.
    """
    _check_card(config, run.teacher(task - 1), card, task - 1, classes)
    request = plan_request(config, task, classes, steps, teacher_id=card.teacher_id)
    if local is None:
        return request
    _check_card(config, run.local_teacher(task), local, task, config.data.tasks[task - 1])
    return replace(request, local_teacher_id=local.teacher_id)


def _check_card(config: Config, directory: Path, card: TeacherCard, task: int, classes: Sequence[int]) -> None:
    """Raises UserError for the card of another teacher."""
    for name, found, wanted in (
        ("task", card.task, task),
        ("classes", sorted(card.classes), sorted(classes)),
        ("image_size", card.image_size, config.data.image_size),
        ("channels", card.channels, config.data.channels),
    ):
        if found != wanted:
            raise UserError(f"{directory / 'card.json'}: {name} is {found}, this run needs {wanted}: another teacher")


def plan_request(config: Config, task: int, classes: Sequence[int], steps: int, teacher_id: str = "") -> ReplayRequest:
    """The same before there is a teacher, for `estimate`. Raises ConfigError, naming the key."""
    labelled = config.points is OwnPoints.labelled
    replay = config.replay
    inline = replay.placement is Placement.inline
    points = config.points_per_trajectory
    positions = steps * config.replay_batch
    uses = replay.shard_trajectories * points * replay.reuse
    request = ReplayRequest(
        task=task,
        teacher=str(RunDir(Path()).teacher(task - 1)),
        teacher_id=teacher_id,
        seed=config.run.seed,
        classes=list(classes),
        conditional=config.model.conditional,
        image_size=config.data.image_size,
        channels=config.data.channels,
        timesteps=config.diffusion.timesteps,
        points=config.points.value,
        targets="noise" if config.method.name is MethodName.generative_replay else "teacher",
        stratified=replay.timesteps is Timesteps.stratified,
        steps=replay.steps,
        solver=replay.solver.value,
        eta=replay.eta,
        guidance=replay.guidance,
        null_label=-1 if replay.guidance == 1.0 or config.null_label is None else config.null_label,
        clip_sample=replay.clip_sample,
        points_per_trajectory=points,
        jitter=replay.jitter and config.points in (Points.trajectory, Points.both),
        shard_trajectories=replay.shard_trajectories,
        sampler_batch=replay.sampler_batch,
        precision=replay.precision.value,
        compile=replay.compile,
        positions=positions,
        step_positions=config.replay_batch,
        shards=0 if inline else math.ceil(positions / uses),
        reuse=replay.reuse,
        pool_bytes=int(replay.pool_gb * 1e9),
        pool_shards=replay.pool_shards,
        low_watermark=float(replay.low_watermark),
        local_teacher=str(RunDir(Path()).local_teacher(task)) if labelled else "",
        local_classes=list(config.data.tasks[task - 1]) if labelled else [],
        outputs=config.max_classes if labelled else 0,
        candidates=float(config.jdcl.candidates) if labelled else 1.0,
        missing=config.jdcl.missing.value,
        store=replay.store,
        store_timeout=float(config.data.store_timeout),
        request_timeout=float(config.data.request_timeout),
    )
    _check(request, config)
    if not inline:
        _check_pool(request, config, steps)
    return request


def estimate(request: ReplayRequest) -> dict[str, int]:
    """What a request costs in all: shards, trajectories, points used, bytes written and held at once, evaluations."""
    trajectories = request.shards * request.shard_trajectories
    if not request.shards:  # in the loop
        trajectories = math.ceil(request.positions / request.points_per_trajectory)
    written = request.shards * request.shard_bytes
    return {
        "shards": request.shards,
        "trajectories": trajectories,
        "points": request.positions,
        "bytes": written,
        "disk_bytes": min(written, request.capacity * request.shard_bytes),
        "evaluations": trajectories * request.evaluations_per_trajectory,
    }


def pools_disk_bytes(config: Config) -> int:
    """Bytes of all the replay pools that a run may have on disk at once: one, or with `replay.retirement=keep` each
    task's. Raises ConfigError, naming the key."""
    if not config.needs_teacher or config.replay.placement is Placement.inline:
        return 0
    sizes = [
        estimate(plan_request(config, task, config.classes_until(task - 1), replay_steps(config)))["disk_bytes"]
        for task in range(2, len(config.data.tasks) + 1)
    ]
    return sum(sizes) if config.replay.retirement is Retirement.keep else max(sizes, default=0)


def write_request(run: RunDir, request: ReplayRequest) -> None:
    """Publish a request; the same one again changes nothing.

    Raises:
        UserError: the pool already there belongs to another teacher or was sampled otherwise.
    """
    path = run.replay_request(request.task)
    if path.exists():
        old = read_request(path)
        for key in ("teacher_id", *request.sampler()):
            if getattr(old, key) != getattr(request, key):
                raise UserError(
                    f"{path}: the pool was made with {key}={getattr(old, key)}, the run now asks for "
                    f"{getattr(request, key)}: remove {path.parent} to make it anew"
                )
    write_atomic(path, json.dumps(asdict(request), indent=1).encode())


def read_request(path: Path) -> ReplayRequest:
    """Raises UserError, naming the file, where it is missing, unreadable or of another schema."""
    try:
        content = json.loads(read_regular(path, REQUEST_LIMIT))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: unreadable ({one_line(error)})") from None
    if not isinstance(content, dict) or content.get("schema") != REQUEST_SCHEMA:
        raise UserError(
            f"{path}: not a replay request of schema {REQUEST_SCHEMA}; remove {path.parent} to make it anew"
        )
    names = {entry.name: str(entry.type) for entry in fields(ReplayRequest)}
    # Older requests lack the keys that have defaults, which are what they meant.
    optional = {entry.name for entry in fields(ReplayRequest) if {entry.default, entry.default_factory} != {MISSING}}
    for name, kind in names.items():
        if name in optional and name not in content:
            continue
        if name not in content or type(content[name]).__name__ != kind.partition("[")[0]:
            raise UserError(f"{path}: {name} is missing or not of type {kind}")
    unknown = content.keys() - names.keys()
    if unknown:
        raise UserError(f"{path}: unknown key {one_line(sorted(unknown)[0])}")
    request = ReplayRequest(**content)
    wrong = next((name for name, holds in _possible(request) if not holds), None)
    if wrong is not None:
        raise UserError(f"{path}: {wrong}={one_line(getattr(request, wrong))} is not possible")
    return request


def _possible(request: ReplayRequest) -> Iterator[tuple[str, bool]]:
    """Whether each field has a value that a request can have."""
    yield "image_size", 0 < request.image_size <= IMAGE_LIMIT
    yield "channels", request.channels in (1, 3)
    for name in ("timesteps", "steps", "points_per_trajectory", "shard_trajectories", "sampler_batch", "reuse"):
        yield name, 0 < getattr(request, name) <= 10**6
    for name in ("task", "positions", "step_positions"):
        yield name, 0 < getattr(request, name) < 1 << 62
    for name in ("shards", "pool_bytes", "pool_shards"):
        yield name, 0 <= getattr(request, name) < 1 << 62
    yield "solver", request.solver in [solver.value for solver in Solver]
    yield "eta", 0 <= request.eta <= 1 and (request.eta == 0 or request.solver == Solver.ddim.value)
    yield "guidance", 0 <= request.guidance <= 10**6
    yield "null_label", -1 <= request.null_label < 1 << 31 and (request.null_label >= 0 or request.guidance == 1)
    yield "low_watermark", 0 <= request.low_watermark <= 1
    yield "points", request.sampled or request.points == OwnPoints.noise.value
    yield "local_classes", bool(request.local_classes) == request.labelled
    yield "outputs", request.labelled == (request.outputs > 0) and request.outputs <= 10**6
    yield "candidates", 1 <= request.candidates <= 10**6
    yield "missing", request.missing in [missing.value for missing in Missing]
    yield "points_per_trajectory", not request.path_points or request.path_points < request.steps
    yield "targets", request.targets == "teacher" or (request.targets == "noise" and request.points == "renoised")
    yield "precision", request.precision in [precision.value for precision in Precision]
    for name in ("store_timeout", "request_timeout"):
        yield name, 0 < getattr(request, name) <= 10**6
    yield "classes", bool(request.classes) and _all_labels(request.classes)
    yield "local_classes", _all_labels(request.local_classes)
    yield "outputs", not request.labelled or max(request.known_classes) < request.outputs
    for name in ("teacher", "local_teacher"):
        path = Path(getattr(request, name))
        yield name, not path.is_absolute() and ".." not in path.parts


def _all_labels(classes: Sequence[object]) -> bool:
    return all(type(label) is int and 0 <= label < 1 << 31 for label in classes)


def _check(request: ReplayRequest, config: Config) -> None:
    if request.task < 2:
        raise ConfigError(f"task {request.task}: there is nothing to replay before the second task")
    if request.path_points and not request.teacher_targets:
        raise ConfigError(
            f"replay.points={request.points}: generative_replay has no targets on a trajectory; take renoised"
        )
    if request.path_points >= request.steps:
        raise ConfigError(
            f"replay.points_per_trajectory={request.points_per_trajectory}: {request.path_points} of them lie on a "
            f"trajectory of replay.steps={request.steps}, which has {request.steps - 1} beside its start"
        )
    if config.replay.precision is Precision.fp16 and config.replay.device == "cpu":
        raise ConfigError("replay.precision=fp16: not on replay.device=cpu; take fp32 or bf16")


def _check_pool(request: ReplayRequest, config: Config, steps: int) -> None:
    """A pool must hold what is used between two checkpoints: only then are shards given back."""
    size, limit = request.shard_bytes, config.replay.pool_gb
    if request.capacity < 1:
        raise ConfigError(
            f"replay.pool_gb={limit:g}: one shard of replay.shard_trajectories={request.shard_trajectories} has "
            f"{size / 1e9:.3g} GB"
        )
    steps = min(steps, checkpoint_interval(config))
    between = math.ceil(steps * config.replay_batch / request.shard_uses)
    kept = KEPT_SHARDS if config.replay.on_starved is OnStarved.reuse else 0
    needed = min(request.shards, between + _SPARE_SHARDS + kept)
    if request.capacity < needed:
        raise ConfigError(
            f"replay.pool_gb={limit:g}: holds {request.capacity} shards, {needed} are needed from one checkpoint to "
            f"the next ({needed * size / 1e9:.3g} GB); checkpoint more often (checkpoint.every_images)"
        )
    ahead = min(request.shards, request.shards_ahead)
    if 0 < request.pool_shards < ahead:
        raise ConfigError(
            f"replay.pool_shards={request.pool_shards}: {ahead} are needed for {_STEPS_AHEAD} steps of "
            f"{request.step_positions} replay points, or a trainer would wait for shards that nobody makes"
        )


def _round_up(size: int, unit: int) -> int:
    return (size + unit - 1) // unit * unit
