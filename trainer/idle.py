"""Settings that change nothing as the others stand: refused where a person gives them on the command line."""

from __future__ import annotations

from dataclasses import fields

from trainer.config import (
    OWN_POINTS,
    Buffer,
    Config,
    MethodName,
    OnStarved,
    OwnClassifier,
    OwnPoints,
    PenaltyName,
    Placement,
    Points,
    Schedule,
)
from trainer.errors import ConfigError
from trainer.store import is_url

COMMAND_LINE = "command line"
_PATH = "replay.steps replay.solver replay.eta replay.guidance replay.clip_sample"  # how a path is sampled


def check_idle(config: Config, overrides: list[str]) -> None:
    """Refuse keys set on the command line that change nothing as the rest stands (a file may serve several uses)."""
    replay, data, model = config.replay, config.data, config.model
    idle = {
        Placement.inline: "replay.points_per_trajectory replay.shard_trajectories replay.pool_gb replay.workers "
        "replay.device replay.devices_per_node replay.threads replay.on_starved replay.timeout replay.restarts "
        "replay.hang_timeout replay.pool_shards replay.low_watermark replay.retirement replay.reuse_cap "
        "replay.timesteps replay.store",
        Placement.external: "replay.workers replay.device replay.devices_per_node replay.threads replay.restarts "
        "replay.hang_timeout",
        Placement.ranks: "replay.workers replay.device",
        Placement.subprocess: "replay.devices_per_node",
    }
    conditions = [(key, f"replay.placement={replay.placement.value}") for key in idle[replay.placement].split()]
    if config.diffusion.schedule is Schedule.cosine:
        conditions += [(f"diffusion.beta_{end}", "diffusion.schedule=cosine") for end in ("start", "end")]
    if data.tasks:
        conditions += [(f"data.{key}", "data.tasks") for key in ("classes_per_task", "class_order_seed")]
    if model.classifier is OwnClassifier.none:
        conditions += [(f"model.classifier_{what}", "model.classifier=none") for what in ("width", "dropout")]
        if not model.conditional:
            conditions.append(("model.max_classes", "model.conditional=false"))
    if not config.train.compile:
        conditions.append(("train.autotune", "train.compile=false"))
    if not config.tracking.profile_steps:
        conditions.append(("tracking.profile_start", "tracking.profile_steps=0"))
    if not config.evaluation.loss_images:
        conditions.append(("evaluation.timestep_bins", "evaluation.loss_images=0"))
    if not config.evaluation.bpd_images:
        conditions.append(("evaluation.bpd_timesteps", "evaluation.bpd_images=0"))
    if not config.evaluation.probe_images:
        conditions += [
            (f"evaluation.probe_{what}", "evaluation.probe_images=0") for what in ("timesteps", "neighbours")
        ]
    conditions += _idle_of_points(config) + _idle_of_the_classifier(config) + _idle_of_jdcl(config)
    shared = config.method.name is MethodName.experience_replay and config.classifier.epochs > 0  # by the classifier
    alone = config.method.name is MethodName.jdcl and not (config.jdcl.real_images or config.classifier.epochs)
    if alone or (not config.needs_teacher and not shared):
        conditions.append(("method.share", f"method.name={config.method.name.value}"))
    unused = "buffer_per_class" if config.method.buffer is Buffer.reservoir else "buffer_size"
    conditions.append((f"method.{unused}", f"method.buffer={config.method.buffer.value}"))
    if config.penalty is PenaltyName.none:
        conditions.append(("method.penalty_weight", "method.penalty=none"))
    if not config.needs_fisher:
        conditions += [
            (f"method.fisher_{what}", f"method.penalty={config.penalty.value}") for what in ("images", "draws")
        ]
    if replay.on_starved is not OnStarved.reuse:
        conditions.append(("replay.reuse_cap", f"replay.on_starved={replay.on_starved.value}"))
    if not is_url(data.root) and not replay.store:
        keys = ("cache_dir", "cache_gb", "store_timeout", "request_timeout")
        conditions += [(f"data.{key}", "data.root and replay.store in no store") for key in keys]
    if not config.needs_teacher:
        conditions.append(("replay.store", f"method.name={config.method.name.value}"))
    given = {override.partition("=")[0] for override in overrides}
    for key, reason in conditions:
        if key in given:
            raise ConfigError(f"{COMMAND_LINE}: {key} has no effect with {reason}")


def _idle_of_points(config: Config) -> list[tuple[str, str]]:
    """Keys that do nothing for the points that the teacher is asked about, each with why."""
    method = f"method.name={config.method.name.value}"
    own = config.method.name in OWN_POINTS
    conditions = [("replay.points", method)] if own else []
    if config.points is Points.trajectory:
        conditions.append(("replay.timesteps", method if own else "replay.points=trajectory"))
    if config.points is Points.renoised:
        conditions.append(("replay.jitter", "replay.points=renoised"))
    if config.points in (OwnPoints.noise, OwnPoints.current):
        conditions += [(key, method) for key in _PATH.split()]
    if config.points is OwnPoints.current:
        conditions.append(("replay.timesteps", method))
    return conditions


def _idle_of_jdcl(config: Config) -> list[tuple[str, str]]:
    method, jdcl = f"method.name={config.method.name.value}", config.jdcl
    if not config.classifies:
        return [(f"jdcl.{field.name}", "model.classifier=none") for field in fields(jdcl)]
    views = ("weak_crop", "strong_operations", "strong_magnitude")
    fixmatch = ("fixmatch_weight", "fixmatch_threshold")
    conditions = [(f"jdcl.{key}", "data.labelled=1") for key in fixmatch if config.data.labelled == 1]
    if not jdcl.fixmatch_weight:
        conditions.append(("jdcl.fixmatch_threshold", "jdcl.fixmatch_weight=0"))
    if not jdcl.strong_operations:
        conditions.append(("jdcl.strong_magnitude", "jdcl.strong_operations=0"))
    if config.method.name is not MethodName.jdcl:
        local = ("classification_weight", *views, *fixmatch)
        return conditions + [(f"jdcl.{field.name}", method) for field in fields(jdcl) if field.name not in local]
    unused = ("method.distillation_weight", "replay.jitter", "optimizer.reset_per_task")
    conditions += [(key, method) for key in unused]
    if not jdcl.distil:
        weights = ("noise", "label", "logit")
        conditions += [(f"jdcl.{weight}_weight", "jdcl.distil=false") for weight in weights]
    return conditions


def _idle_of_the_classifier(config: Config) -> list[tuple[str, str]]:
    if not config.classifier.epochs:
        keys = "classifier.batch classifier.lr classifier.replay_images classifier.temperature"
        return [(key, "classifier.epochs=0") for key in keys.split()]
    if config.needs_teacher:
        return []
    method = f"method.name={config.method.name.value}"
    return [(f"classifier.{key}", method) for key in ("replay_images", "temperature")]
