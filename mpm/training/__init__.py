"""Training: the loop, the optimizer, schedules, what a run reports. Images and numbers only."""
