"""What a configuration will start, worked out without starting anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from trainer.config import Config, OnStarved, OwnPoints, Placement
from trainer.disk import DiskNeed
from trainer.errors import ConfigError
from trainer.memory import WIDTH, state_bytes
from trainer.rates import Supply, make_supply, measure_rates, rates_of_run
from trainer.replay.devices import choose_devices
from trainer.replay.request import estimate, plan_request
from trainer.run import RunDir
from trainer.scaling import Link, Scale, predict
from trainer.settings import check_world
from trainer.steps import count_parameters, replay_steps, stages

NO_REPLAY = {"points": 0, "trajectories": 0, "evaluations": 0, "bytes": 0, "disk_bytes": 0}


@dataclass(frozen=True)
class TaskPlan:
    """One task: classes by id, real images seen (not distinct ones), and what its replay costs in all."""

    task: int
    classes: list[int]
    images: int
    steps: int
    replay_points: int
    trajectories: int
    teacher_evaluations: int
    replay_bytes: int  # written in all
    replay_disk_bytes: int  # held at once, at most


@dataclass(frozen=True)
class ProcessPlan:
    """`count` processes of one kind; `starter` is who starts them."""

    role: str
    count: int
    devices: list[str]
    starter: str


@dataclass(frozen=True)
class Plan:
    """What one command will start; sizes in bytes.

    `memory` is by part, for each trainer rank, without activations. `sampler_memory` are the weights of one teacher,
    also without activations; 0 when there is none. `supply`, whether the teachers are enough, is there once rates are.
    """

    run_directory: str
    method: str
    tasks: list[TaskPlan]
    processes: list[ProcessPlan]
    trainers: int
    images_per_step: int
    replay_points_per_step: int
    parameters: int
    zero_stage: int
    precision: str
    memory: dict[str, int]
    sampler_memory: int
    disk: DiskNeed
    on_starved: str
    replays: bool
    supply: Supply | None = None
    scales: tuple[Scale, ...] = ()

    @property
    def memory_total(self) -> int:
        return sum(self.memory.values())

    def devices(self, role: str) -> list[str]:
        """Of all processes of one kind."""
        return [device for process in self.processes if process.role == role for device in process.devices]


def make_plan(config: Config, launched: int, gpus: int) -> Plan:
    """The plan of a checked configuration.

    Args:
        launched: ranks that the launcher starts on this node (deepspeed's --num_gpus).
        gpus: CUDA devices there; 0 trains on the CPU.

    Raises:
        ConfigError: what training would refuse, with the same line.
    """
    if 0 < gpus < launched:
        raise ConfigError(f"--num_gpus {launched}: this machine has {gpus}")
    trainers = _trainers(config, launched)
    check_world(config, trainers, cuda=gpus > 0)
    parameters = count_parameters(config)
    teachers = 2 if config.points is OwnPoints.labelled else int(config.needs_teacher)  # of a process
    sampler = WIDTH[config.replay.precision] * parameters * teachers
    memory = state_bytes(parameters, config, trainers)
    if config.needs_teacher and config.replay.placement is Placement.inline:
        memory["teacher"], sampler = sampler, 0
    return Plan(
        run_directory=str(Path(config.run.dir) / config.run.name),
        method=config.method.name.value,
        tasks=plan_tasks(config),
        processes=plan_processes(config, launched, gpus),
        trainers=trainers,
        images_per_step=config.train.global_batch,
        replay_points_per_step=config.replay_batch if config.needs_teacher else 0,
        parameters=parameters,
        zero_stage=config.zero.stage,
        precision=config.train.precision.value,
        memory=memory,
        sampler_memory=sampler,
        disk=DiskNeed.of(config),
        on_starved=config.replay.on_starved.value,
        replays=config.needs_teacher and len(config.data.tasks) > 1,
    )


def with_supply(plan: Plan, config: Config, run: Path | None) -> Plan:
    """The plan with what its teachers supply, by the rates of an earlier run, or, where that is None, measured here.

    Raises:
        UserError: rates of something else, or none, naming the file or key.
    """
    if not plan.replays:
        why = f"method.name={plan.method}" if not config.needs_teacher else "data.tasks: one task alone"
        raise ConfigError(f"{why}: replays nothing that a teacher makes, so there are no teacher devices to plan")
    trainer = _kind(plan.devices("trainer")[0])
    named = plan.devices("teacher")
    teacher = _kind(named[0]) if named and config.replay.placement is not Placement.external else trainer
    if run is None:
        rates = measure_rates(config, plan.trainers, trainer, teacher)
    else:
        rates = rates_of_run(RunDir(run), config, trainer, teacher)
    return replace(plan, supply=make_supply(config, rates, plan.trainers, _teacher_devices(plan)))


def with_scales(plan: Plan, config: Config, link: Link, devices: Sequence[int]) -> Plan:
    """The plan with predictions for other numbers of devices, by the rates that it has.

    Raises:
        ConfigError: no rates, or too few devices.
    """
    if plan.supply is None:
        raise ConfigError("--scale: predicts from measured rates; add --measure, or --rates RUN_DIR of an earlier run")
    rates = plan.supply.rates
    return replace(plan, scales=tuple(predict(config, rates, link, plan.trainers, count) for count in devices))


def _kind(device: str) -> str:
    return device.partition(":")[0]


def _teacher_devices(plan: Plan) -> int:
    """Teachers with a device of their own; several on one GPU count as one, on a CPU each has its threads."""
    return sum(
        len(set(process.devices)) if process.devices[0].startswith("cuda") else process.count
        for process in plan.processes
        if process.role == "teacher"
    )


def _trainers(config: Config, launched: int) -> int:
    teachers = config.replay.devices_per_node if config.teacher_ranks else 0
    if launched <= teachers:
        raise ConfigError(
            f"replay.devices_per_node={teachers}: no rank is left to train of {launched}; start more "
            "(--num_gpus) or take replay.placement=subprocess"
        )
    return launched - teachers


def plan_processes(config: Config, launched: int, gpus: int) -> list[ProcessPlan]:
    """All processes of one node, by placement."""
    replay = config.replay
    trainers = _trainers(config, launched)
    local = [f"cuda:{index}" if gpus else "cpu" for index in range(launched)]
    processes = [ProcessPlan("trainer", trainers, local[:trainers], "deepspeed")]
    if config.teacher_ranks:
        processes.append(ProcessPlan("teacher", launched - trainers, local[trainers:], "deepspeed"))
    if not config.needs_teacher or len(config.data.tasks) < 2:
        return processes
    if replay.placement is Placement.subprocess:
        devices = choose_devices(replay.device, replay.workers, trainers, gpus)
        processes.append(ProcessPlan("teacher", replay.workers, devices, "the first trainer"))
    elif replay.placement is Placement.external:
        processes.append(ProcessPlan("teacher", replay.workers, ["as they are told"], "you: launch/teacher.py"))
    return processes


def plan_tasks(config: Config) -> list[TaskPlan]:
    """Steps and replay of each task; the first replays nothing. Raises ConfigError, naming the key."""
    plans: list[TaskPlan] = []
    learnt: list[int] = []
    for task, classes in enumerate(config.data.tasks, 1):
        cost = dict(NO_REPLAY)
        if task > 1 and config.needs_teacher:
            cost |= estimate(plan_request(config, task, learnt, replay_steps(config)))
        parts = stages(config, task)
        plans.append(
            TaskPlan(
                task=task,
                classes=list(classes),
                images=sum(part.steps * config.train.global_batch for part in parts if part.real),
                steps=parts[-1].end,
                replay_points=cost["points"],
                trajectories=cost["trajectories"],
                teacher_evaluations=cost["evaluations"],
                replay_bytes=cost["bytes"],
                replay_disk_bytes=cost["disk_bytes"],
            )
        )
        learnt += classes
    return plans


# --- printing ---------------------------------------------------------------------------------------------------


def as_json(plan: Plan) -> dict[str, Any]:
    """All of a plan as plain values; what `Supply` has stands beside the rest, null without measured rates."""
    plain = asdict(plan) | {"memory_total": plan.memory_total, "disk_bytes": plan.disk.total}
    del plain["supply"]
    unknown = dict.fromkeys([field.name for field in fields(Supply)] + ["source"])
    return unknown | plain | (plan.supply.as_json() if plan.supply else {})


def rich_plan(plan: Plan) -> RenderableType:
    """A plan for people."""
    tables = [_task_table(plan), _process_table(plan), _facts(plan)]
    tables += [_supply_table(plan, plan.supply)] if plan.supply else []
    return Group(*tables, *([_scale_table(plan)] if plan.scales else []))


def _task_table(plan: Plan) -> Table:
    table = Table(title=f"{plan.method} in {plan.run_directory}")
    for title in ("task", "classes", "real\nimages", "steps", "replay\npoints", "teacher\nevaluations", "replay\ndisk"):
        words = title == "classes"
        table.add_column(title, justify="left" if words else "right", no_wrap=not words)
    for task in plan.tasks:
        replay = [f"{task.replay_points:,}", f"{task.teacher_evaluations:,}", size(task.replay_disk_bytes)]
        classes = ", ".join(map(str, task.classes))
        table.add_row(str(task.task), classes, f"{task.images:,}", f"{task.steps:,}", *replay)
    table.add_section()
    totals = [sum(t.images for t in plan.tasks), sum(t.steps for t in plan.tasks)]
    totals += [sum(t.replay_points for t in plan.tasks), sum(t.teacher_evaluations for t in plan.tasks)]
    table.add_row("all", "", *(f"{total:,}" for total in totals), size(plan.disk.replay_bytes))
    return table


def _process_table(plan: Plan) -> Table:
    table = Table(title="processes of this node")
    for title in ("role", "processes", "devices", "started by"):
        table.add_column(title)
    for process in plan.processes:
        table.add_row(process.role, str(process.count), ", ".join(process.devices), process.starter)
    return table


def _facts(plan: Plan) -> Table:
    parts = ", ".join(f"{part} {size(value)}" for part, value in plan.memory.items() if value)
    disk = plan.disk
    checkpoints = (
        f"{size(disk.checkpoints * disk.checkpoint_bytes)} (up to {disk.checkpoints} of {size(disk.checkpoint_bytes)})"
    )
    facts = [
        ("model", f"{plan.parameters:,} parameters"),
        ("each step", f"{plan.images_per_step} real images, {plan.replay_points_per_step} replay points"),
        (f"memory of a trainer, ZeRO {plan.zero_stage}, {plan.precision}", f"{size(plan.memory_total)}: {parts}"),
        ("memory of a teacher process", size(plan.sampler_memory) if plan.sampler_memory else "-"),
        ("", "activations come on top of both"),
        ("disk for checkpoints", checkpoints),
        ("disk for teachers and pipelines", size(disk.teachers_bytes)),
        ("disk for Fisher information", size(disk.fisher_bytes) if disk.fisher_bytes else "-"),
        ("disk at most, with replay", size(disk.total)),
    ]
    if plan.replays and plan.supply is None:
        facts.append(("teacher devices needed", "not known: add --measure, or --rates RUN_DIR of an earlier run"))
    return _named("size", facts)


def _supply_table(plan: Plan, supply: Supply) -> Table:
    rates = supply.rates
    alone = rates.images_per_second_without_replay
    learns = f"{figure(rates.images_per_second)} real images a second"
    learns += "" if alone is None else f"; {figure(alone)} without replay, as in the first task"
    need = figure(supply.points_per_second * supply.evaluations_per_point)
    points = f"{figure(supply.points_per_second)} replay points x {figure(supply.evaluations_per_point)} evaluations"
    facts = [
        ("a trainer device learns", learns),
        ("it takes", f"{points} = {need} evaluations a second"),
        ("a teacher device makes", f"{figure(rates.evaluations_per_second)} evaluations a second"),
        *(_inline_facts(supply) if supply.inline_step_factor else _device_facts(plan, supply)),
        ("source", rates.source),
    ]
    return _named("teachers, by measured rates", facts)


def _scale_table(plan: Plan) -> Table:
    table = Table(title="on more devices, each with its present share of a step: predicted, docs/scaling.md")
    for title in ("devices", "train +\nsample", "global\nbatch", "step", "sending", "images/s", "efficiency"):
        table.add_column(title, justify="right")
    for title in ("read\nimages", "replay", "all tasks"):
        table.add_column(title, justify="right")
    for scale in plan.scales:
        table.add_row(
            *(f"{scale.devices:,}", f"{scale.trainers:,} + {scale.teachers:,}", f"{scale.global_batch:,}"),
            *(f"{figure(1000 * scale.step_seconds)} ms", percent(scale.communication_seconds / scale.step_seconds)),
            *(figure(scale.images_per_second), percent(scale.efficiency)),
            *(f"{size(round(rate))}/s" for rate in (scale.image_bytes_per_second, scale.replay_bytes_per_second)),
            f"{figure(scale.seconds / 3600)} h",
        )
    return table


def _inline_facts(supply: Supply) -> list[tuple[str, str]]:
    factor = f"{figure(supply.inline_step_factor or 0)} times as long as with teachers on devices of their own"
    return [("a step with inline replay", factor)]


def _device_facts(plan: Plan, supply: Supply) -> list[tuple[str, str]]:
    needed, made = supply.teacher_devices_needed or 0, supply.replay_share or 0.0
    shared = set(plan.devices("trainer")) & set(plan.devices("teacher")) - {"cpu"}
    busy = f"{needed}, busy {percent(supply.teacher_utilisation)} of the time"
    late = {
        OnStarved.wait.value: f"the trainers would wait {percent(supply.wait_share)} of the time",
        OnStarved.fail.value: "the run would end (replay.on_starved=fail)",
    }.get(plan.on_starved, f"the rest would come late (replay.on_starved={plan.on_starved})")
    told = f"{percent(made)} of what is taken: {late}"
    if made >= 1:
        told = f"{figure(made)} times what is taken: nobody waits, but for the first shard of a task"
    facts = [
        ("teacher devices per trainer device", figure(supply.teacher_devices_per_trainer_device or 0)),
        (f"needed for {supply.trainers} trainer device{'s' if supply.trainers > 1 else ''}", busy),
        (f"planned: {supply.teachers}", told),
        ("first shard of a task", f"{figure(supply.first_shard_seconds or 0)} s after its teacher is loaded"),
    ]
    if shared:
        facts.append(("", f"teachers share {', '.join(sorted(shared))} with trainers: neither is as fast there"))
    return facts


def _named(title: str, facts: list[tuple[str, str]]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in facts:
        table.add_row(name, value)
    return table


def figure(value: float) -> str:
    """A measured number for people: three digits count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent(share: float | None) -> str:
    return f"{figure(100 * (share or 0.0))} %"


def size(count: int) -> str:
    """Bytes in decimal units, as pool_gb and disks count them."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
