"""Do views that the device finishes equal those that a worker makes?"""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch

from pretrain.config import Source, Views
from pretrain.data import device as device_module
from pretrain.data.colour import Change, change_batch, draw_change, largest_sigma
from pretrain.data.decode import decode_image, plain_jpeg_size
from pretrain.data.device import can_cut, cut_float, decode_files, finish
from pretrain.data.loader import Loader
from pretrain.data.sources import open_sources
from pretrain.data.steps import Steps
from pretrain.data.views import cut
from tests.data.delivered import batches
from tests.data.sets import encoded, good_set, picture, recoloured, sample, small_run, write_set

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
STRONG = Views(size=48, solarize=(0.3, 0.3), blur=(0.7, 0.3), blur_sigma=(0.5, 9.0))  # up to 2 pixels at 48


def view_of(seed: int, size: int = 48) -> torch.Tensor:
    return torch.from_numpy(picture(seed, size, size).copy()).permute(2, 0, 1).contiguous()


@pytest.mark.parametrize("device", DEVICES)
def test_colours_of_a_batch_are_those_of_each_view(device: str) -> None:
    drawn = [draw_change(STRONG, seed % 2, Random(seed)) for seed in range(64)]
    views = torch.stack([view_of(seed) for seed in range(64)])
    numbers = torch.tensor([change.numbers() for change in drawn])
    found = change_batch(views.to(device), numbers, largest_sigma(STRONG)).cpu()
    expected = torch.stack([recoloured(view, change) for view, change in zip(views, drawn, strict=True)])
    difference = (found.int() - expected.int()).abs()
    # each rounds twice; a blur over all of its reach differs from one cut off at three deviations by 0.3 %
    assert int(difference.max()) <= 2 and float((difference > 0).float().mean()) < 0.05
    assert sum(change.sigma > 0 for change in drawn) > 10 and sum(change.solarize for change in drawn) > 10


def test_the_host_waits_for_no_number_of_the_device(folders: dict[str, Path]) -> None:
    run = small_run(data={"names": Source("category")}, views=replace(STRONG, on_device="colours"))
    delivery = Steps(run, open_sources(run, {"names": folders["names"]}, None), 0, 1)[0]
    # a tensor of this device has no numbers: to read one raises
    finished = finish(delivery.batch, delivery.unfinished, run.views, torch.device("meta"))
    assert finished.views.is_meta and finished.views.shape == delivery.batch.views.shape


def test_a_change_of_nothing_changes_nothing() -> None:
    views = torch.stack([view_of(seed) for seed in range(3)] + [torch.zeros(3, 48, 48, dtype=torch.uint8)])
    numbers = torch.tensor([Change().numbers()] * 4)
    assert torch.equal(change_batch(views, numbers, 2.0), views)
    assert torch.equal(change_batch(views, numbers, 0.0), views)


@pytest.mark.parametrize("is_flipped", [False, True])
def test_a_crop_in_float_is_that_of_whole_levels(is_flipped: bool) -> None:
    image = torch.from_numpy(picture(3, 90, 120).copy())
    box = (7, 13, 60, 72)
    expected = cut(image, box, is_flipped, 32)
    found = cut_float(image.permute(2, 0, 1), [*map(float, box), float(is_flipped)], 32)
    difference = (found.int() - expected.int()).abs()
    assert (
        int(difference.max()) <= 2 and float(difference.float().mean()) < 0.3
    )  # 8-bit weights against float32


@pytest.mark.parametrize("device", DEVICES)
def test_the_devices_decoder_gives_the_pixels_of_ours(device: str) -> None:
    files = tuple(encoded(picture(seed, 40 + seed, 52), quality=90) for seed in range(4))
    for content, found in zip(files, decode_files(files, torch.device(device)), strict=True):
        difference = (found.cpu().permute(1, 2, 0).int() - decode_image(content).int()).abs()
        assert float(difference.float().mean()) < 1.5  # chroma may be upsampled in another way


