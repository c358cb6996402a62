"""OmegaConf resolvers that conf/ uses in `${…}`: folders, dataset files, multiples. Imports no torch.

A folder's name is resolved once, also for the other processes of a sweep: Hydra copies the cache of resolved values to the
configuration of each job.
"""

from __future__ import annotations

from omegaconf import OmegaConf

from .data.simpletuner import first_prompt
from .runfolder import new_folder
from .sweep import job_folder, sweep_folder


def register() -> None:
    """Register them with OmegaConf; can be called repeatedly."""
    for name, resolver in (("dataset_file_prompt", first_prompt), ("run_folder", new_folder), ("job_folder", job_folder)):
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    OmegaConf.register_new_resolver("scaled", lambda factor, value: float(f"{factor * value:.3g}"), replace=True)
    OmegaConf.register_new_resolver("sweep_folder", sweep_folder, replace=True, use_cache=True)
