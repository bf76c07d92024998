"""The planner: memory, traffic and time of a training run on any number of GPUs, without one."""
