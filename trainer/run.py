"""The run directory: every path in it is a function here, nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDir:
    """`runs/<name>`; tasks count from 1."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics_log(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def metrics(self) -> Path:
        """The result; its presence with as many rows as tasks says that the run is finished."""
        return self.root / "metrics.json"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def state(self) -> Path:
        """What the trainer is doing now, for sidecars and people: `{"task", "finished"}`."""
        return self.root / "state.json"

    @property
    def stop_wish(self) -> Path:
        """Made by a process beside the trainer that was told to stop; the trainer then stops, too."""
        return self.root / "stop"

    @property
    def compile_cache(self) -> Path:
        """What TorchInductor and Triton compiled, for the next start."""
        return self.root / "compile_cache"

    @property
    def micro_batch(self) -> Path:
        """What `train.micro_batch=auto` found, and for which circumstances."""
        return self.root / "micro_batch.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def history(self) -> Path:
        """Samples after each task, below each other: the forgetting one can see."""
        return self.report / "history.png"

    @property
    def report_page(self) -> Path:
        """The report on the whole run; it stands alone."""
        return self.report / "index.html"

    def figure(self, name: str) -> Path:
        """A figure of the report."""
        return self.report / f"{name}.png"

    @property
    def real_samples(self) -> Path:
        """Real images of each class, the first row of `history`."""
        return self.root / "tasks" / "real.npz"

    def log(self, attempt: int) -> Path:
        return self.root / "logs" / f"attempt-{attempt}"

    def newest_attempt(self) -> int:
        """The number of the start whose log directory was made last; 0 before the first."""
        numbers = [path.name.rpartition("-")[2] for path in self.log(0).parent.glob("attempt-*")]
        return max((int(number) for number in numbers if number.isdigit()), default=0)

    def seen_samples(self, attempt: int, rank: int) -> Path:
        """Keys of the images that each step of an attempt took on a trainer rank (`tracking.seen_samples`)."""
        return self.log(attempt) / f"seen-rank-{rank}.jsonl"

    def profile(self, attempt: int, rank: int) -> Path:
        """The steps of an attempt that were recorded on a trainer rank, for chrome://tracing or Perfetto."""
        return self.log(attempt) / f"profile-rank-{rank}.json.gz"

    def profile_table(self, attempt: int, rank: int) -> Path:
        """The operators in it that took longest."""
        return self.log(attempt) / f"profile-rank-{rank}.txt"

    def task(self, task: int) -> Path:
        return self.root / "tasks" / str(task)

    def teacher(self, task: int) -> Path:
        """The frozen model learnt up to and including `task`: model.safetensors and card.json."""
        return self.task(task) / "teacher"

    def local_teacher(self, task: int) -> Path:
        """The model of `task` alone that jdcl learns first; teacher of its classes in the global stage."""
        return self.task(task) / "local"

    def pipeline(self, task: int) -> Path:
        """The same model as a diffusers pipeline."""
        return self.task(task) / "pipeline"

    def checkpoints(self, task: int) -> Path:
        return self.task(task) / "checkpoints"

    def replay(self, task: int) -> Path:
        """The replay pool consumed while learning `task`, made by the teacher of `task - 1`."""
        return self.task(task) / "replay"

    def replay_request(self, task: int) -> Path:
        """What the trainer asks of the samplers for `task`."""
        return self.replay(task) / "request.json"

    def replay_progress(self, task: int) -> Path:
        """Which shards of the pool the trainer no longer needs."""
        return self.replay(task) / "progress.json"

    def sampler(self, worker: int) -> Path:
        """Heartbeat of sampler `worker`."""
        return self.root / "samplers" / f"sampler-{worker}.json"

    def sampler_lock(self, worker: int) -> Path:
        return self.root / "samplers" / f"sampler-{worker}.lock"

    def supervisor(self, worker: int) -> Path:
        """What the supervisor of sampler `worker` has seen: restarts, giving up."""
        return self.root / "samplers" / f"supervisor-{worker}.json"

    def teacher_log(self, attempt: int, worker: int) -> Path:
        """Output of sampler `worker` in one attempt."""
        return self.log(attempt) / f"teacher-{worker}.log"

    def hand_log(self, worker: int) -> Path:
        """Output of sampler `worker` when it is started by hand: it belongs to no attempt."""
        return self.root / "samplers" / f"teacher-{worker}.log"

    def events(self, who: str) -> Path:
        """Faults and interventions that one process (`trainer`, `sampler-0`, `supervisor-0`) has noted."""
        return self.root / "events" / f"{who}.jsonl"

    def buffer(self, task: int) -> Path:
        """Real images of `task` kept for experience replay."""
        return self.task(task) / "buffer"

    def fisher(self, task: int) -> Path:
        """What `ewc` and `rank1_ewc` keep of `task` beside its teacher: fisher.safetensors and card.json."""
        return self.task(task) / "fisher"

    def classifier(self, task: int) -> Path:
        """The classifier that has learnt the tasks up to `task`: classifier.safetensors and card.json."""
        return self.task(task) / "classifier"

    def evaluation(self, task: int) -> Path:
        """The measures after `task`."""
        return self.task(task) / "evaluation.json"

    def samples(self, task: int) -> Path:
        return self.task(task) / "samples.png"

    def picked_samples(self, task: int) -> Path:
        """The samples shown in samples.png, for the picture over all tasks."""
        return self.task(task) / "samples.npz"

    @property
    def wandb_id(self) -> Path:
        """The id under which wandb knows the run, over all its attempts."""
        return self.root / "wandb_id"
