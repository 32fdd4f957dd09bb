"""Which formats are there, and in which ways is one not proven? Known before torch is loaded."""

from __future__ import annotations

FORMATS = (
    "huggingface",
    "internimage",
    "openmmlab",
    "timm",
    "safetensors",
    "torchvision",
    "onnx",
    "detectron2",
)
GRAPHS = ("onnx",)  # of these, what holds a computation whose weights cannot be trained
ALL = "all"  # in place of names: each that holds the run's backbone


class NotProven(Exception):
    """The exported file does not load as it must, or gives other features than the towers it was made from."""


class NoToolkits(Exception):
    """The interpreter that was to prove an export lacks the toolkits that the export is for."""
