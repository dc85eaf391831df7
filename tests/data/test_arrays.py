"""Arrays of numbers in place of images: what is read, what is refused, and which folders hold them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from finetune.data.channels.arrays import (
    check_array,
    draw_planes,
    find_array_shape,
    read_array,
    read_planes,
    read_shape,
)
from finetune.data.channels.bands import check_takes
from finetune.data.dataset import Dataset
from finetune.data.decode import BadImageError
from finetune.data.discover import discover
from finetune.data.inputs import find_inputs
from finetune.data.scan import check_images
from finetune.data.split import SplitConfig
from finetune.data.transforms import Normalizer, build_eval_transform, build_train_transform
from finetune.errors import DataError
from pretrained.catalog import find_card

SIZE = (48, 19, 19)


def board(seed: int = 0, kind: Any = np.uint8) -> NDArray[Any]:
    return (np.random.default_rng(seed).random(SIZE) < 0.3).astype(kind)


def save(path: Path, values: NDArray[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)
    return path


def boards(root: Path, classes: str = "ab", number: int = 4) -> Path:
    for label in classes:
        for index in range(number):
            save(root / label / f"{index}.npy", board(ord(label) + 10 * index))
    return root


def pictures(root: Path, classes: str = "ab", number: int = 4) -> Path:
    for label in classes:
        for index in range(number):
            (root / label).mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(index).integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / label / f"{index}.png")
    return root


@pytest.mark.parametrize("kind", ["?", "u1", "<i2", ">i4", "<f2", "<f4", ">f8"])
@pytest.mark.parametrize("arrange", [np.asarray, np.asfortranarray, lambda planes: planes.transpose(1, 2, 0)])
def test_every_type_and_order_gives_the_same_planes(
    tmp_path: Path, kind: str, arrange: Callable[[Any], Any]
) -> None:
    planes = board(kind=kind)
    for path in (save(tmp_path / "x.npy", arrange(planes)), tmp_path / "x.npz"):
        if path.suffix == ".npz":
            np.savez_compressed(path, arrange(planes))
        found = read_planes(path, SIZE)
        assert found.dtype == np.float32 and found.flags.c_contiguous and found.flags.writeable
        assert np.array_equal(found, board())


def npy(header: str, content: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content


def packed(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


GOOD = "{'descr': '|u1', 'fortran_order': False, 'shape': (48, 19, 19)}"
HUGE = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000, 48)}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"\x89PNG\r\n\x1a\n", "not an array in NumPy's format"),
        (b"path,label\n", "not an array in NumPy's format"),
        (npy(GOOD, bytes(100)), "truncated: the end of the array is missing"),
        (npy(HUGE), "an array of 1000000 x 1000000 x 48 values, and not of 48 x 19 x 19"),
        (npy(GOOD.replace("(48, 19, 19)", "(17328,)")), "an array of 17328 values, and not of 48 x 19 x 19"),
        (npy(GOOD.replace("(48, 19, 19)", "()")), "an array of no values"),
        (npy(GOOD.replace("|u1", "|O")), "an array of object, and not of numbers"),
        (npy(GOOD.replace("|u1", "<c8")), "an array of complex64, and not of numbers"),
        (npy("__import__('os').system('touch /tmp/x')"), "damaged: "),
        (npy("[" * 5000), "damaged: "),
        (packed(), "not an array in NumPy's format"),
        (packed(("a.npy", b""), ("b.npy", b"")), r"holds 2 arrays \(a, b\), and not a single one"),
        (packed(("a.npy", npy(GOOD, bytes(3)))), "truncated"),
        (packed(("a.txt", b"hello")), "damaged: "),
        (packed(("a.npy", npy(GOOD, bytes(48 * 361))))[:-30], "damaged: "),
    ],
)
def test_what_is_no_array_of_the_network_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(BadImageError, match=reason):
        read_planes(path, SIZE)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    for value, kind in ((np.nan, "f4"), (np.inf, "f8"), (1e300, "f8")):
        values = board(kind=kind)
        values[3, 4, 5] = value
        with pytest.raises(BadImageError, match="not finite"):
            read_planes(save(tmp_path / "x.npy", values), SIZE)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d.npy").mkdir()
    for name, reason in (("x.npy", "file not found"), ("d.npy", "it is a folder")):
        with pytest.raises(BadImageError, match=reason):
            read_planes(tmp_path / name, SIZE)


def test_an_array_that_was_pickled_is_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.full(SIZE, None, dtype=object), allow_pickle=True)
    with pytest.raises(BadImageError, match="object, and not of numbers"):
        read_planes(path, SIZE)
    with pytest.raises(BadImageError, match="object, and not of numbers"):
        check_array(path, SIZE)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_damaged_files_are_read_or_refused_in_one_way(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole{suffix}"
    np.savez_compressed(whole, board()) if suffix == ".npz" else np.save(whole, board())
    path, content, refused = tmp_path / f"x{suffix}", whole.read_bytes(), 0
    for seed in range(300):
        damaged, random = bytearray(content), np.random.default_rng(seed)
        damaged[random.integers(200 if seed % 2 else len(content))] ^= 1 << random.integers(8)
        path.write_bytes(bytes(damaged))
        try:
            assert read_planes(path, SIZE).shape == SIZE
        except BadImageError as error:
            refused += 1
            assert error.reason and len(error.reason) < 200 and "\n" not in error.reason
    assert refused > 10


def test_a_folder_of_arrays_is_a_data_set(tmp_path: Path) -> None:
    dataset = discover(boards(tmp_path), SplitConfig(0.25, 0))
    assert dataset.classes == ("a", "b") and len(dataset.samples) == 8
    assert find_array_shape(dataset) == SIZE == read_shape(tmp_path / "a" / "0.npy")
    checked = check_images(dataset)
    assert not checked.bad and len(checked.digests) == 8 and not checked.scan.paths


def test_arrays_that_are_unlike_the_first_or_damaged_are_listed(tmp_path: Path) -> None:
    boards(tmp_path)
    save(tmp_path / "a" / "3.npy", board()[:47])
    (tmp_path / "b" / "2.npy").write_bytes(b"")
    bad = {image.path: image.reason for image in check_images(discover(tmp_path, SplitConfig(0.25, 0))).bad}
    assert bad == {
        "a/3.npy": "an array of 47 x 19 x 19 values, and not of 48 x 19 x 19",
        "b/2.npy": "empty file",
    }


def test_arrays_beside_images_are_left_out_as_other_files_are(tmp_path: Path) -> None:
    pictures(tmp_path)
    boards(tmp_path, number=2)
    dataset = discover(tmp_path, SplitConfig(0.25, 0))
    assert {Path(sample.path).suffix for sample in dataset.samples} == {".png"}
    assert find_array_shape(dataset) is None
    assert any(".npy (4)" in warning for warning in dataset.warnings)


def test_tables_splits_and_single_images_of_arrays(tmp_path: Path) -> None:
    boards(tmp_path / "train")
    boards(tmp_path / "val", number=1)
    dataset = discover(tmp_path, SplitConfig(0.25, 0))
    assert [len(dataset.of(split)) for split in ("train", "val")] == [8, 2]
    rows = "".join(f"train/{label}/{index}.npy,{label}\n" for label in "ab" for index in range(4))
    (tmp_path / "list.csv").write_text("path,label\n" + rows)
    assert len(discover(tmp_path / "list.csv", SplitConfig(0.25, 0)).samples) == 8
    for source, number in ((tmp_path / "train", 8), (tmp_path / "list.csv", 8), (tmp_path / "t*/a/*", 4)):
        assert len(list(find_inputs(str(source), None).open())) == number


def test_a_network_is_given_what_it_takes(tmp_path: Path) -> None:
    arrays = discover(boards(tmp_path / "arrays"), SplitConfig(0.25, 0))
    images = discover(pictures(tmp_path / "images"), SplitConfig(0.25, 0))
    go, photographs = find_card("alphago_policy"), find_card("cifar_resnet20")
    check_takes(go, arrays)
    check_takes(photographs, images)
    with pytest.raises(
        DataError,
        match=r"it holds images \(grey or RGB\), and zoo/alphago_policy takes arrays .* 48 x 19 x 19",
    ):
        check_takes(go, images)
    with pytest.raises(
        DataError, match=r"holds arrays of 48 x 19 x 19 values, and zoo/cifar_resnet20 takes"
    ) as e:
        check_takes(photographs, arrays)
    assert "Add --channels N (up to 16)" in e.value.fix
    other = save(tmp_path / "other" / "a" / "0.npy", np.zeros((4, 5, 6)))
    save(tmp_path / "other" / "b" / "0.npy", np.zeros((4, 5, 6)))
    small: Dataset = discover(other.parents[1], SplitConfig(0.25, 0), draws=False)
    with pytest.raises(DataError, match="it holds arrays of 4 x 5 x 6 values"):
        check_takes(go, small)


def test_the_view_of_an_array_is_the_array(tmp_path: Path) -> None:
    import torch

    preprocessing = find_card("alphago_policy").preprocessing
    path = save(tmp_path / "x.npy", board().transpose(1, 2, 0))
    for transform in (build_eval_transform(preprocessing), build_train_transform(preprocessing, "heavy")):
        assert not transform.is_random
        view = transform(transform.open(path))
        assert torch.equal(view, torch.from_numpy(board().astype(np.float32)))
        normalised = Normalizer(preprocessing, torch.device("cpu"))(view[None])
        assert torch.equal(normalised[0], view)


def test_the_picture_of_an_array_is_the_mean_of_its_planes(tmp_path: Path) -> None:
    values = np.zeros((2, 3, 3))
    values[:, 0, 0], values[0, 2, 2] = 1, 1
    for path in (save(tmp_path / "a.npy", values), save(tmp_path / "b.npy", values.transpose(1, 2, 0))):
        picture = np.asarray(draw_planes(read_array(path)))
        assert picture.shape == (3, 3, 3)
        assert picture[0, 0].tolist() == [255] * 3 and picture[2, 2].tolist() == [128] * 3
        assert picture[1].max() == 0
    with pytest.raises(BadImageError, match="which is no image"):
        read_array(save(tmp_path / "c.npy", np.zeros(3)))
