"""Finding, checking, downloading and opening checkpoints."""
