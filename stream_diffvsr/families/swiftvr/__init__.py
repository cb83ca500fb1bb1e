"""SwiftVR: one-step restoration of latents with self-attention in shifted windows and without noise."""
