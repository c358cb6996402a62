"""Whether a run fits its device, found before any weights are loaded, and what to say so that it does."""
