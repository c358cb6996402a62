"""Trains the embedded base model from nothing: VAE, latents, UNet with its text encoders, evaluator, scorer."""
