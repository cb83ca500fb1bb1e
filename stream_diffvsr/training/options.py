"""How a model is fine-tuned: one table, of which the command makes its flags."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import check_options, option


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Everything that the result depends on beside base and clips."""

    what: str = option(
        "lora",
        "lora: a small file of low-rank changes that --lora loads. full: all weights, a folder for --model.",
        choices=("lora", "full"),
    )
    steps: int = option(1000, "Updates of the weights.", low=1)
    minutes: float | None = option(
        None,
        "Do as many steps as fit into this time, measured before the first; --steps is then the most.",
        kind=float,
        low=0.0,
    )
    degradation: str = option(
        "clean",
        "How good frames become such as you have: clean, compressed, old-film, anime, or a YAML file.",
    )
    decoder: bool = option(
        False, "Let the decoder learn, too: it makes the finest detail, and nano lives by it.", flag="decoder"
    )
    rank: int = option(16, "Of the low-rank changes: more can learn more, in a larger file.", low=1, high=512)
    rate: float | None = option(
        None,
        "Learning rate after the first steps; it falls to nothing at the end.",
        kind=float,
        low=0.0,
        high=1.0,
        unset_help="0.001 for lora, 0.0001 for full",
    )
    size: int = option(128, "Side of the crops of the true frames, in pixels.", low=32, high=2048)
    frames: int = option(4, "Frames of a sequence, each on the model's own one before.", low=1, high=64)
    batch: int = option(1, "Sequences per step, on each device.", low=1, high=256)
    loss: str = option("l1", "l1 keeps more detail, l2 gives more PSNR.", choices=("l1", "l2"))
    steadiness: float = option(
        0.5, "Weight of the loss against changes in time that the truth does not have.", low=0.0, high=100.0
    )
    every: int = option(100, "Measure on the part held out, and keep pictures, every so many steps.", low=1)
    seed: int = option(0, "Of everything that is drawn: the same seed gives the same weights.", low=0)
    precision: str = option(
        "float32",
        "bfloat16 takes half the memory of activations on GPUs that have it.",
        choices=("float32", "bfloat16"),
    )
    checkpointing: bool = option(
        False, "Compute activations twice instead of keeping them: slower, with far less memory."
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def learning_rate(self) -> float:
        """That of the option, or the usual one."""
        return (1e-3 if self.what == "lora" else 1e-4) if self.rate is None else self.rate
