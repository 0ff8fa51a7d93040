"""The training engine: one model under DeepSpeed's ZeRO, with precision, accumulation, clipping, EMA and checkpoints.

ZeRO 0 to 3 train the same model: one Adam of torch's own in every stage, the same clipping, the same order of
reductions (nothing overlaps the backward pass). What cannot keep this is refused by `check_engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from trainer.checkpoint import STATE, CheckpointReader, CheckpointWriter
from trainer.config import Config, OptimizerConfig, OptimizerName, Precision
from trainer.errors import ConfigError, ToldElsewhere, UserError
from trainer.methods.penalty import Penalty
from trainer.moments import MOMENTS, AdamMoments, Ema, Skips
from trainer.partition import FlatPartition, Partition, ShardedPartition, WholePartition
from trainer.settings import check_engine
from trainer.units import Units
from trainer.world import World

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}
BUCKET_NUMEL = 50_000_000  # gradients reduced at once, at most
PERSISTENT_NUMEL = 100_000  # ZeRO-3 keeps smaller parameters whole on every rank: gathering each would cost more
LOSS_SCALE_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches of each rank in a step.

    Raises:
        ConfigError: the global batch does not divide.
    """
    assert config.train.micro_batch >= 0, "auto has been settled"
    local, left = divmod(config.train.global_batch, world_size)
    if left or not local:
        raise ConfigError(f"train.global_batch={config.train.global_batch}: does not divide over {world_size} ranks")
    steps, left = divmod(local, config.train.micro_batch or local)
    if left:
        raise ConfigError(f"train.micro_batch={config.train.micro_batch}: does not divide a rank's {local} images")
    return steps


