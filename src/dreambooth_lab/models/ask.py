"""What a diffusers pipeline does in its own call, asked of that call.

A pipeline's call knows its ids, masks, guidance, packing, clocks and signs, and what it hands to `scheduler.step` is always in
its scheduler's convention. So each question runs the call, below its `no_grad`, and leaves it by an exception at the place where
the answer is: `encode_prompt` for the text, `prepare_latents` for the layout of latents, `set_timesteps` for the time shift, and
the `step` of a stand-in scheduler for the denoiser's answer, each row at its own time.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError

PREPARE = ("prepare_latents", "prepare_intermediate_images")  # what makes a pipeline's first sample
TENSORS = ("_embeds", "_mask", "_t5", "_llama3")  # end the names of arguments that are texts


class Reached(Exception):
    """The place of an answer, with it."""

    def __init__(self, value: Any):
        super().__init__()
        self.value = value


class StandIn:
    """A scheduler of one step, at a time of each row's own.

    Args:
        config: of the scheduler it stands for.
        native: times on the network's own clock [B]; None: leave as soon as the time shift is known.
    """

    order, init_noise_sigma = 1, 1.0

    def __init__(self, config: Any, native: Tensor | None):
        self.config, self.native = config, native
        self.timesteps = torch.zeros(1) if native is None else native if len(native) == 1 else native[None]

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, timesteps: Any = None, sigmas: Any = None,
        mu: float | None = None,
    ) -> None:  # fmt: skip
        if self.native is None:
            raise Reached(mu)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """There is one step."""

    def add_noise(self, original: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """Pipelines that begin from a picture are asked about the sample itself."""
        return noise

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> None:
        raise Reached(model_output)


class Asked:
    """A diffusers pipeline and the questions to its call.

    Args:
        pipeline: whose parts may be absent where a question doesn't need them.
    """

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self.parameters = inspect.signature(type(pipeline).__call__).parameters
        self.says = text_names(type(pipeline))
        self.prepare = next(name for name in PREPARE if hasattr(pipeline, name))
        self.layouts: dict[tuple[int, ...], Tensor | None] = {}

    def text(self, **call: Any) -> dict[str, Any]:
        """What `encode_prompt` returns, under the names that the call gives it."""

        def leave(original: Callable[..., Any], *args: Any, **options: Any) -> None:
            raise Reached(original(*args, **options))

        with self._replaced("encode_prompt", leave), self._scheduled(torch.zeros(1)):
            said = self.run(call)
        return dict(zip(self.says, said if isinstance(said, tuple) else (said,), strict=True))

    def shift(self, **call: Any) -> float | None:
        """The μ that the call tells its scheduler for a size of picture; None if it tells none."""
        first = self._started_from(lambda shape, _: torch.zeros(shape))  # noise would move the generator of the step that asks
        with first, self._without_text(), self._scheduled(None):
            return self.run(call | {"prompt": [""]})

    def answer(self, x_t: Tensor, native: Tensor, **call: Any) -> Tensor:
        """The denoiser's answer at x_t [B C h w], differentiable.

        Args:
            native: times on the network's own clock [B].
        """
        unpack = self.unpacking(x_t.shape[1:], **call)
        with self._started_from(lambda shape, dtype: x_t.reshape(shape).to(dtype)), self._scheduled(native):
            answer = self.run(call)
        return unpack(answer[:, : x_t.shape[1]] if answer.ndim == x_t.ndim else answer)  # the rest is a learned variance

    def unpacking(self, shape: torch.Size, **call: Any) -> Callable[[Tensor], Tensor]:
        """What brings samples from the pipeline's layout to [B C h w], for one [C h w]."""
        if tuple(shape) not in self.layouts:
            self.layouts[tuple(shape)] = self._layout(shape, **{k: v for k, v in call.items() if not k.endswith(TENSORS)})
        order = self.layouts[tuple(shape)]

        def unpack(packed: Tensor) -> Tensor:
            rows = packed.flatten(1)
            return (rows if order is None else rows[:, order.to(rows.device)]).unflatten(1, shape)

        return unpack

    def _layout(self, shape: torch.Size, **call: Any) -> Tensor | None:
        """Where in the pipeline's layout each element of [C h w] is; None if all stay in place."""
        numbers = torch.arange(shape.numel(), dtype=torch.float64)

        def leave(original: Callable[..., Any], *args: Any, **options: Any) -> None:
            made = original(*args, **options)
            raise Reached(made[0] if isinstance(made, tuple) else made)

        first = self._started_from(lambda shape, _: numbers.reshape(shape))
        with first, self._replaced(self.prepare, leave), self._without_text(), self._scheduled(torch.zeros(1)):
            placed = self.run(call | {"prompt": [""]})[0].flatten().long()
        return None if torch.equal(placed, torch.arange(len(placed))) else placed.argsort()

    def run(self, call: Mapping[str, Any]) -> Any:
        """What an exception brings out of the pipeline's call, with those of the arguments that it knows.

        Raises:
            ConfigError: the call fails, or comes to its end.
        """
        known = {name: value for name, value in call.items() if name in self.parameters}
        try:
            inspect.unwrap(type(self.pipeline).__call__)(self.pipeline, **known)
        except Reached as reached:
            return reached.value
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            name = type(self.pipeline).__name__
            raise ConfigError(
                f"{name} can't be trained through its own call ({type(error).__name__}: {error}); choose another model"
            ) from error
        raise ConfigError(
            f"{type(self.pipeline).__name__} runs without scheduler.step, so it can't be trained; choose another model"
        )

    @contextmanager
    def _scheduled(self, native: Tensor | None) -> Iterator[None]:
        """Inside, a stand-in is the pipeline's scheduler."""
        own = vars(self.pipeline)
        before = own["scheduler"]
        own["scheduler"] = StandIn(before.config, native)
        try:
            yield
        finally:
            own["scheduler"] = before

    @contextmanager
    def _replaced(self, method: str, by: Callable[..., Any]) -> Iterator[None]:
        """Inside, a method of this pipeline is another, which is given the original first."""
        original = getattr(self.pipeline, method)
        vars(self.pipeline)[method] = lambda *args, **options: by(original, *args, **options)
        try:
            yield
        finally:
            del vars(self.pipeline)[method]

    @contextmanager
    def _without_text(self) -> Iterator[None]:
        """Inside, every prompt is encoded as zeros."""
        zeros = tuple(_zeros(name) for name in self.says)
        with self._replaced("encode_prompt", lambda original, *args, **options: zeros if len(zeros) > 1 else zeros[0]):
            yield

    @contextmanager
    def _started_from(self, make: Callable[[tuple[int, ...], torch.dtype], Tensor]) -> Iterator[None]:
        """Inside, the pipeline's first sample is what `make` gives for its shape and dtype, instead of noise."""
        names = inspect.unwrap(getattr(type(self.pipeline), self.prepare)).__globals__
        before = names["randn_tensor"]

        def given(
            shape: tuple[int, ...], generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
        ) -> Tensor:
            return make(tuple(shape), dtype)

        names["randn_tensor"] = given
        try:
            yield
        finally:
            names["randn_tensor"] = before


def text_names(kind: type) -> tuple[str, ...]:
    """The names that a pipeline's call gives to what its `encode_prompt` returns.

    Raises:
        ConfigError: it calls none.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.__call__))))
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func) == "self.encode_prompt"
        ):
            target = node.targets[0]
            return tuple(ast.unparse(each) for each in (target.elts if isinstance(target, ast.Tuple) else [target]))
    raise ConfigError(f"{kind.__name__} encodes no prompts, so it is no text-to-image pipeline; choose another model")


def _zeros(name: str) -> Tensor:
    if name.endswith("mask"):
        return torch.ones(1, 8, dtype=torch.long)
    return torch.zeros(1, 8) if name.startswith("pooled") else torch.zeros(1, 8, 8)
