"""Pure tensor mathematics of block diffusion: schedules, corruption, masks, objectives, the decoding step."""
