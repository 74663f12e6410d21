"""Training of any kind: what a task is (task), the step (step), checkpoints, metrics, curves and signals."""
