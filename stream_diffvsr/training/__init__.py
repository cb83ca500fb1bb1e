"""Fine-tuning on your own footage: clips, their degradation, the training loop and its reports."""
