"""Upscale a video, an image or a folder of images by 4."""

from __future__ import annotations

import argparse

from .model import add_model_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", help="video file, image, or folder of images")
    parser.add_argument("-o", "--output")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    raise NotImplementedError
