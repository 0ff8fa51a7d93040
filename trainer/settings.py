"""Loading a configuration (dataclass defaults < YAML < dotlist) and refusing what cannot be run.

Every refusal is one line that names the file or the command line, the key and what to do.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from trainer.config import (
    AUTO,
    OWN_POINTS,
    Buffer,
    Config,
    DataConfig,
    MethodName,
    OnStarved,
    OwnPoints,
    PenaltyName,
    Placement,
    Points,
    Precision,
    Solver,
)
from trainer.data.shards import IMAGE_LIMIT
from trainer.data.tasks import split_classes
from trainer.errors import ConfigError, one_line
from trainer.idle import COMMAND_LINE, check_idle
from trainer.merging import default_settings, flatten, merge_settings, read_dotlist, read_file, settings_in, to_config
from trainer.probe_settings import check_probes
from trainer.store import check_url, is_url
from trainer.yaml_text import Unreadable, read_yaml

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
LARGEST = {"data.classes": 10**6, "data.image_size": IMAGE_LIMIT, "diffusion.timesteps": 10**6}  # sized in memory
SHORTEST_TIMEOUT, LONGEST_TIMEOUT = 10.0, 86400.0  # cluster.timeout, in seconds

# What may differ between two attempts of one run: nothing here changes which model is trained.
# data.tasks is compared by its own rule: the old tasks must be a prefix of the new ones.
FREE_KEYS = (
    "run.name",
    "run.dir",
    "data.root",
    "data.source_path",
    "data.class_list",
    "data.classes",
    "data.tasks",
    "data.classes_per_task",
    "data.class_order_seed",
    "data.verify",
    "data.workers",
    "data.prefetch",
    "data.cache_dir",
    "data.cache_gb",
    "data.store_timeout",
    "data.request_timeout",
    "data.shard_size",
    "data.format",
    "train.micro_batch",
    "train.activation_checkpointing",
    "train.compile_cache",
    "train.peak_tflops",
    "train.log_every",
    "train.gc_every",
    "train.threads",
    "train.max_skipped",
    "zero.",
    "replay.placement",
    "replay.workers",
    "replay.device",
    "replay.devices_per_node",
    "replay.threads",
    "replay.on_starved",
    "replay.timeout",
    "replay.reuse_cap",
    "replay.pool_gb",
    "replay.pool_shards",
    "replay.low_watermark",
    "replay.store",
    "replay.retirement",
    "replay.restarts",
    "replay.hang_timeout",
    "evaluation.batch",
    "evaluation.extractor_path",
    "classifier.",
    "cluster.",
    "checkpoint.",
    "tracking.",
)


def find_config(name: str) -> Path:
    """A path as given, then `configs/<name>` and `configs/<name>.yaml`."""
    candidates = (Path(name), Path("configs") / name, CONFIG_DIR / name, CONFIG_DIR / f"{name}.yaml")
    try:
        found = next((path for path in candidates if path.is_file()), None)
    except (OSError, ValueError) as error:  # a name that no file can have, a folder that may not be entered
        raise ConfigError(f"--config {one_line(name)}: {one_line(error)}") from None
    if found is not None:
        return found
    known = ", ".join(sorted(path.name for path in CONFIG_DIR.glob("*.yaml"))) or "none"
    raise ConfigError(f"--config {one_line(name)}: no such file, here or in configs/ (there: {known})")


def load_config(name: str, overrides: list[str]) -> Config:
    """The validated configuration of a file and a dotlist (`train.images_per_task=20000`).

    Raises:
        ConfigError: one line naming file and key.
    """
    path = find_config(name)
    merged = merge_settings(default_settings(), read_file(path), str(path))
    merged = merge_settings(merged, read_dotlist(overrides), COMMAND_LINE)
    config = to_config(merged)
    if not config.run.name:
        beside = config.method.penalty
        penalty = "" if beside is PenaltyName.none else f"-{beside.value}"
        config.run.name = f"{path.stem}-{config.method.name.value}{penalty}"
    config.model.max_classes = config.max_classes
    check(config)
    check_idle(config, overrides)
    config.data.tasks = task_classes(config.data)
    return config


def restore_config(path: Path) -> dict[str, Any]:
    """The resolved configuration that a run directory keeps, as plain values."""
    try:
        content = read_yaml(path)
    except Unreadable as error:
        raise ConfigError(f"{path}: unreadable ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a configuration")
    return content


def config_from_run(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of an existing run, from its `config.yaml`, with a dotlist over it. Raises ConfigError."""
    merged = merge_settings(default_settings(), settings_in(restore_config(path), str(path)), str(path))
    config = to_config(merge_settings(merged, read_dotlist(overrides), COMMAND_LINE))
    check(config)
    return config


