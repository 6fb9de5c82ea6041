"""Residuals of a packed model trained together against the dense model that it was: what "Recover BitLinear" does.

With D(x, sigma) the denoised picture that a model predicts, its velocity is (x - D) / sigma, which is what Euler steps
follow, in any parametrization that ComfyUI knows.

1. The dense model samples, each time from other noise, along the sigmas given. x, rounded to bf16 before it goes in,
   sigma and velocity are kept (points.py). Then all models are unloaded.
2. A copy of the packed model without residuals is loaded, with trainable ones as branches (quantize/recover.py). Its
   blocks are checkpointed: computed again in the backward pass, so that the memory of one is enough.

Of a conditioning only what the model reads counts: areas, masks, ranges of time, hooks and ControlNets are left out,
and each entry of a combined one is a prompt of its own.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.sample
import torch
import torch.utils.checkpoint

from ...quantize.recover import Look, Plan, Residual, Tuned, take, tune
from ...weights.mapped import give_back_freed
from ...weights.packed_weight import PackedWeight
from ..gradients import outer_blocks
from ..layout import is_packed, mode_of, unwrap, wrap
from ..progress import Progress, shares
from ..sampling import prepared
from ..tensors import PREFIX, base_tensors
from .assemble import around, assemble, empty_twin
from .carry import carry_over
from .layers import packed_pairs
from .loaded import Loaded, with_model
from .points import Points, room_for
from .recovered import Recovered
from .unfinished import Training, Unfinished

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

logger = logging.getLogger(__name__)

LEFT_OUT = (
    *("area", "area_type", "strength", "mask", "mask_strength", "set_area_to_bounds", "default"),
    *("start_percent", "end_percent", "timestep_start", "timestep_end"),
    *("control", "control_apply_to_uncond", "gligen", "hooks"),
)
"""Keys of a conditioning that say where, when and beside what it is used."""
HELD_OUT = 8
"""One of so many prompts, or samplings where there are fewer prompts, is held out."""
TRAINED = 4
"""What a training on a point costs in samplings of it: forward, forward again, backward."""


@dataclass(frozen=True)
class Recovery:
    """What to train on and how. sigmas: [sampling steps + 1] of the schedule. points: how many of all samplings."""

    conditionings: Sequence[list]
    latent: Mapping[str, Any]
    sigmas: torch.Tensor
    points: int = 320
    plan: Plan = field(default_factory=Plan)

    def prompts(self) -> list[list]:
        """Each entry of each conditioning, without what LEFT_OUT names. Raises ValueError if there is none."""
        entries = [entry for conditioning in self.conditionings for entry in conditioning]
        if not entries:
            raise ValueError("there is no conditioning to recover with: connect CLIP Text Encode to prompts")
        return [[c, {name: v for name, v in rest.items() if name not in LEFT_OUT}] for c, rest in entries]

    def samplings(self) -> int:
        """How many. Raises ValueError if there is no step, or not at least one to train on and one held out."""
        steps = len(self.sigmas) - 1
        if steps < 1:
            raise ValueError("sigmas has no step: connect a scheduler whose denoise is more than 0")
        if self.points < 2 * steps:
            raise ValueError(
                f"{self.points} points are less than two samplings of {steps} steps: ask for {2 * steps} points or more"
            )
        return self.points // steps


def recover(
    original: ModelPatcher, patched: ModelPatcher, recovery: Recovery, progress: Progress | None = None
) -> tuple[ModelPatcher, Recovered]:
    """(the packed ModelPatcher with better residuals, what became of them). Both models are as they were.

    progress(done, total) follows; what it raises ends the work. The best state until then is kept (unfinished.py), and
    the next call with the same models and inputs begins from it. Raises ValueError if the patched model has no residual
    or carries LoRAs, if the models differ or are one, or there is too little to train on; MisfitError for a
    conditioning or latent of another model.
    """
    layers = _trained(original, patched)
    prompts, samplings = recovery.prompts(), recovery.samplings()
    samples = prepared(original, dict(recovery.latent))[:1]
    steps = len(recovery.sigmas) - 1
    held = _held_out(samplings, len(prompts), steps)
    plan, looks = recovery.plan, len(held)
    sizes = (samplings * steps, TRAINED * plan.steps * plan.batch + 11 * looks)
    sampling, training = shares(progress, sizes)
    with room_for(samplings * steps, samples.shape[1:]) as points:
        started = time.perf_counter()
        _sample(original, prompts, samples, recovery, points, sampling)
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        give_back_freed()
        between = time.perf_counter()
        begin = Training(original, patched, (prompts, samples, recovery.sigmas, samplings, repr(plan)))
        begun = begin.unfinished()
        residuals, tuned = _train(patched, layers, prompts, samples, recovery, points, held, begin, training)
    begin.end()
    tensors = {name: _with(tensor, residuals.get(name)) for name, tensor in base_tensors(patched).items()}
    recovered = assemble(patched, empty_twin(patched.model), tensors, like=patched)
    return recovered, Recovered(
        type(patched.model).__name__,
        tuned,
        plan,
        sum(2 * p.numel() for r in residuals.values() for p in r.parameters()),
        (len(points) - len(held), len(held)),
        (len(prompts), recovery.points),
        (between - started, time.perf_counter() - between),
        begun,
    )


def _trained(original: ModelPatcher, patched: ModelPatcher) -> list[str]:
    """Names of the weights whose residuals are trained. Raises ValueError as `recover` does."""
    if original.model is patched.model:
        raise ValueError(
            "original and patched are one model: connect the dense model, as it was before Patch to BitLinear, to "
            "original"
        )
    pairs = packed_pairs(original, patched)
    tensors = base_tensors(patched)
    names = [layer.weight for layer, _ in pairs if unwrap(tensors[layer.weight]).rank]
    if not names:
        raise ValueError(
            "no packed layer of the patched model has a residual to train: set rank in Patch to BitLinear to 16 or "
            "more, with 32 as a good start"
        )
    if _has_more(original, patched, {layer.key for layer, _ in pairs}):
        raise ValueError(
            "the patched model carries LoRAs: connect them behind Recover BitLinear instead of before it, where they "
            "do the same"
        )
    return names


def _has_more(original: ModelPatcher, patched: ModelPatcher, packed: Collection[str]) -> bool:
    """Whether the patched model carries what the original does not, or anything on the keys of packed weights.

    A merge is in the codes of packed layers already; on the others it stays a patch, on both models the same.
    """
    for key, patches in patched.patches.items():
        others = original.patches.get(key, ())
        same = len(patches) == len(others) and all(one is other for one, other in zip(patches, others, strict=True))
        if patches and (key in packed or not same):
            return True
    return bool(patched.weight_wrapper_patches or patched.injections)


def _held_out(samplings: int, prompts: int, steps: int) -> list[int]:
    """The points that are not trained on: all of some prompts, or of some samplings where the prompts are too few."""
    if HELD_OUT <= prompts <= samplings:
        out = [i for i in range(samplings) if i % prompts >= prompts - prompts // HELD_OUT]
    else:
        out = range(samplings - max(1, samplings // HELD_OUT), samplings)
    return [i * steps + step for i in out for step in range(steps)]


def _sample(
    original: ModelPatcher,
    prompts: list[list],
    samples: torch.Tensor,
    recovery: Recovery,
    points: Points,
    progress: Progress,
) -> None:
    """Fills the points: Euler's way through the original's samplings."""
    sigmas = [float(sigma) for sigma in recovery.sigmas]
    total = recovery.samplings() * (len(sigmas) - 1)

    def work(loaded: Loaded) -> None:
        for number in range(recovery.samplings()):
            noise = comfy.sample.prepare_noise(samples, recovery.plan.seed + number).to(loaded.latent)
            x = loaded.start(noise, sigmas[0])
            for now, then in itertools.pairwise(sigmas):
                progress(len(points), total)
                x = x.to(points.values.dtype).to(torch.float32)
                velocity = loaded.velocity(number % len(prompts), x, now)
                points.add(number % len(prompts), now, x, velocity)
                x = x + (then - now) * velocity

    with torch.no_grad():
        with_model(original, prompts, samples, recovery.sigmas, work)
    if not any(points.energies):
        raise ValueError("the original model predicts nothing but zeros: look at what it draws")


def _train(
    patched: ModelPatcher,
    layers: Sequence[str],
    prompts: list[list],
    samples: torch.Tensor,
    recovery: Recovery,
    points: Points,
    held: Sequence[int],
    begin: Training,
    progress: Progress,
) -> tuple[dict[str, Residual], Tuned]:
    """({name of a weight: its best residual, on the processor}, how it went)."""
    unseen = set(held)
    trained = [number for number in range(len(points)) if number not in unseen]
    unit = {
        number: sum(points.energies[i] for i in part) / len(part) or 1.0 for part in (held, trained) for number in part
    }
    found: list[Tuned] = []
    with torch.inference_mode(False), torch.enable_grad(), _training():
        working, residuals = _working_copy(patched, layers)
        begun = begin.unfinished()
        if begun:
            take(list(residuals.values()), [begun.values[name] for name in residuals])

        def work(loaded: Loaded) -> None:
            def error(number: int) -> torch.Tensor:
                x, truth = points.get(number, loaded.latent.device)
                velocity = loaded.velocity(points.prompts[number], x, points.sigmas[number])
                return (velocity.float() - truth).square().sum() / unit[number]

            def better(tuned: Tuned, values: Sequence[Sequence[torch.Tensor]]) -> None:
                stored = {n: [matrix.cpu() for matrix in pair] for n, pair in zip(residuals, values, strict=True)}
                begin.keep(Unfinished(stored, begun.before if begun else tuned.before, tuned.best))

            parts, plan = list(residuals.values()), recovery.plan
            with _checkpointed(loaded.model.diffusion_model):
                found.append(tune(parts, error, trained, held, plan, progress, _told, better))

        outside = [_outside(prompt) for prompt in prompts]
        try:
            with_model(working, outside, samples.clone(), recovery.sigmas.clone(), work)
        finally:
            comfy.model_management.unload_all_models()  # while the copy is known, which nobody else holds
    return {name: residual.to("cpu") for name, residual in residuals.items()}, found[0]


@contextlib.contextmanager
def _training() -> Iterator[None]:
    """Inside, ComfyUI's models use no kernels without a backward pass, as in its own node that trains."""
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


