"""The command `ablate`: what each block, layer or gate is worth to reward and picture."""
