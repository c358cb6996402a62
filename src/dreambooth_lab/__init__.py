"""DreamBooth as an experiment framework. Notebooks start at :mod:`dreambooth_lab.lab`."""

__version__ = "0.1.0"