def as_plain(config: Config) -> dict[str, Any]:
    """Nested dict of plain values (enums by name), as `config.yaml` keeps them."""
    plain = _plain(asdict(config))
    if config.train.micro_batch == AUTO:
        plain["train"]["micro_batch"] = "auto"
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value.name if isinstance(value, Enum) else value


def task_classes(data: DataConfig) -> list[list[int]]:
    """Class ids of each task, explicit or from the split."""
    return split_classes(data.classes, data.classes_per_task, data.class_order_seed, tasks=data.tasks)


def refused_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys in which a configuration differs from the run's so that it would be another run.

    A key that the run's file does not have is younger than the run: its default is what was done before there was it.
    """
    before, after = dict(flatten(as_plain(Config()))) | dict(flatten(old)), dict(flatten(new))
    changed = [
        f"{one_line(key)} ({one_line(before.get(key))} -> {one_line(after.get(key))})"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(FREE_KEYS)
    ]
    tasks = before.get("data.tasks", [])
    if not isinstance(tasks, list) or not tasks or after["data.tasks"][: len(tasks)] != tasks:
        changed.append(f"data.tasks (the run's {one_line(tasks)} must come first)")
    return changed


# --- checks -----------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Refuse impossible values and combinations that do not depend on the machine."""
    for rule in (
        *(_check_numbers, _check_cluster, _check_data, _check_guidance, _check_penalty, _check_classifier),
        *(_check_replay, _check_train),
    ):
        rule(config)
    check_probes(config, task_classes(config.data))


def check_engine(config: Config, device_type: str) -> None:
    """Refuse what the engine cannot train with this ZeRO stage and precision on this kind of device ("cpu", "cuda").

    Raises:
        ConfigError: one line naming the keys.
    """
    stage, precision = config.zero.stage, config.train.precision
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero.stage={stage}: must be 0, 1, 2 or 3")
    if stage == 0 and precision is not Precision.fp32:
        raise ConfigError(
            f"zero.stage=0 with train.precision={precision.value}: DeepSpeed would train another model without ZeRO; "
            "take zero.stage=1 (the same memory on one device) or train.precision=fp32"
        )
    if precision is Precision.fp16 and device_type == "cpu":
        raise ConfigError("train.precision=fp16: the CPU does not train in fp16; take fp32 or bf16")


