"""What the main rank makes sure of before the ranks meet: every refusal comes before the first step."""

from __future__ import annotations

import os
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

import yaml

from data_tools.build import build, check_same
from data_tools.spec import BuildSpec, default_root
from trainer.config import Config, Placement, Source
from trainer.data.dataset import TaskData
from trainer.data.remote import FIRST_CONTACT, local_root, open_tasks
from trainer.data.shards import DATASET_NAME, DatasetCard, read_card, try_lock, write_atomic
from trainer.disk import DiskNeed
from trainer.errors import ConfigError, UserError
from trainer.evaluation.features import check_weights
from trainer.models.denoiser import check_model
from trainer.models.teacher import CARD_NAME
from trainer.models.teacher import read_card as read_teacher_card
from trainer.replay.request import plan_request
from trainer.replay.state import read_json, writer_lives
from trainer.replay.transport import pools_url
from trainer.run import RunDir
from trainer.settings import as_plain, refused_changes, restore_config
from trainer.steps import replay_steps
from trainer.store import ObjectStore, Patience, is_url

LOCK_SECONDS = 10.0
SWEPT = (
    *("*", "tasks/*/*", "report/*"),
    *(f"tasks/*/{part}/*" for part in ("teacher", "local", "checkpoints", "buffer", "fisher", "classifier")),
    *("tasks/*/replay/.progress.json.*", "tasks/*/replay/.request.json.*"),
)


def build_spec(config: Config) -> BuildSpec:
    """What data_tools must have built for a configuration."""
    data = config.data
    return BuildSpec(
        name=data.name,
        source=data.source.value,
        source_path=data.source_path,
        class_list=data.class_list,
        classes=data.classes,
        image_size=data.image_size,
        channels=data.channels,
        tasks=data.tasks,
        shard_size=data.shard_size,
        format=data.format.value,
        small_images=data.small_images.value,
    )


def resolve_root(config: Config) -> None:
    """Give `data.root` the place that the content of the section names, where it is empty."""
    if not config.data.root:
        config.data.root = str(default_root(config.data.name, build_spec(config)))


def lock_run(run: RunDir, patience: float = LOCK_SECONDS) -> None:
    """Hold the run directory until this process ends.

    Raises:
        UserError: another process holds it, and still does after `patience` seconds: one that was told to stop needs
            a while to save.
    """
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run.lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{run.root}: cannot be written ({error.strerror}); key run.dir") from None
    deadline = time.monotonic() + patience
    while not try_lock(descriptor):
        if time.monotonic() >= deadline:
            holder = os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "unknown"
            raise UserError(f"{run.root}: a live run holds this directory (process {holder}); key run.name")
        time.sleep(0.1)
    os.ftruncate(descriptor, 0)
    # Never closed: the lock lasts as long as the process.
    os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode())


def check_run(config: Config, run: RunDir) -> None:
    """Refuse an old run directory that belongs to another configuration.

    Raises:
        ConfigError: naming the keys.
    """
    new = as_plain(config)
    if run.config.exists():
        refused = refused_changes(restore_config(run.config), new)
        if refused:
            raise ConfigError(
                f"{run.config}: this run was started with other settings: {'; '.join(refused)}; take another run.name"
            )
    elif any(run.root.glob("tasks/*")):
        raise ConfigError(f"{run.root}: holds tasks but no config.yaml; take another run.name")


def prepare_data(config: Config, progress: bool) -> DatasetCard:
    """The built data set: what is missing is built where the raw images are there, and all of it is verified.

    Raises:
        UserError: shards that are missing, corrupt or of another data set, naming file and key.
    """
    data = config.data
    if is_url(data.root):
        return check_stored(config)
    root = Path(data.root)
    if not (data.source is Source.digits or Path(data.source_path).exists() or (root / DATASET_NAME).exists()):
        raise UserError(
            f"{data.source_path or root}: missing; put the raw images there (key data.source_path) or point "
            "data.root at shards made with `python -m data_tools build`"
        )
    build(build_spec(config), root, progress)
    numbers = list(range(1, len(data.tasks) + 1))
    for split in ("train", "test"):
        TaskData.open(root, split, numbers, data.verify)
    return read_card(root)


