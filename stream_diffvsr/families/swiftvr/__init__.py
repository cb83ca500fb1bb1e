"""SwiftVR: one-step restoration of latents, without noise and with self-attention in shifted windows."""
