"""Best learning rates against rank, G = gamma r and the number of steps, from fine-tuning runs."""
