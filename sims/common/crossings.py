"""The file in which `sims.regime` writes crossing ranks and `sims.transfer` reads linear terms."""

CROSSINGS = "crossing_ranks.csv"
CROSSING_COLUMNS = (
    "layer", "module", "p_in", "p_out", "split", "tokens", "optimizer", "init", "signal", "cross_talk", "crossing_rank",
    "lower_quartile", "median", "upper_quartile", "linear_term",
)  # fmt: skip
