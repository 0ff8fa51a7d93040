"""The whole configuration as dataclasses; `trainer.settings` loads and checks it."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.choices import (
    Buffer,
    Extractor,
    LocalStart,
    MethodName,
    Missing,
    OnStarved,
    OptimizerName,
    OwnClassifier,
    OwnPoints,
    PenaltyName,
    Placement,
    Points,
    Precision,
    Prediction,
    Retirement,
    Schedule,
    ShardFormat,
    Share,
    SmallImages,
    Solver,
    Source,
    Timesteps,
    Verify,
    Wandb,
)

RENOISED_POINTS = 50  # of a trajectory, by default: docs/replay.md says what more or fewer cost
AUTO = -1  # train.micro_batch; files and command lines say `auto`


@dataclass
class RunConfig:
    """`runs/<name>`: without a name, config and method make one."""

    name: str = ""
    dir: str = "runs"
    seed: int = 0


@dataclass
class DataConfig:
    """Task shards. `root`: a directory, or a place in a store (s3://bucket/name); empty: `data/` and a name made of the
    content of this section."""

    name: str = "digits"
    root: str = ""
    source: Source = Source.digits
    source_path: str = ""
    class_list: str = ""  # file with one class name per line; a line's number is the class id
    classes: int = 10
    image_size: int = 8
    channels: int = 1
    classes_per_task: int = 2
    class_order_seed: int | None = None  # null: classes in the order of their ids
    tasks: list[list[int]] = field(default_factory=list)  # explicit class ids of each task; wins over the split
    shard_size: int = 1000  # images per shard
    format: ShardFormat = ShardFormat.png  # raw: the same pixels in larger files, read thirty times as fast
    small_images: SmallImages = SmallImages.pad
    verify: Verify = Verify.sha256
    flip: bool = False  # horizontal flips, drawn from the sample's own counter
    labelled: float = 1.0  # share of each class's training images whose label a classifier within the model may know
    workers: int = 1  # reading and decoding threads of each rank
    prefetch: int = 4  # batches read ahead
    cache_dir: str = ""  # where a node keeps what it fetched from stores; empty: ~/.cache/palimpsest
    cache_gb: float = 20.0  # the most that lies there, in GB; what was used longest ago goes first
    store_timeout: float = 300.0  # seconds that a store may be away before the run ends, to be continued
    request_timeout: float = 30.0  # seconds that one request to a store may take


@dataclass
class ModelConfig:
    """A diffusers UNet2DModel."""

    channels: list[int] = field(default_factory=lambda: [32, 64])
    layers_per_block: int = 1
    attention_levels: list[int] = field(default_factory=list)  # 0 is the full resolution
    attention_head_dim: int = 8
    norm_groups: int = 8
    dropout: float = 0.0
    scale_shift: bool = False  # the timestep scales and shifts the normalised maps (Nichol and Dhariwal 2021)
    conditional: bool = True
    label_dropout: float = 0.0  # share of training labels replaced by one that stands for no class; guidance needs it
    max_classes: int = 0  # labels and outputs that there is room for; 0: data.classes. Leave room for classes to come
    classifier: OwnClassifier = OwnClassifier.none
    classifier_width: int = 256  # hidden units between its features and its outputs
    classifier_dropout: float = 0.1  # of these units


@dataclass
class DiffusionConfig:
    timesteps: int = 1000
    schedule: Schedule = Schedule.linear
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction: Prediction = Prediction.epsilon


@dataclass
class OptimizerConfig:
    name: OptimizerName = OptimizerName.adam
    lr: float = 2e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_images: int = 0  # linear warm-up at the start of each task
    clip_norm: float = 1.0  # 0: no clipping
    reset_per_task: bool = True  # moments start at zero with each task, as in the papers


@dataclass
class TrainConfig:
    images_per_task: int = 16000  # real images of each task (seen images, not distinct ones)
    global_batch: int = 64  # real images per step over all ranks
    micro_batch: int = 0  # real images per forward on one rank; 0: the rank's whole share; auto: what fits
    precision: Precision = Precision.fp32
    compile: bool = False  # the model as one graph; with zero.stage=3 block by block
    autotune: bool = False  # with compile: time more kernels for each operation of the graph, once for each shape
    compile_cache: str = ""  # directory of what was compiled; empty: in the run directory
    activation_checkpointing: bool = False  # forget what a block computes, and compute it again going backward
    peak_tflops: float = 0.0  # of a device at this precision, for the share of it in the log; 0: known cards by name
    log_every: int = 10  # steps between two fetches of the metrics from the device
    gc_every: int = 200  # steps between two runs of Python's garbage collector
    threads: int = 0  # CPU threads of each trainer rank; 0: cores shared out between the processes of the job
    max_skipped: int = 25  # steps in a row skipped for a loss or gradient that is not finite, before the run ends


@dataclass
class EmaConfig:
    decay: float = 0.0  # per step; 0: no EMA, the teacher is the student as it is


@dataclass
class ZeroConfig:
    stage: int = 1


@dataclass
class MethodConfig:
    name: MethodName = MethodName.generative_distillation
    distillation_weight: float = 1.0  # lambda of the replay term
    share: Share = Share.tasks  # what the current task weighs against replay: 1/k, or its share of the classes learnt
    min_snr: float = 0.0  # gamma of Min-SNR weights of the timesteps (Hang et al. 2023), real and replayed; 0: none
    rehearsal_coefficient: float = 1.0  # experience_replay: weight of the buffer's loss
    buffer: Buffer = Buffer.class_balanced  # of experience_replay: equal shares of classes, or a uniform sample
    buffer_per_class: int = 20  # class_balanced: real images kept of each class
    buffer_size: int = 200  # reservoir: real images kept in all
    penalty: PenaltyName = PenaltyName.none  # beside the method; l2, ewc and rank1_ewc are also methods, without replay
    penalty_weight: float = 1.0  # lambda of the penalty
    fisher_images: int = 200  # ewc, rank1_ewc: real images of each task that its Fisher information is measured on
    fisher_draws: int = 5  # timesteps, each with a noise, drawn for each of them


@dataclass
class JdclConfig:
    """Joint diffusion and classification (method.name=jdcl): a local stage on each task's images (all of
    train.images_per_task), then a global one on images of two teachers. The local loss is also that of finetune and
    joint with a model.classifier."""

    local_start: LocalStart = LocalStart.scratch
    global_images: int = 0  # images of the teachers that the global stage sees; 0: as many as train.images_per_task
    real_images: bool = False  # the task's images go on in the global stage, beside the teachers'
    distil: bool = True  # learn the teachers' predictions and logits; without, only the noise and their labels
    classification_weight: float = 1e-3  # of the cross-entropy, on images that have a label
    noise_weight: float = 0.01  # global stage: of the noise, beside twice the teachers' predictions
    label_weight: float = 1e-5  # global stage: of the teachers' labels, beside
    logit_weight: float = 1e-3  # twice their soft ones
    warmup_images: int = 0  # of the global stage, seen before the classifier learns in it
    weak_crop: float = 0.85  # least share of an image that a view shows: what is learnt to be generated; 1: all of it
    strong_operations: int = 2  # RandAugment operations on what is classified beside; 0: none
    strong_magnitude: int = 10  # of these, 0 to 30
    fixmatch_weight: float = 1e-3  # data.labelled below 1: of the classifier's own guesses at the others
    fixmatch_threshold: float = 0.95  # probability above which a guess counts
    candidates: float = 4.0  # images that a teacher may sample for each that is kept, to have as many of each class
    missing: Missing = Missing.repeat


@dataclass
class ReplayConfig:
    placement: Placement = Placement.subprocess
    points: Points = Points.renoised
    timesteps: Timesteps = Timesteps.uniform  # of a path's R renoised points; stratified: one in each R-th of all
    jitter: bool = True  # of the timesteps of a path that gives points; without, all paths have the same
    steps: int = 10  # sampling steps N of a trajectory
    solver: Solver = Solver.ddim
    eta: float = 0.0  # ddim: 0 deterministic, 1 as noisy as DDPM
    guidance: float = 1.0  # of the paths by the class (Ho and Salimans 2022), by two evaluations a step; 1: off
    clip_sample: bool = True  # clip the predicted x_0 to [-1, 1] while sampling
    points_per_trajectory: int = 0  # 0: 50, on a path all but its start; inline makes one point of each trajectory
    reuse: int = 1  # times each stored point may be used
    batch: int = 0  # replay points per step over all ranks; 0: train.global_batch
    shard_trajectories: int = 128  # trajectories per replay shard
    sampler_batch: int = 128  # trajectories sampled at once by a teacher
    precision: Precision = Precision.fp32  # of the teacher: its weights and all that it computes
    compile: bool = False  # the teacher, by torch.compile; its CUDA graphs, where there is CUDA, need no key
    workers: int = 1  # subprocess: teachers sharing the work
    device: str = ""  # subprocess: cpu, or cuda:N for the N-th GPU of the node; empty: chosen
    devices_per_node: int = 1  # ranks: local ranks that become teachers
    threads: int = 1  # CPU threads of each teacher; like train.threads, another number rounds differently
    on_starved: OnStarved = OnStarved.wait
    timeout: float = 600.0  # seconds without a new shard after which waiting ends the run
    reuse_cap: int = 4  # on_starved=reuse: times that a stored point may be used in all; then the step goes without
    pool_gb: float = 10.0  # bytes of published shards a pool may hold, in GB
    pool_shards: int = 0  # unused shards at which a pool counts as full; 0: as many as pool_gb holds
    low_watermark: float = 0.5  # a full pool is filled again once no more than this share of it is unused
    store: str = ""  # where the pools lie, as s3://bucket/prefix; empty: in the run directory
    retirement: Retirement = Retirement.delete  # what becomes of the pool of a task that is learnt
    restarts: int = 3  # of a dead sampler in a row without a new shard, before it is given up
    hang_timeout: float = 300.0  # seconds without a sign of life after which a sampler is killed and started again


@dataclass
class EvaluationConfig:
    extractor: Extractor = Extractor.classifier
    extractor_path: str = ""  # local weights of inception or dinov2; empty: their libraries' cache
    classifier_epochs: int = 10
    samples: int = 2000  # generated images per evaluation, over all seen classes
    steps: int = 10  # sampling steps
    solver: Solver = Solver.ddim
    eta: float = 0.0
    guidance: float = 1.0  # as replay.guidance
    batch: int = 500
    grid_per_class: int = 8
    loss_images: int = 32  # test images of each task whose loss is taken in each bin of timesteps; 0: none
    timestep_bins: int = 10
    bpd_images: int = 0  # test images of each task for the bound on the likelihood; 0: none, it is expensive
    bpd_timesteps: int = 100  # of each of them, spread over strata, for the terms of the bound; T - 1 or more: all
    nearest_training: bool = False  # compare samples with every training image; with a rehearsed buffer: always
    probe_images: int = 0  # training images of each class that probes of the model's features learn from; 0: no probes
    probe_timesteps: list[int] = field(default_factory=lambda: [0, 10, 50, 100, 200])  # noise levels of these images
    probe_neighbours: int = 5  # that vote in the k-NN probe


@dataclass
class ClassifierConfig:
    """The solver of Shin et al. 2017: a classifier that learns the same tasks, from what the method replays."""

    epochs: int = 0  # passes over the images of each task; 0: no such classifier
    batch: int = 64  # images of the task in a step, and as many replayed ones
    lr: float = 4e-3  # largest learning rate of a task
    replay_images: int = 0  # sampled from the previous model in all, for each task; 0: as many as the task has
    temperature: float = 2.0  # of the previous classifier's soft labels for them


@dataclass
class ClusterConfig:
    timeout: float = 600.0  # seconds of silence after which ranks take another one for lost, and end


@dataclass
class CheckpointConfig:
    every_images: int = 0  # between checkpoints, by steps of train.global_batch; 0: four in each task
    keep: int = 2  # newest checkpoints kept while a task runs; the end of each task is always kept


@dataclass
class TrackingConfig:
    progress: bool = True
    wandb: Wandb = Wandb.off
    project: str = "palimpsest"
    wandb_samples: int = 64
    profile_steps: int = 0  # steps of an attempt that torch.profiler records; 0: none
    profile_start: int = 10  # steps before the first of them, the last few to warm up
    seen_samples: bool = False  # write the keys of the images of each step to the attempt's log directory


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    jdcl: JdclConfig = field(default_factory=JdclConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def replay_batch(self) -> int:
        """Replay points per step over all ranks."""
        return self.replay.batch or self.train.global_batch

    @property
    def max_classes(self) -> int:
        """Class ids that the model has room for; 0 for a model that neither takes nor tells classes."""
        labels = self.model.conditional or self.classifies
        return (self.model.max_classes or self.data.classes) if labels else 0

    @property
    def null_label(self) -> int | None:
        """The label that stands for no class, after all classes; None where the model does not learn it."""
        return self.max_classes if self.model.conditional and self.model.label_dropout > 0 else None

    def classes_until(self, task: int) -> list[int]:
        """Class ids of tasks 1 to `task`, in the order of learning."""
        return [label for learnt in self.data.tasks[:task] for label in learnt]

    @property
    def needs_teacher(self) -> bool:
        """Whether the method learns from the previous model."""
        return self.method.name in TAUGHT

    @property
    def classifies(self) -> bool:
        """Whether the model has a classifier of its own."""
        return self.model.classifier is not OwnClassifier.none

    @property
    def points(self) -> Points | OwnPoints:
        """What the teacher is asked about: the method's own kind of point, or what `replay.points` says."""
        return OWN_POINTS.get(self.method.name, self.replay.points)

    @property
    def points_per_trajectory(self) -> int:
        """Replay points of each trajectory: in the loop each has one of its own."""
        if self.replay.placement is Placement.inline:
            return 1
        on_path = max(1, self.replay.steps - 1)
        natural: dict[Points | OwnPoints, int] = {Points.trajectory: on_path, Points.both: 2 * on_path}
        return self.replay.points_per_trajectory or natural.get(self.points, RENOISED_POINTS)

    @property
    def penalty(self) -> PenaltyName:
        """What holds the weights: the method itself, or what is set beside it."""
        name = self.method.name.value
        return PenaltyName(name) if name in PenaltyName.__members__ else self.method.penalty

    @property
    def needs_fisher(self) -> bool:
        """Whether the penalty is made of a task's gradients."""
        return self.penalty in (PenaltyName.ewc, PenaltyName.rank1_ewc)

    @property
    def teacher_ranks(self) -> bool:
        """Whether some of the launched ranks are teachers."""
        return self.needs_teacher and self.replay.placement is Placement.ranks


TAUGHT = (
    MethodName.generative_replay,
    MethodName.generative_distillation,
    MethodName.lwf,
    MethodName.gaussian_distillation,
    MethodName.partial_generation,
    MethodName.jdcl,
)
OWN_POINTS: dict[MethodName, Points | OwnPoints] = {
    MethodName.lwf: OwnPoints.current,
    MethodName.gaussian_distillation: OwnPoints.noise,
    MethodName.partial_generation: Points.trajectory,
    MethodName.jdcl: OwnPoints.labelled,
}