def _told(look: Look) -> None:
    trained = "" if look.training is None else f", of the points trained on {look.training:.4f}"
    logger.info("Bonsai: recovering, step %d: error of the held-out points %.4f%s", look.step, look.held_out, trained)


def _working_copy(patched: ModelPatcher, layers: Sequence[str]) -> tuple[ModelPatcher, dict[str, Residual]]:
    """(a copy around the same codes without residuals, which are branches of its layers, {weight: residual})."""
    tensors: dict[str, torch.Tensor | PackedWeight] = {}
    residuals: dict[str, Residual] = {}
    for name, tensor in base_tensors(patched).items():
        if not is_packed(tensor):
            tensors[name] = _shared(tensor.detach())
            continue
        weight, mode = unwrap(tensor), mode_of(tensor)
        if name in layers:
            residuals[name] = Residual(_outside(weight.up), _outside(weight.down)).to(patched.load_device)
            weight = weight.without_residual()
        weight = replace(weight, codes=_shared(weight.codes), **{n: _shared(t) for n, t in weight.tables().items()})
        tensors[name] = wrap(weight, tensor.dtype, mode)
    twin = empty_twin(patched.model)
    working = around(patched, twin, tensors, dynamic=False, shared=True)
    carry_over(patched, working)
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
    for name, residual in residuals.items():
        working.add_weight_wrapper(PREFIX + name, residual)
    return working, residuals


