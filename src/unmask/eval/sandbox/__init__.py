"""Sandbox for Python programs that a model wrote: a process for each, isolated as far as this machine permits."""
