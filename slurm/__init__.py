"""Command lines of this project as Slurm jobs."""