class Engine:
    """Trains one model over all ranks of a world.

    A step is `accumulation` times `model` and `backward`, then `step`; gradients are averaged over micro-batches and
    ranks, so each loss is the mean over its micro-batch. A step with a loss or a gradient that is not finite, in any
    micro-batch of any rank, changes nothing and is counted; so is one whose squared gradient norm overflows fp32.
    """

    def __init__(self, model: nn.Module, config: Config, world: World) -> None:
        """Args: model: fp32, its parameters all trained; the main rank's values win. Given away to the engine."""
        check_engine(config, world.device.type)
        assert all(p.requires_grad and p.dtype is torch.float32 for p in model.parameters()), "all trained, all fp32"
        self.accumulation = accumulation_steps(config, world.size)
        self.dtype = DTYPES[config.train.precision]
        self.grad_norm: Tensor | None = None
        self.penalty: Tensor | None = None
        self._world = world
        self._writer = CheckpointWriter() if world.is_main else None
        self._stage = config.zero.stage
        self._clip_norm = config.optimizer.clip_norm
        self._micro_steps = 0
        self._penalty: Penalty | None = None
        initial = _rounded_away(model, self.dtype, world)
        units = Units(model, gathered=self._stage == 3, recompute=config.train.activation_checkpointing)
        if config.train.compile:
            units.compile(autotune=config.train.autotune)
        adam = make_optimizer([unit.flat for unit in units.units], config.optimizer)  # in the order of the places
        numel = sum(parameter.numel() for parameter in model.parameters())
        with units.modules_hidden() if self._stage == 3 else nullcontext():
            self._engine = _initialize(model, adam, deepspeed_config(config, world.size, numel))
        self._engine.train()
        _skip_alike(self._engine.optimizer, self._stage)
        self._partition = _find_partition(self._engine, self._stage, units, world)
        if initial:
            self._partition.scatter(initial.__getitem__, self._partition.masters)
        self._adam = adam
        self._moments = AdamMoments(adam, self._partition.masters)
        self._skips = Skips(world.device)
        self._ema = Ema(self._partition.masters, config.ema.decay) if config.ema.decay else None

    def skips(self) -> tuple[int, int]:
        """Steps that changed nothing, in all and in a row up to now; the same on all ranks. Waits for the device.

        With fp16 a few are ordinary: the loss scale finds its place by them.
        """
        return self._skips.get()

    def model(self, x: Tensor, t: Tensor, label: Tensor | None, *view: Tensor) -> Any:
        """What the model being trained makes of it (`Denoiser.forward`); any number of calls may precede one
        `backward`."""
        return self._engine(x, t, label, *view)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch; loss: scalar, the mean over the micro-batch."""
        self._micro_steps += 1
        assert self._micro_steps <= self.accumulation, "a step is due"
        if self.accumulation > 1:
            self._engine.set_gradient_accumulation_boundary(self._micro_steps == self.accumulation)
        # A gradient can be finite where the loss is not: then it is spoilt, so that ZeRO's own check finds it.
        self._engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype))

    def step(self) -> None:
        """Add the penalty's gradient, clip, update the weights, follow with the EMA.

        `grad_norm` is then the norm before clipping, fp32 scalar, not finite where the step changed nothing; `penalty`
        the value of the penalty before the step, fp64 scalar, the same on all ranks.
        """
        assert self._micro_steps == self.accumulation, "micro-batches are missing"
        self._micro_steps = 0
        if self._penalty is not None:
            with record_function("penalty"):
                self._add_penalty(self._penalty)
        if self._stage == 0:
            self.grad_norm = _clip([p for p in self._partition.masters if p.grad is not None], self._clip_norm)
            skipped = (~_usable(self.grad_norm)).float()
            setattr(self._adam, "found_inf", skipped)  # noqa: B010  torch's fused Adam heeds it on the device
            self._engine.step()
        else:
            self._engine.step()
            self.grad_norm = _as_tensor(self._engine.get_global_grad_norm(), self._world.device)
            skipped = torch.full((), 1.0 - self._engine.was_step_applied(), device=self._world.device)
        self._skips.add(skipped)
        if self._ema is not None:
            with record_function("ema"):
                self._ema.update(skipped)

    def hold(self, penalty: Penalty | None) -> None:
        """Have a penalty's gradient added to that of the loss, once in each step, from now on; None: no more."""
        self._penalty, self.penalty = penalty, None

    def part(self, full: Callable[[str], Tensor]) -> list[Tensor]:
        """This rank's part of full tensors, given by parameter name; fp32, laid out as penalties see the weights."""
        values = [torch.zeros_like(master, requires_grad=False) for master in self._partition.masters]
        self._partition.scatter(full, values)
        return values

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of all parameters by name."""
        return self._partition.shapes

    def set_lr(self, lr: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr

    def reset_moments(self) -> None:
        """Start the optimiser afresh, with the weights as they are."""
        self._moments.reset()

    def restart(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from other weights, a whole state dict, with a fresh optimiser and an average that begins there."""
        assert self._micro_steps == 0, "between two steps only"
        _fill(_buffers(self._engine.module), weights.__getitem__)
        self._partition.scatter(weights.__getitem__, self._partition.masters)
        self._partition.publish()
        self._moments.reset()
        if self._ema is not None:
            self._ema.restart()

    def weights(self, ema: bool) -> dict[str, Tensor]:
        """The whole state dict in fp32 on the CPU, buffers included, on every rank; collective."""
        return self._weights(ema, everywhere=True)

    def save(self, directory: Path, extra: Mapping[str, Any]) -> None:
        """Gather a checkpoint and have it written, whole or not at all, while training goes on; collective.

        Waits for the write of the one before. Until it is written, the main rank's host memory holds all of it.

        Args: extra: what JSON can keep, as it is now; given back by `load`.
        """
        assert self._micro_steps == 0, "between two steps only"
        if self._writer is not None:
            self._writer.wait()  # before gathering: never two in memory
        pieces = {name: self._gather_piece(name) for name in self._pieces()}
        state = {"steps": self._moments.steps(), "skips": self.skips(), "loss_scale": self._loss_scale()}
        if self._writer is not None:
            self._writer.submit(Path(directory), pieces, state | {"extra": dict(extra)})

    def published(self) -> list[Path]:
        """Checkpoints published since the last call, on the main rank; none on the others. Not collective.

        Raises:
            UserError: on the main rank, once, when one could not be written.
        """
        return self._writer.published() if self._writer is not None else []

    def flush(self) -> None:
        """Wait until every checkpoint is published; collective, and there for every rank when it returns.

        Raises:
            UserError: on every rank, when one could not be written.
        """
        failure: UserError | None = None
        try:
            if self._writer is not None:
                self._writer.finish()
        except UserError as error:
            failure = error
        if self._world.any(failure is not None):
            raise failure or ToldElsewhere("the main rank could not write a checkpoint")

    def load(self, directory: Path) -> dict[str, Any]:
        """Go on from a checkpoint of the same model, of any ZeRO stage and number of ranks; gives back its `extra`.

        Raises:
            UserError: on every rank, before anything is changed; on those that see it, naming what is missing or
                damaged.
        """
        failure: UserError | None = None
        reader: CheckpointReader | None = None
        try:
            reader = self._open(Path(directory))
        except UserError as error:
            failure = error
        if self._world.any(failure is not None) or reader is None:
            raise failure or ToldElsewhere(f"{directory}: another rank could not read the checkpoint")
        buffers = _buffers(self._engine.module)
        reader.read("weights", lambda read: _fill(buffers, read))
        for name, values in self._pieces().items():
            reader.read(name, lambda read, values=values: self._partition.scatter(read, values))
        self._partition.publish()
        self._moments.set_steps(int(reader.state["steps"]))
        self._skips.set(*reader.state["skips"])
        self._set_loss_scale(reader.state["loss_scale"])
        return reader.state["extra"]

    def close(self) -> None:
        """Finish what is being written, take DeepSpeed's hooks off the model and free what it holds.

        The engine is of no use afterwards. Whether the write went well, `flush` says.
        """
        if self._writer is not None:
            self._writer.close()
        self._engine.destroy()

    @torch.no_grad()
    def _add_penalty(self, penalty: Penalty) -> None:
        gradients, self.penalty = penalty.grad(
            [master.detach() for master in self._partition.masters], self._partition.total
        )
        if self.dtype is torch.float16:  # what is averaged by now carries the loss scale
            scale = self._engine.optimizer.loss_scale
            gradients = [gradient.mul_(scale) for gradient in gradients]
        self._partition.add_gradients(gradients)

    # --- parts of a checkpoint ------------------------------------------------------------------------------------

    def _pieces(self) -> dict[str, list[Tensor]]:
        """File names of a checkpoint and this rank's part of each."""
        pieces = {"weights": self._partition.masters}
        pieces |= {name: self._moments.tensors(name) for name in MOMENTS}
        return pieces | ({"ema": self._ema.averages} if self._ema is not None else {})

    def _gather_piece(self, name: str) -> dict[str, Tensor]:
        if name == "weights":
            return self._weights(ema=False, everywhere=False)
        return self._partition.gather(self._pieces()[name], everywhere=False)

    def _weights(self, ema: bool, everywhere: bool) -> dict[str, Tensor]:
        values = self._ema.averages if ema and self._ema is not None else self._partition.masters
        full = self._partition.gather(values, everywhere)
        if full:
            full |= {name: buffer.detach().cpu().clone() for name, buffer in _buffers(self._engine.module).items()}
        return full

    def _open(self, directory: Path) -> CheckpointReader:
        """The reader of a checkpoint that has all that this engine needs."""
        reader = CheckpointReader(directory)
        if self._world.is_main:  # one look at every byte is enough
            reader.verify()
        shapes = self._partition.shapes
        buffers = {name: buffer.shape for name, buffer in _buffers(self._engine.module).items()}
        for name in self._pieces():
            reader.check(name, shapes | buffers if name == "weights" else shapes)
        missing = {"steps", "skips", "loss_scale", "extra"} - reader.state.keys()
        if missing:
            raise UserError(f"{directory / STATE}: holds no {sorted(missing)[0]}")
        return reader

    def _loss_scale(self) -> dict[str, float] | None:
        if self.dtype is not torch.float16:
            return None
        scaler = self._engine.optimizer.loss_scaler
        return {name: getattr(scaler, name) for name in LOSS_SCALE_STATE}

    def _set_loss_scale(self, state: dict[str, float] | None) -> None:
        if self.dtype is torch.float16 and state is not None:
            for name in LOSS_SCALE_STATE:
                setattr(self._engine.optimizer.loss_scaler, name, state[name])


