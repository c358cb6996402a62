"""Names of logged numbers that several modules must agree on. Imports no torch."""


def of_score(metric: str) -> str:
    """Under which the mean of a metric's scores, picture by picture in scores.csv, is logged."""
    if metric == "clip_t":
        return "clip/mean"
    return f"{'class' if metric.startswith(('pres_', 'diversity_')) else 'subject'}/{metric}"