def _outside(value: Any) -> Any:
    """The value with tensors that a backward pass may keep: those of inference mode, in which nodes run, it may not."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) in (list, tuple):
        return type(value)(_outside(item) for item in value)
    if type(value) is dict:
        return {key: _outside(item) for key, item in value.items()}
    return value


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    """As `_outside`, in the same memory where it can be: what is only read, as weights are."""
    can = tensor.is_inference() and tensor.device.type in ("cpu", "cuda")
    return torch.from_dlpack(tensor) if can else _outside(tensor)


@contextlib.contextmanager
def _checkpointed(transformer: torch.nn.Module) -> Iterator[None]:
    """Inside, blocks keep their inputs alone for the backward pass, and are computed again there."""

    def again(block: torch.nn.Module) -> Callable:
        forward = functools.partial(type(block).forward, block)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return torch.utils.checkpoint.checkpoint(
                forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )

        return call

    blocks = list(outer_blocks(transformer))
    for block in blocks:
        block.forward = again(block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _with(tensor: torch.Tensor, residual: Residual | None) -> torch.Tensor:
    """The tensor; a packed one with this residual in place of its own."""
    if residual is None:
        return tensor
    weight = unwrap(tensor)
    up, down = (
        matrix.detach().to(weight.codes.device, old.dtype)
        for matrix, old in ((residual.up, weight.up), (residual.down, weight.down))
    )
    return wrap(replace(weight, up=up, down=down), tensor.dtype, mode_of(tensor))
