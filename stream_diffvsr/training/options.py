"""The fine-tuning options, in one table from which the command derives its flags."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import check_options, option


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Everything the result depends on, apart from the base model and the clips."""

    what: str = option(
        "lora",
        "lora: train a LoRA, a small file for --lora. full: train all weights, and save them as a folder for "
        "--model.",
        choices=("lora", "full"),
    )
    steps: int = option(1000, "Number of training steps.", low=1)
    minutes: float | None = option(
        None,
        "Run as many steps as fit into this many minutes, but at most --steps. The number of steps is "
        "estimated before training starts.",
        kind=float,
        low=0.0,
    )
    degradation: str = option(
        "clean",
        "How to degrade good frames so that they look like the videos you want to upscale: clean, "
        "compressed, old-film, anime, or a YAML file.",
    )
    decoder: bool = option(
        False,
        "Also train the decoder, which produces the finest detail; this helps nano most.",
        flag="decoder",
    )
    rank: int = option(
        16, "Rank of the LoRA: a higher rank can learn more, but makes the file larger.", low=1, high=512
    )
    rate: float | None = option(
        None,
        "Learning rate after warm-up; it falls to 0 by the end.",
        kind=float,
        low=0.0,
        high=1.0,
        unset_help="0.001 for lora, 0.0001 for full",
    )
    size: int = option(
        128, "Width and height of the training crops, in pixels of the original frames.", low=32, high=2048
    )
    frames: int = option(
        4, "Frames per training sequence; each is guided by the model's own previous result.", low=1, high=64
    )
    batch: int = option(1, "Sequences per step on each device.", low=1, high=256)
    loss: str = option("l1", "l1 keeps more detail; l2 reaches a higher PSNR.", choices=("l1", "l2"))
    steadiness: float = option(
        0.5, "Weight of the loss on changes over time that are not in the original.", low=0.0, high=100.0
    )
    perceptual: str | None = option(
        None,
        "File with VGG-16's weights (torchvision's vgg16-397923af.pth). If given, the loss also compares "
        "that network's features, which gives more texture but a lower PSNR.",
        kind=str,
        unset_help="none",
    )
    perceptual_weight: float = option(
        0.05,
        "Weight of the loss on VGG-16's features; the loss on pixels has weight 1.",
        low=0.0,
        high=100.0,
    )
    every: int = option(100, "Measure quality on the held-out scenes and save pictures every N steps.", low=1)
    seed: int = option(0, "Random seed. The same seed produces the same weights.", low=0)
    precision: str = option(
        "float32",
        "bfloat16 halves the memory for activations on GPUs that support it.",
        choices=("float32", "bfloat16"),
    )
    checkpointing: bool = option(
        False, "Recompute activations instead of keeping them, which is slower but needs far less memory."
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def learning_rate(self) -> float:
        """The learning rate: the option `rate` if given, otherwise the default for `what`."""
        return (1e-3 if self.what == "lora" else 1e-4) if self.rate is None else self.rate
