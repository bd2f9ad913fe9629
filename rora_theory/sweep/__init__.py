"""Fine-tuning and scoring over methods, ranks, learning rates and seeds: designs, their cells, and what a cell does."""
