"""What a person sees of a run: log, progress bar, pictures, table, wandb."""
