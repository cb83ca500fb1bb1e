"""Fine-tuning on one's own footage: clips, how they are degraded, the loop, and what it reports."""