def check_world(config: Config, trainers: int, cuda: bool) -> None:
    """Refuse what the number of trainer ranks or the kind of device makes impossible."""
    train = config.train
    if train.global_batch % trainers:
        raise ConfigError(
            f"train.global_batch={train.global_batch}: does not divide over {trainers} trainer ranks; "
            f"take a multiple of {trainers}"
        )
    if config.replay_batch % trainers:
        key = "replay.batch" if config.replay.batch else "train.global_batch"
        raise ConfigError(f"{key}={config.replay_batch}: does not divide over {trainers} trainer ranks")
    local, micro = train.global_batch // trainers, train.micro_batch
    micro = 0 if micro == AUTO else micro  # what is found divides
    if micro and local % micro:
        raise ConfigError(f"train.micro_batch={micro}: does not divide a rank's {local} images per step")
    if micro and (config.replay_batch // trainers) % (local // micro):
        raise ConfigError(
            f"train.micro_batch={micro}: the rank's {config.replay_batch // trainers} replay points do not divide "
            f"into {local // micro} micro-batches"
        )
    check_engine(config, "cuda" if cuda else "cpu")
    compiled = {"train.compile": train.compile, "replay.compile": config.needs_teacher and config.replay.compile}
    if any(compiled.values()) and not cuda and shutil.which("g++") is None:
        key = next(key for key, wanted in compiled.items() if wanted)
        raise ConfigError(f"{key}=true: needs a C++ compiler (g++) on a machine without CUDA")
    if config.replay.device.startswith("cuda") and not cuda:
        raise ConfigError(f"replay.device={config.replay.device}: this machine has no CUDA device")
    if config.needs_teacher and config.replay.precision is Precision.fp16 and not cuda:
        raise ConfigError("replay.precision=fp16: this machine's CPU does not sample in fp16; take fp32 or bf16")


def _check_numbers(config: Config) -> None:
    positive = (
        "data.classes data.image_size data.classes_per_task data.shard_size data.workers data.prefetch "
        "data.cache_gb data.store_timeout data.request_timeout "
        "model.layers_per_block model.norm_groups model.attention_head_dim diffusion.timesteps optimizer.lr "
        "train.images_per_task train.global_batch train.log_every train.gc_every train.max_skipped replay.steps "
        "replay.reuse replay.shard_trajectories replay.sampler_batch replay.workers "
        "replay.devices_per_node replay.threads replay.timeout replay.pool_gb replay.reuse_cap replay.hang_timeout "
        "evaluation.samples evaluation.steps evaluation.batch evaluation.grid_per_class evaluation.classifier_epochs "
        "evaluation.timestep_bins evaluation.bpd_timesteps evaluation.probe_neighbours checkpoint.keep "
        "method.fisher_images method.fisher_draws classifier.batch classifier.lr classifier.temperature "
        "tracking.profile_start jdcl.candidates"
    )
    natural = (
        "train.threads replay.points_per_trajectory replay.batch replay.restarts replay.pool_shards replay.eta "
        "replay.guidance evaluation.eta evaluation.guidance "
        "optimizer.eps optimizer.weight_decay optimizer.warmup_images optimizer.clip_norm method.distillation_weight "
        "method.rehearsal_coefficient checkpoint.every_images model.dropout tracking.wandb_samples "
        "method.penalty_weight method.min_snr method.buffer_per_class method.buffer_size model.max_classes "
        "train.peak_tflops tracking.profile_steps evaluation.loss_images evaluation.bpd_images evaluation.probe_images "
        "classifier.epochs classifier.replay_images jdcl.global_images jdcl.classification_weight jdcl.noise_weight "
        "jdcl.label_weight jdcl.logit_weight jdcl.warmup_images jdcl.strong_operations jdcl.strong_magnitude "
        "jdcl.fixmatch_weight"
    )
    values = dict(flatten(asdict(config)))
    for key, value in values.items():
        _require(not isinstance(value, float) or math.isfinite(value), key, value, "is no finite number")
    for key, limit in LARGEST.items():
        _require(values[key] <= limit, key, values[key], f"must not be above {limit}")
    for key in positive.split():
        _require(values[key] > 0, key, values[key], "must be above 0")
    for key in natural.split():
        _require(values[key] >= 0, key, values[key], "must not be negative")
    _require(config.train.micro_batch >= AUTO, "train.micro_batch", config.train.micro_batch, "must not be negative")
    for key in (
        "optimizer.beta1",
        "optimizer.beta2",
        "ema.decay",
        "model.dropout",
        "model.label_dropout",
        "replay.low_watermark",
    ):
        _require(0 <= values[key] < 1, key, values[key], "must be in [0, 1)")
    for key in ("data.labelled", "jdcl.weak_crop", "jdcl.fixmatch_threshold"):
        _require(0 < values[key] <= 1, key, values[key], "must be in (0, 1]")
    _require(
        values["jdcl.strong_magnitude"] <= 30, "jdcl.strong_magnitude", values["jdcl.strong_magnitude"], "above 30"
    )
    for key in ("replay.eta", "evaluation.eta"):
        _require(values[key] <= 1, key, values[key], "must be in [0, 1]")
    for name, section in (("replay", config.replay), ("evaluation", config.evaluation)):
        noisy = section.eta > 0 and section.solver is not Solver.ddim
        why = f"{name}.solver={section.solver.value} adds no noise; take {name}.solver=ddim"
        _require(not noisy, f"{name}.eta", section.eta, why)
    for key in ("replay.steps", "evaluation.steps", "evaluation.timestep_bins"):
        _require(values[key] <= config.diffusion.timesteps, key, values[key], "more than diffusion.timesteps")
    betas = config.diffusion.beta_start, config.diffusion.beta_end
    _require(0 < betas[0] <= betas[1] < 1, "diffusion.beta_end", betas[1], "needs 0 < beta_start <= beta_end < 1")


def _check_cluster(config: Config) -> None:
    timeout = config.cluster.timeout
    why = f"must be at least {SHORTEST_TIMEOUT:.0f} s: hosts start, import and compile at their own pace"
    _require(timeout >= SHORTEST_TIMEOUT, "cluster.timeout", timeout, why)
    why = f"must not be above {LONGEST_TIMEOUT:.0f} s, a day"
    _require(timeout <= LONGEST_TIMEOUT, "cluster.timeout", timeout, why)


def _check_data(config: Config) -> None:
    data = config.data
    _require(data.channels in (1, 3), "data.channels", data.channels, "must be 1 or 3")
    if is_url(data.root):
        check_url("data.root", data.root)
    tasks = task_classes(data)
    _require(
        not config.max_classes or config.max_classes >= data.classes,
        "model.max_classes",
        config.model.max_classes,
        f"fewer than data.classes={data.classes}",
    )
    seen = len({label for task in tasks for label in task})
    _require(config.evaluation.samples >= 2 * seen, "evaluation.samples", config.evaluation.samples, "too few")


def _check_guidance(config: Config) -> None:
    model = config.model
    if model.label_dropout and not model.conditional:
        raise ConfigError(f"model.label_dropout={model.label_dropout}: model.conditional=false has no labels to drop")
    for key, value in (
        ("replay.guidance", config.replay.guidance),
        ("evaluation.guidance", config.evaluation.guidance),
    ):
        _require(
            value == 1.0 or config.null_label is not None,
            key,
            value,
            "needs model.conditional=true and model.label_dropout above 0: it also asks for what the model predicts "
            "without a class",
        )


def _check_penalty(config: Config) -> None:
    beside, whole = config.method.penalty, config.penalty
    _require(
        beside in (PenaltyName.none, whole),
        "method.penalty",
        beside.value,
        f"method.name={config.method.name.value} is another penalty; take method.name=finetune with the one you want",
    )


def _check_classifier(config: Config) -> None:
    """What a classifier within the model goes with."""
    name, kind = config.method.name, config.model.classifier
    learns = name in (MethodName.jdcl, MethodName.finetune, MethodName.joint)
    why = f"method.name={name.value} does not teach it; jdcl, finetune and joint do"
    _require(learns or not config.classifies, "model.classifier", kind.value, why)
    if not config.classifies:
        why = "needs a classifier within the model: model.classifier=joint with model.conditional=false"
        _require(name is not MethodName.jdcl, "method.name", name.value, why)
        why = "only a classifier within the model can do without labels: model.classifier"
        _require(config.data.labelled == 1, "data.labelled", config.data.labelled, why)
        return
    _require(not config.model.conditional, "model.classifier", kind.value, "needs model.conditional=false")
    why = "the classifier beside the model wants the labels of all images; take data.labelled=1"
    epochs = config.classifier.epochs
    _require(config.data.labelled == 1 or not epochs, "classifier.epochs", epochs, why)
    why = "holds only the weights of a model without model.classifier"
    _require(config.penalty is PenaltyName.none, "method.penalty", config.penalty.value, why)
    if name is not MethodName.jdcl:
        return
    jdcl, replay = config.jdcl, config.replay
    _require(jdcl.candidates >= 1, "jdcl.candidates", jdcl.candidates, "must be at least 1")
    why = "the teachers of jdcl sample beside the trainer; take subprocess, ranks or external"
    _require(replay.placement is not Placement.inline, "replay.placement", replay.placement.value, why)
    why = "the global stage of jdcl learns from replay alone; take wait or fail"
    _require(replay.on_starved in (OnStarved.wait, OnStarved.fail), "replay.on_starved", replay.on_starved.value, why)


def _check_replay(config: Config) -> None:
    replay = config.replay
    if config.method.name is MethodName.experience_replay:
        key = "method.buffer_size" if config.method.buffer is Buffer.reservoir else "method.buffer_per_class"
        _require(getattr(config.method, key.partition(".")[2]) > 0, key, 0, "leaves nothing to rehearse")
    if replay.store:
        _require(is_url(replay.store), "replay.store", replay.store, "must be s3://bucket/prefix or the like")
        check_url("replay.store", replay.store, write=True)
    if not config.needs_teacher:
        return
    _check_points(config)
    if replay.placement is Placement.inline:
        _require(replay.reuse == 1, "replay.reuse", replay.reuse, "inline replay samples each point afresh")


def _check_points(config: Config) -> None:
    """Which points the teacher can be asked about, and where."""
    replay, kind, name = config.replay, config.points, config.method.name
    inline = replay.placement is Placement.inline
    if kind is OwnPoints.current:
        why = "lwf asks the teacher about the trainer's own batch, within the step; take replay.placement=inline"
        _require(inline, "replay.placement", replay.placement.value, why)
        why = f"lwf replays the current batch, train.global_batch={config.train.global_batch}"
        _require(config.replay_batch == config.train.global_batch, "replay.batch", replay.batch, why)
    if not isinstance(kind, Points) or kind is Points.renoised:
        return
    generative, own = name is MethodName.generative_replay, name in OWN_POINTS
    _require(not generative, "replay.points", kind.value, "generative_replay learns the noise it adds; take renoised")
    why = "inline replay makes renoised; method.name=partial_generation makes a point on each path"
    _require(not inline or own, "replay.points", kind.value, why)
    count = config.points_per_trajectory
    on_path = kind.on_path(count)
    _require(
        on_path < replay.steps,
        "replay.points_per_trajectory",
        count,
        f"{on_path} of them lie on a trajectory of replay.steps={replay.steps}, which has {replay.steps - 1} "
        "beside its start",
    )


def _check_train(config: Config) -> None:
    check_engine(config, "cuda")  # what no machine can; `check_world` knows this one
    _require(
        config.train.images_per_task >= config.train.global_batch,
        "train.images_per_task",
        config.train.images_per_task,
        f"less than one step of train.global_batch={config.train.global_batch}",
    )


def _require(holds: bool, key: str, value: object, why: str) -> None:
    if not holds:
        raise ConfigError(f"{key}={value}: {why}")
