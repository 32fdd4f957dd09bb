"""How does the training device finish the views that the workers left to it?"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from pretrain.config import Views
from pretrain.data.batch import Batch
from pretrain.data.colour import change_batch, largest_sigma
from pretrain.data.decode import decode_image

AT_ONCE = 128  # views whose colours change together: in float32 they take several times their memory
# Of every GPU of CUDA: bytes that a block of threads shares unless it asks for more; threads of a warp.
SHARED_BYTES, WARP = 48 * 1024, 32
FLOAT_BYTES = 4
# What torch says without memory, on a GPU and on the CPU; 5 is nvJPEG's NVJPEG_STATUS_ALLOCATOR_FAILURE.
NO_ROOM = re.compile(r"out of memory|can't allocate memory|Failed to [\w ]+: 5\b")


class Unfinished(NamedTuple):
    """What is still to be done with the views of a batch."""

    changes: Float[Tensor, "b 2 12"]  # of the colours, `Change.numbers()` of each view
    files: tuple[bytes, ...]  # JPEG files that are still to be decoded; empty where the batch holds all crops
    rows: tuple[int, ...]  # of the batch, one a file


def finish(batch: Batch, unfinished: Unfinished, settings: Views, device: torch.device) -> Batch:
    """The batch on `device` with all its views. BadSample for a file that no decoder takes."""
    moved = batch.to(device)  # boxes are read where they are
    views = moved.views
    if unfinished.files:
        views = views.clone() if device.type == "cpu" else views
        for row, image in zip(unfinished.rows, _decoded(unfinished.files, device), strict=True):
            for which, box in enumerate(batch.boxes[row].tolist()):
                if box[2]:  # a view that no target needs has a box of zeros
                    views[row, which] = cut_float(image, box, settings.size)
    changes = unfinished.changes.flatten(0, 1)
    parts = zip(views.flatten(0, 1).split(AT_ONCE), changes.split(AT_ONCE), strict=True)
    changed = torch.cat([change_batch(*part, largest_sigma(settings)) for part in parts])
    return replace(moved, views=changed.view_as(views))


def _decoded(files: tuple[bytes, ...], device: torch.device) -> list[UInt8[Tensor, "3 h w"]]:
    """RGB pixels on `device`, of files that its decoder refuses by ours: it says of many not which one it was."""
    try:
        return decode_files(files, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return [_decoded_alone(content, device) for content in files]


def _decoded_alone(content: bytes, device: torch.device) -> UInt8[Tensor, "3 h w"]:
    try:
        return decode_files((content,), device)[0]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        warnings.warn(f"the device does not decode a file ({error}): this process does", stacklevel=4)
        return decode_image(content).permute(2, 0, 1).to(device)


def decode_files(files: tuple[bytes, ...], device: torch.device) -> list[UInt8[Tensor, "3 h w"]]:
    """RGB pixels of JPEG files, by nvJPEG on a GPU and libjpeg-turbo without.

    RuntimeError for a file that it refuses; OutOfMemoryError, a RuntimeError too, when the device has no room.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in files]
    if device.type == "cuda":
        # torchvision allocates its results on this stream and writes them on a private one that waits for nothing:
        # they may lie where queued kernels still read (https://github.com/pytorch/vision/pull/9606). An event would
        # not do: the hardware decoder begins before what its stream is to wait for is done
        # (https://github.com/meta-pytorch/torchcodec/pull/1634).
        torch.cuda.current_stream(device).synchronize()
    with warnings.catch_warnings():  # it is to move to torchcodec, whose wheels need FFmpeg
        warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)
        try:
            return decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
        except RuntimeError as error:  # torchvision hands on nothing of any error but its words
            if NO_ROOM.search(str(error)):
                raise torch.OutOfMemoryError(str(error)) from error
            raise


def can_cut(height: int, width: int, size: int) -> bool:
    """Whether `cut_float` takes any crop of an image so large on a GPU, whose blocks of threads share little memory.

    Source: torch's aten/src/ATen/native/cuda/UpSampleBilinear2d.cu, upsample_gen2d_aa_out_cuda_template, for a block
    of one row; the weights of a bicubic filter reach two of the resized pixels to each side.
    """
    across, down = (1 + 2 * math.ceil(2 * max(side / size, 1)) for side in (width, height))
    return FLOAT_BYTES * (WARP * across + (WARP + 1) * down) <= SHARED_BYTES


def cut_float(image: UInt8[Tensor, "3 h w"], box: list[float], size: int) -> UInt8[Tensor, "3 s s"]:
    """As `views.cut`, in float32, since antialiasing of whole levels is a thing of CPUs; `box` as in Batch.boxes."""
    top, left, height, width, is_flipped = map(int, box)
    if is_flipped:
        left = image.shape[2] - left - width
    crop = image[None, :, top : top + height, left : left + width].float()
    view = F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)[0]
    view = view.round_().clamp_(0, 255).to(torch.uint8)
    return view.flip(2) if is_flipped else view