def test_the_device_has_done_all_that_was_queued_before_it_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: called.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    def decode(files: list[torch.Tensor], **options: object) -> list[torch.Tensor]:
        called.append("decoded")
        return []

    monkeypatch.setattr("torchvision.io.decode_jpeg", decode)
    decode_files((b"a file",), torch.device("cuda"))
    assert called == ["waited", "decoded"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_decoding_writes_nothing_where_queued_kernels_still_read() -> None:
    device, files = torch.device("cuda"), (encoded(picture(0, 512, 512), quality=90),) * 8
    decode_files(files, device)  # its own memory is taken before
    read = [torch.full((3, 512, 512), 7, dtype=torch.uint8, device=device) for _ in files]
    torch.cuda.synchronize()
    torch.cuda._sleep(2 * 10**8)  # clock cycles, about a tenth of a second
    sums = [one.sum(dtype=torch.int64) for one in read]
    del read  # its blocks are given to the decoder
    decode_files(files, device)
    assert [int(one) for one in sums] == [7 * 3 * 512 * 512] * len(files)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"names": good_set(tmp_path_factory.mktemp("sets") / "names", has_text=False)}


@pytest.mark.parametrize("on_device", ["colours", "all"])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_batches_are_those_of_the_workers(
    folders: dict[str, Path], on_device: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "AT_ONCE", 5)
    run = small_run(data={"names": Source("category")})
    other = replace(run, views=replace(run.views, on_device=on_device))
    for one, two in zip(batches(run, folders, 4), batches(other, folders, 4, workers=workers), strict=True):
        difference = (one.views.int() - two.views.int()).abs().float()
        assert float(difference.mean()) < 1 and float((difference > 6).float().mean()) < 0.01
        for name in ("boxes", "sizes", "mask", "category", "position"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_what_is_no_plain_jpeg_is_left_to_the_worker() -> None:
    jpeg = encoded(picture(0), quality=90)
    assert plain_jpeg_size(jpeg) == (40, 52)
    turned = jpeg[:2] + b"\xff\xe1\x00\x10Exif\0\0" + bytes(8) + jpeg[2:]
    for content in (encoded(picture(0), "PNG"), jpeg[:-20], turned, b"", b"\xff\xd8\xff\xd9"):
        assert plain_jpeg_size(content) is None


def test_an_image_that_the_device_cannot_cut_is_left_to_the_worker(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # bytes of a block: 4 x (32 x columns + 33 x rows) below the filter, of 49,152
    assert can_cut(8192, 8192, 175) and not can_cut(8192, 8192, 174)  # 189 of each; 191 of each
    assert can_cut(16, 16 * 94, 16) and not can_cut(16 * 94, 16, 16)  # 377 columns and 5 rows; the reverse
    assert can_cut(8192, 8192, 224) and can_cut(40, 52, 16) and can_cut(1, 1, 224)
    run = small_run(data={"names": Source("category")})
    run = replace(run, views=replace(run.views, on_device="all"))
    steps = Steps(run, open_sources(run, {"names": folders["names"]}, None), 0, 1)
    assert len(steps[0].unfinished.files) == run.batch and not steps[0].batch.views.any()
    monkeypatch.setattr(device_module, "SHARED_BYTES", 0)
    assert not steps[0].unfinished.files and steps[0].batch.views[:, 0].flatten(1).any(1).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("height", "width"), [(8192, 8192), (64, 8192), (8192, 64)])
def test_a_gpu_cuts_what_is_left_to_it(height: int, width: int) -> None:
    size = next(size for size in range(1, 9999) if can_cut(height, width, size))
    image = torch.zeros(3, height, width, dtype=torch.uint8, device="cuda")
    assert cut_float(image, [0.0, 0.0, float(height), float(width), 0.0], size).shape == (3, size, size)
    with pytest.raises(RuntimeError, match="Too much shared memory"):
        cut_float(image, [0.0, 0.0, float(height), float(width), 0.0], size - 1)


def refusing(refused: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's decoder takes no batch with this file; it says not which one it was."""
    real = device_module.decode_files

    def decode(files: tuple[bytes, ...], device: torch.device) -> list[torch.Tensor]:
        if refused in files:
            raise RuntimeError("nvJPEG: corrupt")
        return real(files, device)

    monkeypatch.setattr(device_module, "decode_files", decode)


def of_refused(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Loader, Loader]:
    """Loaders of a set that holds such a file: everything decoded here, and by a device that refuses the file."""
    samples = [sample(number, has_text=False) for number in range(12)]
    samples[5]["jpg"] = content
    folder = {"names": write_set(tmp_path / "names", [samples])}
    run = small_run(data={"names": Source("category")}, batch=12, max_bad=0.5)
    refusing(content, monkeypatch)
    here, there = (
        Loader(replace(run, views=replace(run.views, on_device=what)), folder, None, rank=0, world=1)
        for what in ("colours", "all")
    )
    return here, there


def test_a_file_that_the_device_refuses_is_the_only_one_decoded_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = of_refused(sample(5, has_text=False)["jpg"], tmp_path, monkeypatch)
    monkeypatch.delattr(Steps, "decoded_here")  # the other eleven are left to the device
    with pytest.warns(UserWarning, match=r"the device does not decode a file \(nvJPEG: corrupt\)") as told:
        difference = (next(there).views.int() - next(here).views.int()).abs().float()
    assert float(difference.mean()) < 1 and float((difference > 6).float().mean()) < 0.01
    assert len(told) == 1 and not there.dropped


def test_a_file_that_no_decoder_takes_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = bytearray(sample(5, has_text=False)["jpg"])
    damaged[-200:-160] = (
        b"\xff\xd9" * 20
    )  # in the pixels: its header is whole, so that it is left to the device
    here, there = of_refused(bytes(damaged), tmp_path, monkeypatch)
    with pytest.warns(UserWarning, match="the device does not decode a file"):
        assert torch.equal(next(there).views, next(here).views)
    assert here.dropped == there.dropped and sum(there.dropped.values()) == 1


# What `decode_jpegs_cuda` of torchvision 0.29 says, its own "Error while decoding" around the words of what failed.
DECODING = "decode_jpegs_cuda, /vision/csrc/io/image/cuda/decode_jpegs_cuda.cpp:9, Error while decoding JPEG images: "
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 GiB is"
SAID_OF_MEMORY = [
    f'{DECODING}{FULL}. (originally from torch_call_dispatcher( "aten::empty", "memory_format", '
    "stack.data(), TORCH_ABI_VERSION) API call failed at /include/torch/csrc/stable/ops.h, line 632)",
    f"{DECODING}decode_images, /vision/decode_jpegs_cuda.cpp:470, Failed to decode batch: 5",
]
SAID_OF_A_FILE = f"{DECODING}prepare_buffers, /vision/decode_jpegs_cuda.cpp:350, Failed to get image info: "


@pytest.mark.parametrize("said", SAID_OF_MEMORY)
def test_a_gpu_without_memory_is_no_file_that_it_refuses(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(files: list[torch.Tensor], **options: object) -> list[torch.Tensor]:
        raise RuntimeError(said)

    monkeypatch.setattr("torchvision.io.decode_jpeg", decode)
    with pytest.raises(torch.OutOfMemoryError, match="Error while decoding JPEG images"):
        device_module._decoded((b"a file",), torch.device("cpu"))


@pytest.mark.parametrize("status", ["3", "10", "55"])  # a bad file; an incomplete one; none of nvJPEG's
def test_a_file_that_a_gpu_refuses_is_no_lack_of_memory(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(files: list[torch.Tensor], **options: object) -> list[torch.Tensor]:
        raise RuntimeError(SAID_OF_A_FILE + status)

    monkeypatch.setattr("torchvision.io.decode_jpeg", decode)
    with pytest.warns(UserWarning, match="the device does not decode a file"):
        (image,) = device_module._decoded((encoded(picture(0), quality=90),), torch.device("cpu"))
    assert image.shape == (3, 40, 52)


def test_a_decoder_that_really_finds_no_memory_says_so() -> None:
    """A file whose header promises 12.9 GB, where the process may take one more."""
    content = bytearray(encoded(picture(0), quality=90))
    at = content.index(b"\xff\xc0")  # the frame: its length, 8 bits, height and width
    content[at + 5 : at + 9] = (65_500).to_bytes(2) * 2
    decode_files((encoded(picture(0), quality=90),), torch.device("cpu"))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30, hard))
    try:
        with pytest.raises(torch.OutOfMemoryError, match="can't allocate memory"):
            device_module._decoded((bytes(content),), torch.device("cpu"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
