"""SimpleTuner's configuration as an experiment: `python -m dreambooth_lab.tools.import_simpletuner config.json`."""
