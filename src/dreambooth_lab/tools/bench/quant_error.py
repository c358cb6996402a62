"""How far each quantised base is off, and what it weighs: `python -m dreambooth_lab.tools.bench.quant_error [key=value …]`.

Prints a Markdown table: relative error ‖quantised - full‖ / ‖full‖ of the denoiser's predictions at fixed noise over eight times,
bytes for each quantised weight and for each parameter of the whole denoiser. The words configure the model, as for a run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import lab
from ...batch import Cond, ImageInfo, Size
from ...config import enums
from ...factory import build_family
from ...models.family import Family
from ...quant import Quantiser
from ..common.training_config import command

PROMPTS = ["a photo of a robot on the beach", "a photo of a dog"]
TIMES = 8


@torch.no_grad()
def predictions(family: Family, cond: Cond, edge: int) -> Tensor:
    """At fixed noise and times [TIMES·B C h w]."""
    g = torch.Generator().manual_seed(0)
    outputs = []
    for i in range(TIMES):
        x = torch.randn(len(PROMPTS), family.channels, edge, edge, generator=g).to(family.device)
        t = torch.full((len(PROMPTS),), (i + 0.5) / TIMES, device=family.device)
        outputs.append(family.denoise(x, t, cond.to(family.device)))
    return torch.cat(outputs)


def main(words: list[str]) -> None:
    cfg = lab.compose("dataset.path=.", "quant=none", *words)
    family = build_family(cfg)
    edge = cfg.model.resolution // family.factor
    text = family.encode_text(PROMPTS)
    size = Size((cfg.model.resolution,) * 2, (0, 0), (cfg.model.resolution,) * 2)
    cond = family.cond(text, [ImageInfo(size, torch.zeros(family.channels, edge, edge), 0, 0, 7.0)] * len(PROMPTS))
    family.release_encoders()
    exact = predictions(family, cond, edge)
    print("| quant | relative error | bytes a quantised weight | bytes a parameter, whole denoiser |\n|---|---|---|---|")
    for kind in enums.QuantKind:
        if kind is enums.QuantKind.none:
            continue
        other = build_family(cfg)
        other.quantiser = Quantiser({other.denoiser_part: kind}, None)
        error = (predictions(other, cond, edge) - exact).norm() / exact.norm()
        done = other.quantiser.done[other.denoiser_part]
        print(f"| `{kind.value}` | {error:.4f} | {done.weights_size / done.weights:.2f} | {done.size / done.parameters:.2f} |")


if __name__ == "__main__":
    command(main, __doc__)
