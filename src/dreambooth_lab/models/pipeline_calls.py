"""Intermediate results of a diffusers pipeline's `__call__`.

A pipeline's call contains its ids, masks, guidance, packing, timesteps and signs, and its argument of `scheduler.step` is always
in the scheduler's convention. So each method here runs the call, without its `no_grad`, and leaves it by an exception where the
result is computed: `encode_prompt` for the text embeddings, `prepare_latents` for the layout of latents, `set_timesteps` for the
time shift, and `step` of a replacement scheduler for the denoiser's prediction, with one timestep per row.
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

PREPARE = ("prepare_latents", "prepare_intermediate_images")  # methods that create a pipeline's initial sample
TENSORS = ("_embeds", "_mask", "_t5", "_llama3")  # suffixes of the names of text arguments


class CallResult(Exception):
    """Leaves the pipeline's call with a result."""

    def __init__(self, value: Any):
        super().__init__()
        self.value = value


class RecordingScheduler:
    """A replacement scheduler with one step, at one time per row.

    Args:
        config: the config of the scheduler it replaces.
        native: the network's own timesteps [B]; None: leave the call as soon as the time shift is known.
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
            raise CallResult(mu)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Nothing to do: there is one step."""

    def add_noise(self, original: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """Image-to-image pipelines add noise to their image; here the noise is the sample itself."""
        return noise

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> None:
        raise CallResult(model_output)


class PipelineCalls:
    """A diffusers pipeline whose call is run for its intermediate results.

    Args:
        pipeline: parts that a method does not need may be absent.
    """

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self.parameters = inspect.signature(type(pipeline).__call__).parameters
        self.text_names = text_names(type(pipeline))
        self.prepare = next(name for name in PREPARE if hasattr(pipeline, name))
        self.layouts: dict[tuple[int, ...], Tensor | None] = {}

    def text(self, **call: Any) -> dict[str, Any]:
        """The results of `encode_prompt`, under their names in the call."""

        def leave(original: Callable[..., Any], *args: Any, **options: Any) -> None:
            raise CallResult(original(*args, **options))

        with self._replaced("encode_prompt", leave), self._scheduled(torch.zeros(1)):
            results = self.run(call)
        return dict(zip(self.text_names, results if isinstance(results, tuple) else (results,), strict=True))

    def shift(self, **call: Any) -> float | None:
        """The μ that the call passes to `set_timesteps` for an image size; None if it passes none."""
        first = self._started_from(
            lambda shape, _: torch.zeros(shape)
        )  # random noise would change the state of the step's generator
        with first, self._without_text(), self._scheduled(None):
            return self.run(call | {"prompt": [""]})

    def denoise(self, x_t: Tensor, native: Tensor, **call: Any) -> Tensor:
        """The denoiser's prediction for x_t [B C h w], differentiable.

        Args:
            native: the network's own timesteps [B].
        """
        unpack = self.unpacking(x_t.shape[1:], **call)
        with self._started_from(lambda shape, dtype: x_t.reshape(shape).to(dtype)), self._scheduled(native):
            prediction = self.run(call)
        return unpack(
            prediction[:, : x_t.shape[1]] if prediction.ndim == x_t.ndim else prediction
        )  # the remaining channels are a learned variance

    def unpacking(self, shape: torch.Size, **call: Any) -> Callable[[Tensor], Tensor]:
        """A function from the pipeline's layout of latents to [B C h w], for one shape [C h w]."""
        if tuple(shape) not in self.layouts:
            self.layouts[tuple(shape)] = self._layout(shape, **{k: v for k, v in call.items() if not k.endswith(TENSORS)})
        order = self.layouts[tuple(shape)]

        def unpack(packed: Tensor) -> Tensor:
            rows = packed.flatten(1)
            return (rows if order is None else rows[:, order.to(rows.device)]).unflatten(1, shape)

        return unpack

    def _layout(self, shape: torch.Size, **call: Any) -> Tensor | None:
        """The position in the pipeline's layout of each element of [C h w]; None if the layouts are equal."""
        numbers = torch.arange(shape.numel(), dtype=torch.float64)

        def leave(original: Callable[..., Any], *args: Any, **options: Any) -> None:
            made = original(*args, **options)
            raise CallResult(made[0] if isinstance(made, tuple) else made)

        first = self._started_from(lambda shape, _: numbers.reshape(shape))
        with first, self._replaced(self.prepare, leave), self._without_text(), self._scheduled(torch.zeros(1)):
            placed = self.run(call | {"prompt": [""]})[0].flatten().long()
        return None if torch.equal(placed, torch.arange(len(placed))) else placed.argsort()

    def run(self, call: Mapping[str, Any]) -> Any:
        """Run the pipeline's call with the arguments it has, until a `CallResult` is raised; returns its value.

        Raises:
            ConfigError: the call fails, or ends without a result.
        """
        known = {name: value for name, value in call.items() if name in self.parameters}
        try:
            inspect.unwrap(type(self.pipeline).__call__)(self.pipeline, **known)
        except CallResult as reached:
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
        """A context in which the pipeline has the replacement scheduler."""
        own = vars(self.pipeline)
        before = own["scheduler"]
        own["scheduler"] = RecordingScheduler(before.config, native)
        try:
            yield
        finally:
            own["scheduler"] = before

    @contextmanager
    def _replaced(self, method: str, by: Callable[..., Any]) -> Iterator[None]:
        """A context in which a method of this pipeline is replaced; the replacement gets the original as first argument."""
        original = getattr(self.pipeline, method)
        vars(self.pipeline)[method] = lambda *args, **options: by(original, *args, **options)
        try:
            yield
        finally:
            del vars(self.pipeline)[method]

    @contextmanager
    def _without_text(self) -> Iterator[None]:
        """A context in which every prompt is encoded as zeros."""
        zeros = tuple(_zeros(name) for name in self.text_names)
        with self._replaced("encode_prompt", lambda original, *args, **options: zeros if len(zeros) > 1 else zeros[0]):
            yield

    @contextmanager
    def _started_from(self, make: Callable[[tuple[int, ...], torch.dtype], Tensor]) -> Iterator[None]:
        """A context in which `make(shape, dtype)` replaces the initial noise."""
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
    """The names of the results of `encode_prompt` in a pipeline's call.

    Raises:
        ConfigError: it does not call `encode_prompt`.
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
    raise ConfigError(f"{kind.__name__} encodes no prompts, so it is not a text-to-image pipeline; choose another model")


def _zeros(name: str) -> Tensor:
    if name.endswith("mask"):
        return torch.ones(1, 8, dtype=torch.long)
    return torch.zeros(1, 8) if name.startswith("pooled") else torch.zeros(1, 8, 8)
