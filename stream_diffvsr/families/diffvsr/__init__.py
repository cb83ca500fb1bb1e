"""Stream-DiffVSR: 4x, causal, four denoising steps, guided by the previous frame."""
