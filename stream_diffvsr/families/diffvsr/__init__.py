"""Stream-DiffVSR: causal 4x upscaling in four denoising steps, guided by the previous frame."""
