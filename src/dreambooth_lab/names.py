"""Names of logged metrics that several modules share. Imports no torch."""


def of_score(metric: str) -> str:
    """The name under which the mean of a metric's scores (per image in scores.csv) is logged."""
    if metric == "clip_t":
        return "clip/mean"
    return f"{'class' if metric.startswith(('pres_', 'diversity_')) else 'subject'}/{metric}"