def make_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Adam | torch.optim.AdamW:
    """torch's Adam or AdamW in its fused form: one pass over each tensor, no host synchronisation."""
    kind = torch.optim.Adam if config.name is OptimizerName.adam else torch.optim.AdamW
    return kind(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def deepspeed_config(config: Config, world_size: int, numel: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a model of `numel` parameters: plain, in order, nothing timed or logged."""
    accumulation = accumulation_steps(config, world_size)
    precision, stage = config.train.precision, config.zero.stage
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
    zero["reduce_bucket_size"] = min(max(numel, 1), BUCKET_NUMEL)
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT_NUMEL
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.global_batch // world_size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.clip_norm if stage > 0 else 0.0,  # stage 0 clips in Engine.step
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision is Precision.bf16, "check_grad_overflow": True},
        "fp16": {"enabled": precision is Precision.fp16},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},  # it would wait for the device each step
    }


def _initialize(model: nn.Module, adam: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    import deepspeed  # slow, and it chooses its accelerator while it is imported

    return deepspeed.initialize(model=model, optimizer=adam, config=config, dist_init_required=False)[0]


def _find_partition(engine: Any, stage: int, units: Units, world: World) -> Partition:
    vectors = [unit.flat for unit in units.units]
    if stage == 0:
        return WholePartition(units.places, world, list(vectors))
    if stage == 3:
        numbers = {getattr(vector, "ds_id"): number for number, vector in enumerate(vectors)}  # noqa: B009
        return ShardedPartition(units.places, world, engine.optimizer, numbers)
    return FlatPartition(units.places, world, engine.optimizer)


def _rounded_away(model: nn.Module, dtype: torch.dtype, world: World) -> dict[str, Tensor]:
    """The main rank's weights, when DeepSpeed will round them to `dtype` before it makes its fp32 masters of them."""
    if dtype is torch.float32:
        return {}
    initial = {name: parameter.detach().to(world.device, copy=True) for name, parameter in model.named_parameters()}
    for weight in initial.values():
        world.broadcast(weight)
    return initial


def _clip(parameters: list[Tensor], clip_norm: float) -> Tensor:
    """Scale gradients to at most `clip_norm` (0: as they are), as ZeRO's stages do; gives their norm before."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm


def _usable(norm: Tensor) -> Tensor:
    """Whether a gradient of this norm (scalar) can be applied: Adam squares it, in fp32."""
    return norm.float().square().isfinite()


def _skip_alike(optimizer: Any, stage: int) -> None:
    """Make ZeRO's stages refuse the same gradients, and never raise an error for them.

    Stages 1 and 2 sum the squared norm in fp32, stage 3 in fp64, where it hardly ever overflows. The norm alone shows
    what is not finite: a pass over the gradients in search of it before, and a wait for its answer, are left out in
    stages 1 and 2. The loss scaler would raise a bare Exception at its smallest scale: how many skipped steps are too
    many is for the caller to say.
    """
    if stage in (1, 2):
        optimizer.has_overflow = lambda partition_gradients=True: False
    if stage == 3:
        measure = optimizer.get_grad_norm_direct

        def get_grad_norm_direct(*args: Any, **kwargs: Any) -> Tensor:
            norm = measure(*args, **kwargs)
            return torch.where(_usable(norm), norm, torch.inf)

        optimizer.get_grad_norm_direct = get_grad_norm_direct
    if stage > 0 and getattr(optimizer.loss_scaler, "dynamic", False):
        optimizer.loss_scaler.raise_error_at_min_scale = False


def _as_tensor(norm: Tensor | float | None, device: torch.device) -> Tensor | None:
    """DeepSpeed gives a plain number where a step overflowed."""
    return None if norm is None else torch.as_tensor(norm, dtype=torch.float32, device=device)


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers by name."""
    names = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in names}


def _fill(buffers: dict[str, Tensor], read: Any) -> None:
    for name, buffer in buffers.items():
        buffer.copy_(read(name))
