"""Sampling that keeps more of the base model, without training.

    superclass   predictions under the class prompt ("a robot on the beach") in place of the subject's ("sks robot on the beach")
                 for the first steps (switch), or mixed with them at every step (mix) (Soboleva et al. 2025, arXiv 2502.05895):
                     ε = ρ ε(x, class prompt) + (1 - ρ) ε(x, prompt),    ρ = 1 in the first steps, then 0; or constant
    personal     the unconditional prediction of classifier-free guidance by weights between the base model's (ω = 0) and the
                 trained ones (ω = 1) (arXiv 2508.00319):
                     ε = ε_ω(x, ∅) + w (ε_1(x, prompt) - ε_ω(x, ∅))

Both act on the denoiser while a diffusers pipeline calls it, so that any sampler takes part.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ..config import enums

KEPT = ("sample", "hidden_states", "timestep")  # a denoiser's arguments that are not about the prompt
Arguments = dict[str, Any]
Weakened = Callable[[float], AbstractContextManager[None]]  # strength → a context in which the adapter has it


class Steering(NamedTuple):
    """What of it is asked for."""

    superclass: enums.Superclass
    share: float  # switch: of the steps; mix: ρ
    personal: float | None  # ω

    @classmethod
    def of(cls, validation: DictConfig) -> Steering:
        return cls(validation.superclass, validation.superclass_share, validation.personal_guidance)


class _Reached(Exception):
    def __init__(self, arguments: Arguments):
        self.arguments = arguments


@contextmanager
def steered(
    denoiser: nn.Module, steering: Steering, steps: int, class_call: Callable[[], object] | None, weakened: Weakened
) -> Iterator[None]:
    """A context in which a pipeline's calls of the denoiser are steered.

    Args:
        steps: of the sampler.
        class_call: starts sampling the same images with the class prompt; None: the prompt is not about the subject.
    """
    by_class = steering.superclass is not enums.Superclass.none and class_call is not None
    if not by_class and steering.personal is None:
        yield
        return
    class_arguments = _first_arguments(denoiser, class_call) if by_class and class_call else None
    calls = _Calls(denoiser, steering, steps, class_arguments, weakened)
    hooks = [
        denoiser.register_forward_pre_hook(calls.before, with_kwargs=True),
        denoiser.register_forward_hook(calls.after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _first_arguments(denoiser: nn.Module, call: Callable[[], object]) -> Arguments:
    """What a pipeline calls its denoiser with at the first step, less sample and time."""
    signature = inspect.signature(type(denoiser).forward)

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        raise _Reached(_bound(signature, module, args, kwargs))

    hook = denoiser.register_forward_pre_hook(leave, with_kwargs=True)
    try:
        call()
    except _Reached as reached:
        return {name: value for name, value in reached.arguments.items() if name not in KEPT}
    finally:
        hook.remove()
    raise AssertionError("a pipeline that draws nothing")


def _bound(signature: inspect.Signature, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    arguments = dict(signature.bind(module, *args, **kwargs).arguments)
    arguments.pop("self")
    return arguments


class _Calls:
    """The denoiser's calls of one drawing."""

    def __init__(
        self, denoiser: nn.Module, steering: Steering, steps: int, class_arguments: Arguments | None, weakened: Weakened
    ):  # fmt: skip
        self.signature = inspect.signature(type(denoiser).forward)
        self.steering, self.class_arguments, self.weakened = steering, class_arguments, weakened
        self.first_steps = round(steering.share * steps) if steering.superclass is enums.Superclass.switch else 0
        self.done = 0
        self.inside = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> tuple[tuple[()], Arguments] | None:
        if self.inside:
            return None
        self.done += 1
        arguments = _bound(self.signature, module, args, kwargs)
        return (), arguments | (self.class_arguments or {}) if self.done <= self.first_steps else arguments

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments, output: tuple[Tensor, ...]) -> Any:
        if self.inside:
            return None
        self.inside = True
        try:
            prediction = self._mixed(module, kwargs, output[0])
            if self.steering.personal is not None:
                with self.weakened(self.steering.personal):
                    weak: Tensor = self._mixed(module, kwargs, module(**kwargs)[0])
                half = len(prediction) // 2  # the unconditional rows come first
                prediction = torch.cat([weak[:half], prediction[half:]])
        finally:
            self.inside = False
        return prediction, *output[1:]

    def _mixed(self, module: nn.Module, kwargs: Arguments, prediction: Tensor) -> Tensor:
        if self.class_arguments is None or self.steering.superclass is not enums.Superclass.mix:
            return prediction
        return torch.lerp(prediction, module(**kwargs | self.class_arguments)[0], self.steering.share)
