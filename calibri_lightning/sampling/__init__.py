"""From noise to pictures: schedules, step kernels, the sampler and the evaluation of candidates."""
