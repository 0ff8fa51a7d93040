"""The training loop: tasks -> steps. What a run does, and in which order, can be read here."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import repeat
from typing import Any, NoReturn

import torch
from torch.profiler import record_function

from trainer.config import Config, OwnPoints, Placement
from trainer.data.augment import Augmentation
from trainer.data.batch import Examples
from trainer.data.buffer import open_rehearsed
from trainer.data.dataset import TaskData
from trainer.data.joint import JointPreparer
from trainer.data.label_dropout import LabelDropout
from trainer.data.labelled import hide_labels
from trainer.data.prepare import Preparer
from trainer.data.remote import open_tasks
from trainer.data.stream import HostBatch, RealStream
from trainer.diffusion.schedules import make_schedule
from trainer.engine import Engine
from trainer.errors import ToldElsewhere, UserError, say
from trainer.fisher import Consolidation
from trainer.judge import Judge
from trainer.memory import names_the_key
from trainer.meter import Meter
from trainer.methods import Rehearsal, Weights, build_method, build_penalty, task_weights
from trainer.models.teacher import CARD_NAME, read_card
from trainer.performance import Performance
from trainer.position import Position, checkpoint_path, parse_checkpoint, prune_checkpoints, sound_checkpoint
from trainer.profiling import StepProfiler
from trainer.publishing import Publisher
from trainer.pulse import Pulse
from trainer.rehearsal import BufferSource
from trainer.replay.devices import device_name
from trainer.replay.events import Event, EventLog, count_events
from trainer.replay.request import ReplayRequest, make_request, write_request
from trainer.replay.source import ReplaySource, open_source
from trainer.replay.state import write_state
from trainer.run import RunDir
from trainer.seeds import derive, hash_keys
from trainer.steps import (
    Stage,
    batch_of,
    checkpoint_interval,
    fresh_model,
    guesses,
    images_of_task,
    images_until,
    micro_batches,
    rejections,
    replay_metrics,
    replay_steps,
    stages,
    start_of,
)
from trainer.stop import GOES_ON, Stopped, StopRequest
from trainer.tracking.trace import trace_samples
from trainer.tracking.tracker import Tracker
from trainer.world import World


class Trainer:
    """Learns the tasks of a configuration one after another, from wherever the run directory says it stands."""

    def __init__(
        self,
        config: Config,
        run: RunDir,
        world: World,
        tracker: Tracker,
        judge: Judge,
        stop: StopRequest,
        began: float,
    ) -> None:
        """`began`: when this attempt started, by time.monotonic()."""
        self.config, self.run, self.world, self.tracker, self.judge = config, run, world, tracker, judge
        self.tasks = config.data.tasks
        self.stage = stages(config, 1)[0]
        self.checkpoint_steps = checkpoint_interval(config)
        self.method = build_method(config)
        self.schedule = make_schedule(config.diffusion).to(world.device)
        self.label_dropout = LabelDropout.of(config)
        self.engine = Engine(fresh_model(config), config, world)
        self.pulse = Pulse(world, stop.wanted, self._publish_checkpoints)
        self.consolidation = Consolidation(config, run, world, lambda: self._heed(stop))
        self.publisher = Publisher(config, run, world, judge.class_names)
        self.position = Position()
        self.meter = Meter()
        self.performance = Performance(config, world.device, world.size)
        self.profiler = StepProfiler(config, run, world, tracker)
        self.events = EventLog(run, "trainer")
        self._saved_at = began
        self._saved_step = (0, 0)  # task and step of the newest checkpoint, written or being written
        self._replay_source: ReplaySource | None = None  # of the present task
        self._troubled = False  # in the middle of skipped steps

    # --- the run -------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Learn what is not learnt yet, freeze and judge each task; the result of the run, on the main rank.

        Raises:
            Stopped: after a signal, with everything saved.
        """
        self.restore()
        for task in range(self.position.task, len(self.tasks) + 1):
            self.learn(task)
            self.freeze(task)
            self.request_replay(task + 1)
            self.judge.after(task)
        return self.judge.finish(self.account)

    def restore(self) -> None:
        """Continue from the newest checkpoint that is sound, where there is one."""
        found = self.world.on_main(self._newest_checkpoint) or (0, 0)
        # The main rank's word counts: a network file system may show the others an older directory.
        task, step = self.world.exchange(found)[0]
        if task:
            self.position = Position.from_extra(self.engine.load(checkpoint_path(self.run, task, step)))
            self._saved_step = task, step
            self._check_teacher()

    def _newest_checkpoint(self) -> tuple[int, int]:
        """Task and step of the newest sound checkpoint, on the main rank; names those that are damaged."""
        task, step, complaints = sound_checkpoint(self.run, len(self.tasks))
        for complaint in complaints:
            say(complaint)
            self.events.add(Event.damaged_checkpoint, reason=complaint)
        return task, step

    def close(self) -> None:
        """Leave no thread behind."""
        self.profiler.close()
        self.engine.close()

    def learn(self, task: int) -> None:
        """Train on one task, from the step at which the position stands."""
        if self.position.task < task:
            self.position = self.position.next_task()
        for stage in stages(self.config, task):
            if self.position.step < stage.end:
                self.stage = stage
                self.learn_stage(task, stage)

    def learn_stage(self, task: int, stage: Stage) -> None:
        """Train on a part of a task, from the step at which the position stands."""
        if self.position.step == stage.begin:
            self.begin(task, stage)
        self.request_replay(task)
        self.hold(task)
        with ExitStack() as stack:
            # A joint task sees the images of earlier tasks again, from epoch 0: it must not draw the same noise again.
            self.prepare = self._real_preparer(f"current/{task}" if self.method.all_tasks else "current")
            self.weights = task_weights(self.config, task, self.schedule)
            batches = self._real_batches(task, stage, stack) if stage.real else repeat(None)
            replay = self._replay(task, stack) if stage.replayed else None
            self._replay_source = replay
            self.tracker.start_task(task, self.seen, self.machine())
            self.pulse.start()
            began = time.perf_counter()
            stack.callback(self.profiler.stop)
            self.performance.start(0.0 if replay is None else replay.stats()["starved_seconds"])
            while self.position.step < stage.end:
                self.profiler.begin_step()
                if not self.pulse.may_begin(self.position.step - stage.begin, replay):
                    self.halt(task)
                self.step(task, self.position.step, next(batches), replay)
                self.position.step += 1
                self.profiler.end_step()
                now = time.perf_counter()
                self.position.cost["train_seconds"] += now - began
                began = now
                self.after_step(task)
        self.engine.flush()
        self._publish_checkpoints()
        self._replay_source = None

    def begin(self, task: int, stage: Stage) -> None:
        """Take the weights that a stage sets out from, and a fresh optimiser."""
        if stage.taught:
            self.publisher.local(task, lambda: self.engine.weights(ema=True))
        weights = start_of(self.config, self.run, task, stage)
        if weights is not None:
            self.engine.restart(weights)
        elif self.config.optimizer.reset_per_task:
            self.engine.reset_moments()

    def hold(self, task: int) -> None:
        """Have the weights held near those of the tasks before, where the configuration asks for it."""
        penalty = build_penalty(self.config)
        if penalty is not None and task > 1:
            self.consolidation.hold(self.engine, penalty, task, self.tracker.activity)

    def freeze(self, task: int) -> None:
        """Publish the model as it is after a task."""
        self.publisher.task(task, lambda: self.engine.weights(ema=True))

    # --- one step ------------------------------------------------------------------------------------------------

    @names_the_key
    def step(self, task: int, step: int, batch: HostBatch | None, replay: ReplaySource | None) -> None:
        """One optimiser step on real images and, after the first task, on what is rehearsed."""
        engine = self.engine
        engine.set_lr(self.learning_rate(step))
        self._seed_dropout(task, step)
        with record_function("prepare"):
            real = None if batch is None else self.prepare(batch)
        with record_function("replay"):
            rehearsed = self._rehearsed(task, step - self.stage.begin, replay, real)
        # A teacher's images take the place of the task's, which then go on beside them or not at all.
        current, rehearsed = (rehearsed, real) if self.stage.taught else (real, rehearsed)
        assert current is not None, "every step learns from something"
        weights = self._weights_at(step - self.stage.begin)
        for part, rehearsed_part in micro_batches(current, rehearsed, engine.accumulation):
            with record_function("forward"):
                terms = self.method.loss(engine.model, part, rehearsed_part, weights)
            with record_function("backward"):
                engine.backward(terms["loss"])
            for name, value in terms.items():
                self.meter.add(name, value)
        with record_function("optimizer"):
            engine.step()
        self.performance.count(len(current), 0 if rehearsed is None else len(rehearsed))
        if engine.penalty is not None:
            self.meter.add("penalty", engine.penalty)
        if engine.grad_norm is not None:
            self.meter.add("grad_norm", engine.grad_norm)

    def _weights_at(self, step: int) -> Weights:
        """Those at a step of the stage: a taught classifier waits until the images have settled."""
        waits = self.stage.taught and step * self.config.replay_batch < self.config.jdcl.warmup_images
        return replace(self.weights, classifying=0.0) if waits else self.weights

    def _rehearsed(
        self, task: int, step: int, replay: ReplaySource | None, current: Examples | None
    ) -> Examples | None:
        """This rank's replay points of a step; None where there are none, or where the step goes without."""
        points = replay.points(step, current) if replay is not None else None
        if points is None or self.label_dropout is None or not self.config.needs_teacher:
            return points
        first = step * self.config.replay_batch + self.world.rank * len(points)
        return self.label_dropout.of_positions(points, task, first)

    def after_step(self, task: int) -> None:
        """Collect garbage, log and save: at fixed steps, so at the same ones on all ranks."""
        step, train = self.position.step, self.config.train
        saving = step == self.stage.end or step % self.checkpoint_steps == 0
        if step % train.gc_every == 0:
            gc.collect()
        if saving or step % train.log_every == 0:
            self.log(task)
        if saving:
            self.save(task)

    def halt(self, task: int) -> NoReturn:
        """Save where the run stands, and stop."""
        if self._saved_step != (task, self.position.step) and self.position.step:
            self.performance.fetch(0.0, self.position.cost)  # the steps since the last log count, too
            self.save(task)
        self.engine.flush()
        self._publish_checkpoints()
        raise Stopped(f"stopped and saved in task {task} after {self.seen} images; {GOES_ON}")

    def _heed(self, stop: StopRequest) -> None:
        """Between two tasks everything is saved already."""
        if self.world.any(stop.wanted()):
            raise Stopped(f"stopped between two tasks; all that was learnt is saved, {GOES_ON}")

    def learning_rate(self, step: int) -> float:
        """Constant after a linear warm-up over the first `optimizer.warmup_images` of each task, or part of one."""
        optimizer, images = self.config.optimizer, (step + 1 - self.stage.begin) * batch_of(self.config, self.stage)
        return optimizer.lr * min(1.0, images / max(1, optimizer.warmup_images))

    # --- saving and telling --------------------------------------------------------------------------------------

    @property
    def seen(self) -> int:
        """Images of the current task seen so far: real ones, or those of teachers in their place."""
        return images_until(self.config, self.position.task, self.position.step)

    def save(self, task: int) -> None:
        """Take a checkpoint; it is written while the training goes on."""
        position, replay = self.position, self._replay_source
        now = time.monotonic()
        position.cost["wall_seconds"] += now - self._saved_at
        self._saved_at = now
        if replay is not None:
            position.replay[str(task)] = replay.stats()
        self.engine.save(checkpoint_path(self.run, task, position.step), position.as_extra())
        self._saved_step = task, position.step

    def _publish_checkpoints(self) -> None:
        """Give back what the checkpoints that were written meanwhile make superfluous. Raises UserError."""
        if self.world.is_main:
            self.events.flush()  # what a full disk refused before
        for path in self.engine.published():
            task, step = parse_checkpoint(path)
            if not self._troubled:
                prune_checkpoints(self.run, task, self.config.checkpoint.keep)
            if self._replay_source is not None:
                self._replay_source.release(max(0, step - self.stage.begin))

    def log(self, task: int) -> None:
        """Fetch the metrics from the device and show them.

        Raises:
            UserError: too many steps in a row had no finite loss or gradient (ToldElsewhere on all ranks but one).
        """
        metrics: dict[str, Any] = {"task": task, "step": self.position.step, "seen": self.seen}
        metrics |= self.meter.fetch(self.world)
        metrics["lr"] = self.learning_rate(self.position.step - 1)
        stats = {} if self._replay_source is None else self._replay_source.stats()
        metrics |= self.performance.fetch(stats.get("starved_seconds", 0.0), self.position.cost)
        skipped, in_a_row = self.engine.skips()
        if skipped:
            metrics["skipped_steps"] = skipped
        # The checkpoints from before the trouble stay; with fp16 skipping is how the loss scale is found.
        self._troubled = in_a_row > 0 and self.engine.dtype is not torch.float16
        if stats and self.world.is_main:
            metrics |= replay_metrics(stats)
        self.tracker.log(metrics)
        if in_a_row >= self.config.train.max_skipped:
            why = f"the loss or gradient of task {task} was no finite number for {in_a_row} steps in a row"
            if not self.world.is_main:
                raise ToldElsewhere(why)
            raise UserError(
                f"{self.run.root}: {why}, after {self.seen} images (key train.max_skipped); the last checkpoint is "
                "from before; take another run.name with a lower optimizer.lr or more optimizer.warmup_images"
            )

    def machine(self) -> dict[str, Any]:
        """What the rates in the log are those of."""
        device = self.world.device
        return {"device": device.type, "device_name": device_name(device), "ranks": self.world.size}

    def account(self) -> dict[str, Any]:
        """What the run has cost and what befell its replay, for metrics.json; on the main rank."""
        counts = count_events(self.run)
        for name in ("starved_steps", "reused_steps", "real_only_steps"):
            counts[name] = sum(stats.get(name, 0) for stats in self.position.replay.values())
        replay: dict[str, Any] = {"events": counts}
        if self.config.points is OwnPoints.labelled:
            replay |= rejections(self.position.replay.values())
        return {"cost": self.cost() | {"skipped_steps": self.engine.skips()[0]}, "replay": replay}

    def cost(self) -> dict[str, float | None]:
        """What the run has spent, over all its attempts."""
        cost, replay = self.position.cost, self.position.replay.values()
        images = sum(images_of_task(self.config, task) for task in range(1, len(self.tasks) + 1))
        return {
            "train_seconds": cost["train_seconds"],
            "wall_seconds": cost["wall_seconds"] + time.monotonic() - self._saved_at,
            "images_per_second": images / max(cost["train_seconds"], 1e-9),
            "teacher_evaluations": sum(stats["teacher_evaluations"] for stats in replay),
            "replay_points_used": sum(stats["points_used"] for stats in replay),
            "starved_seconds": sum(stats["starved_seconds"] for stats in replay),
            **self.performance.account(cost),
        }

    # --- replay --------------------------------------------------------------------------------------------------

    def request_replay(self, task: int) -> None:
        """Tell the samplers what to make for a task, as early as its teacher is there."""
        self.world.on_main(lambda: self._announce(task))

    def _announce(self, task: int) -> None:
        inline, labelled = self.config.replay.placement is Placement.inline, self.config.points is OwnPoints.labelled
        learning = labelled and not (self.run.local_teacher(task) / CARD_NAME).exists()  # the second teacher
        request = None if inline or learning else self._request(task)
        if request is not None:
            write_request(self.run, request)
        if task <= len(self.tasks):
            write_state(self.run, task)

    def _request(self, task: int) -> ReplayRequest | None:
        if not self.config.needs_teacher or not 2 <= task <= len(self.tasks):
            return None
        labelled = self.config.points is OwnPoints.labelled
        local = read_card(self.run.local_teacher(task)) if labelled else None
        card = read_card(self.run.teacher(task - 1))
        classes = self.config.classes_until(task - 1)
        return make_request(self.config, self.run, task, classes, card, replay_steps(self.config), local)

    def _replay(self, task: int, stack: ExitStack) -> ReplaySource | None:
        """Where this task's rehearsal comes from."""
        if self.method.rehearsal is Rehearsal.none:
            return None
        if self.method.rehearsal is Rehearsal.buffer:
            data = self._buffer(task)
            stream = stack.enter_context(self._stream(data, task, self.config.replay_batch))
            used = self.position.replay.get(str(task), {}).get("points_used", 0)
            batches = self.performance.timed(stream)
            return BufferSource(batches, self._preparer(f"buffer/{task}"), self.config.replay_batch, used)
        request = self._request(task)
        assert request is not None
        self.position.teacher_id = request.teacher_id
        source = open_source(
            self.config,
            self.run,
            request,
            world=self.world,
            device=self.world.device,
            dtype=self.engine.dtype,
            schedule=self.schedule,
            start_step=self.position.step - self.stage.begin,
            restored=self.position.replay.get(str(task)),
            journal=self._journal,
        )
        return stack.enter_context(closing(source))

    def _journal(self, event: dict[str, Any]) -> None:
        if self.world.is_main:
            self.tracker.log({**event, "seen": self.seen}, event=event["event"])

    # --- parts ---------------------------------------------------------------------------------------------------

    def _real_batches(self, task: int, stage: Stage, stack: ExitStack) -> Iterator[HostBatch]:
        """Batches of real images from the present step on; the stack closes what reads them."""
        data = self._real_data(task)
        data.fetch_ahead()
        stream = stack.enter_context(self._stream(data, task, self.config.train.global_batch))
        stack.callback(data.interrupt)  # before the stream waits for its threads, which may wait for a store
        batches: Iterator[HostBatch] = stream
        if self.config.tracking.seen_samples:
            batches = trace_samples(stream, data, self.run, self.world, task, self.position.step)
        return self.performance.timed(batches)

    def _real_data(self, task: int) -> TaskData:
        """The images to learn a task from; their checksums were verified before the ranks met."""
        tasks = range(1, task + 1) if self.method.all_tasks else [task]
        data = open_tasks(self.config.data, "train", list(tasks))
        return hide_labels(data, self.config.data.labelled, self.config.run.seed)

    def _buffer(self, task: int) -> TaskData:
        """The real images of earlier tasks that are rehearsed with a task."""
        buffers = [self.run.buffer(earlier) for earlier in range(1, task)]
        return open_rehearsed(buffers, self.config.method, self.config.run.seed, self.config.data.verify)

    def _stream(self, data: TaskData, task: int, global_batch: int) -> RealStream:
        return RealStream(
            data,
            seed=self.config.run.seed,
            task=task,
            global_batch=global_batch,
            rank=self.world.rank,
            world_size=self.world.size,
            start_step=self.position.step,
            stop_step=self.stage.end,
            workers=self.config.data.workers,
            prefetch=self.config.data.prefetch,
        )

    def _real_preparer(self, purpose: str) -> Preparer | JointPreparer:
        """Of the task's own images: with views for a classifier within the model."""
        jdcl, data = self.config.jdcl, self.config.data
        if not self.config.classifies:
            return self._preparer(purpose)
        views = Augmentation(data.flip, jdcl.weak_crop, jdcl.strong_operations, jdcl.strong_magnitude)
        return JointPreparer(self._preparer(purpose), views, guesses(self.config))

    def _preparer(self, purpose: str) -> Preparer:
        return Preparer(
            self.schedule,
            seed=self.config.run.seed,
            purpose=purpose,
            flip=self.config.data.flip,
            device=self.world.device,
            dtype=self.engine.dtype,
            label_dropout=self.label_dropout,
        )

    def _check_teacher(self) -> None:
        """The teacher on disk must be the one that this run's own checkpoint remembers."""
        task, known = self.position.task, self.position.teacher_id
        if self.config.needs_teacher and task > 1 and known:
            found = read_card(self.run.teacher(task - 1)).teacher_id
            if found != known:
                raise UserError(f"{self.run.teacher(task - 1)}: the teacher of another run (key run.name)")

    def _seed_dropout(self, task: int, step: int) -> None:
        if self.config.model.dropout or (self.config.classifies and self.config.model.classifier_dropout):
            key = hash_keys([f"{task}/{self.world.rank}"])
            torch.manual_seed(int(derive(self.config.run.seed, "dropout", key, step)[0]))