def check_stored(config: Config) -> DatasetCard:
    """A data set in a store: it is only read, so all that the configuration names must be there.

    Raises:
        UserError: shards that are missing or of another data set, naming object and key; a store that does not answer.
    """
    data, root = config.data, local_root(config.data)
    card = read_card(root)
    check_same(build_spec(config), data.root, card)
    if len(card.tasks) < len(data.tasks):
        raise UserError(
            f"{data.root}: holds {len(card.tasks)} tasks, {len(data.tasks)} are wanted; build the others and add them "
            "(python -m data_tools build, then upload); key data.root"
        )
    numbers = list(range(1, len(data.tasks) + 1))
    for split in ("train", "test"):
        open_tasks(data, split, numbers)
    return card


def check_teachers(config: Config, run: RunDir) -> None:
    """The teachers in the run directory must be of this run's classes, each knowing those before it.

    Raises:
        UserError: naming the file.
    """
    for task in range(1, len(config.data.tasks) + 1):
        directory = run.teacher(task)
        if not (directory / CARD_NAME).exists():
            continue
        card = read_teacher_card(directory)
        wanted = config.classes_until(task)
        if card.task != task or sorted(card.classes) != sorted(wanted):
            raise UserError(f"{directory / CARD_NAME}: the teacher of another run (task {card.task}); key run.name")


def check_disk(config: Config, run: RunDir) -> None:
    """Raises UserError where what the run has yet to write will not fit on the disk."""
    written = 0
    for path in run.root.rglob("*"):
        if run.compile_cache in path.parents:  # DiskNeed does not count it either
            continue
        with suppress(FileNotFoundError):  # a sampler started by hand may be at work there
            written += path.lstat().st_size if path.is_file() else 0
    need, free = DiskNeed.of(config).total - written, shutil.disk_usage(run.root).free
    if need > free:
        raise UserError(
            f"{run.root}: the run needs up to {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; keys run.dir, "
            "replay.pool_gb, checkpoint.keep"
        )


def sweep(run: RunDir) -> None:
    """Remove what killed attempts left: half-written files, a wish to stop, and what their supervisors said last.

    Not what is the samplers': one that was started by hand may be writing.
    """
    for pattern in SWEPT:
        for path in run.root.glob(pattern):
            if path.name.startswith(".") and path.suffix in (".tmp", ".old"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    run.stop_wish.unlink(missing_ok=True)
    for path in run.supervisor(0).parent.glob("supervisor-*.json"):
        status = read_json(path)
        if status.get("given_up") or not writer_lives(status):  # who gave up before does not speak of this attempt
            path.unlink(missing_ok=True)


def preflight(config: Config, run: RunDir) -> DatasetCard:
    """All checks of the main rank; only what passes them leaves its configuration in the run directory.

    Raises:
        UserError: one line naming file and key.
    """
    check_model(config.model, image_size=config.data.image_size, max_classes=config.max_classes)
    check_weights(config.evaluation.extractor, config.evaluation.extractor_path)
    check_run(config, run)
    check_teachers(config, run)
    sweep(run)
    card = prepare_data(config, config.tracking.progress)
    check_requests(config)
    check_pool_store(config, run)
    check_disk(config, run)
    write_atomic(run.config, yaml.safe_dump(as_plain(config), sort_keys=False).encode())
    return card


def check_pool_store(config: Config, run: RunDir) -> None:
    """Write an object where the replay pools shall lie, and remove it. Raises UserError where the store refuses."""
    pooled = config.needs_teacher and config.replay.placement is not Placement.inline and len(config.data.tasks) > 1
    if not pooled or not is_url(config.replay.store):
        return
    patience = Patience(min(FIRST_CONTACT, config.data.store_timeout), config.data.request_timeout)
    store = ObjectStore(pools_url(config.replay.store, run), patience)
    store.write("written-on-trial", b"palimpsest")
    store.delete("written-on-trial")


def check_requests(config: Config) -> None:
    """Raises ConfigError where a task's replay cannot be served as configured."""
    if config.needs_teacher:
        for task in range(2, len(config.data.tasks) + 1):
            plan_request(config, task, config.classes_until(task - 1), replay_steps(config))
