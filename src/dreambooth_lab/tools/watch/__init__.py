"""The live page: previews, pictures and curves of runs as they come."""
