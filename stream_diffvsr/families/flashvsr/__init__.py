"""FlashVSR (v1, v1.1): one-step streaming diffusion with block-sparse causal attention."""
