"""Model families, and the only importers of diffusers and transformers."""

from .. import quant as quant  # first: it silences torchao's warnings when diffusers or transformers import it
