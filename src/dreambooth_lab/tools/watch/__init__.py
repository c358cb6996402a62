"""The live page: previews, images and curves of running runs."""
