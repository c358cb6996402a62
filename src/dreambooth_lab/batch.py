"""The records passed from the data to the loss: immutable and typed, with their shapes.

Letters: B rows, C latent channels, h w latent grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

ON_HOST = ("sample", "u", "rollout_draws")  # fields of a batch
WITHOUT_FLOAT64 = ("mps",)  # types of devices
Caption = str | None  # None: the unconditional input of the sampler


class Record(dict[str, Tensor]):
    """Named tensors whose first dimension is the rows. Only the model family knows the names; other code handles whole rows."""

    @property
    def rows(self) -> int:
        return len(next(iter(self.values())))

    def select(self, rows: Tensor) -> Self:
        """The record with some of the rows."""
        return type(self)({name: tensor[rows] for name, tensor in self.items()})

    def replace_rows(self, rows: Tensor, other: Record) -> Self:
        """A copy whose tensors have `other`'s values at these rows; names that `other` lacks are unchanged."""
        made = type(self)(self)
        for name, tensor in other.items():
            own, tensor = _same_shape([self[name], tensor.to(self[name])])
            made[name] = own.index_copy(0, rows, tensor)
        return made

    def to(self, device: torch.device) -> Self:
        return type(self)({name: to_device(tensor, device) for name, tensor in self.items()})

    def repeat(self, n: int) -> Self:
        """Expand a single row to n rows."""
        return type(self)({name: tensor.expand(n, *tensor.shape[1:]) for name, tensor in self.items()})

    @classmethod
    def stack(cls, records: Sequence[Self]) -> Self:
        """Concatenate the rows of all records. Tensors of different length are padded with zeros at the end; a family whose
        captions differ in length has a mask or a length among its tensors, so padding is never read."""
        return cls({name: torch.cat(_same_shape([record[name] for record in records])) for name in records[0]})


class Text(Record):
    """The text encoders' output for captions."""


class Cond(Record):
    """The denoiser's conditioning: all its inputs except x_t and t."""


class Size(NamedTuple):
    """SDXL's size conditioning (SDXL §2.2), in pixels: the image's original size, the crop's top left corner, the training
    size."""

    original: tuple[int, int]  # height, width
    crop: tuple[int, int]  # top, left
    target: tuple[int, int]  # height, width


class ImageInfo(NamedTuple):
    """What the conditioning may depend on, apart from the caption."""

    size: Size
    latents: Tensor  # [C h w], the mean of its posterior
    seed: int
    sample: int  # sample index: with the seed, the key of further random draws of this row
    aesthetic_score: float  # for models with this conditioning (SDXL's refiner)


class RowCounts(NamedTuple):
    """The expected number of instance and class rows of a batch: the mean over all batches, not the counts of this one."""

    instances: float
    classes: float

    @classmethod
    def expected(cls, rows: int, class_share: float) -> Self:
        """For batches of `rows` rows with this share of class rows."""
        return cls(rows * (1 - class_share), rows * class_share)


class Batch(NamedTuple):
    """Rows of one shape, with all random numbers already drawn. The tensors that determine the amount of work stay on the
    host, because reading them from the device would wait for the device."""

    sample: Tensor  # [B] global sample index n, on the host
    mean: Tensor  # [B C h w] VAE posterior, in the denoiser's latent scale
    std: Tensor  # [B C h w]
    z: Tensor  # [B C h w] N(0,1): noise of the posterior
    eps: Tensor  # [B C h w] N(0,1): ε
    u: Tensor  # [B] U[0,1): becomes t; on the host
    rollout_draws: Tensor  # [B 2] U[0,1): whether a row is rolled out, and over how many steps; on the host
    xi: Tensor | None  # [B C h w] N(0,1): noise of the input perturbation, if it is on
    cond: Cond
    captions: tuple[str, ...]  # B of them, as drawn
    instance_rows: Tensor  # [≤B] positions of the instance rows
    class_rows: Tensor  # [≤B] positions of the class rows
    row_counts: RowCounts
    mask: Tensor | None  # [B 1 h w] in [0,1]; None: no row has a mask
    teacher_output: Tensor | None  # [class rows, C h w], the base model's cached predictions, with prior=bank

    def latents(self) -> Tensor:
        """x_0 drawn from the cached posterior [B C h w]."""
        return self.mean + self.std * self.z

    def to(self, device: torch.device) -> Batch:
        """Move the tensors to a device, except those of `ON_HOST`; Lightning calls it."""
        there: dict[str, Any] = {"cond": self.cond.to(device)}
        there |= {n: to_device(v, device) for n, v in self._asdict().items() if isinstance(v, Tensor) and n not in ON_HOST}
        return self._replace(**there)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device, from the host without waiting (CUDA stages pageable memory at once; MPS does not, so
    there it waits). float64 becomes float32 on a device that lacks it."""
    if tensor.dtype is torch.float64:
        tensor = tensor.to(widest(device))
    return tensor.to(device, non_blocking=tensor.device.type == "cpu" and device.type != "mps")


class WithoutWaiting(TorchFunctionMode):
    """Inside, `Tensor.to` copies from the host to a GPU without waiting, also in libraries that don't ask for it."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is Tensor.to and args[0].device.type == "cpu" and _device_of(args, kwargs or {}).type not in ("cpu", "mps"):
            return func(*args, **{**(kwargs or {}), "non_blocking": True})
        return func(*args, **(kwargs or {}))


def _device_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    """Where `Tensor.to` is asked to bring a tensor."""
    asked = kwargs.get("device", args[1] if len(args) > 1 else None)
    if isinstance(asked, Tensor):
        return asked.device
    return torch.device(asked) if isinstance(asked, str | int | torch.device) else args[0].device


def widest(device: torch.device) -> torch.dtype:
    """The most precise dtype of a device: float64, or float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def _same_shape(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [B_i …] padded with zeros at the end of each dimension but the first, until all agree."""
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return list(tensors)
    whole = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    made = []
    for tensor in tensors:
        padding = [(0, most - size) for most, size in zip(whole, tensor.shape[1:], strict=True)]
        made.append(F.pad(tensor, [side for pair in reversed(padding) for side in pair]))
    return made
