"""How anything is trained: what a task is (task), the step (step), checkpoints, metrics and curves."""
