"""What `fastnorm stats` takes from files: numbers as they are stored, or it says why not."""

from __future__ import annotations

import base64
import bz2
import functools
import gzip
import io
import json
import lzma
import os
import pickle
import socket
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnorm import cli, stats
from fastnorm._files import arrays, parts
from fastnorm._files.names import CannotRead, CannotUse
from fastnorm._files.parts import Options

from .helpers import Array, run_python

posix = pytest.mark.skipif(os.name != "posix", reason="files that only POSIX has")
UNIT = 2.0**-53


def of(path: Path, kind: str = "image", **options: Any) -> stats.Found:
    """What is found in a file by itself."""
    files = [(path, kind)]
    return stats.collect(files, Options(**options))[0]


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = cli.main(["stats", *map(str, arguments)])
    return status, *capsys.readouterr()


def assert_moments(found: stats.Found, x: Array, axis: Any) -> None:
    """The exact ones: sums in integers or extended precision are not needed for so few numbers."""
    wide = x.astype(np.float64)
    total = found.total
    count = x.size // max(np.mean(wide, axis).size, 1)
    np.testing.assert_array_equal(total.count, count)
    # both means are sums of `count` numbers, each off by a unit of the largest at every addition
    most = np.abs(wide).max()
    np.testing.assert_allclose(total.mean, wide.mean(axis), rtol=0, atol=2 * count * UNIT * most)
    bound = 8 * count * UNIT * most**2
    np.testing.assert_allclose(total.var(), wide.var(axis), rtol=0, atol=bound)


def random(dtype: str, shape: tuple[int, ...], seed: int) -> Array:
    """All bits of integers; floats of the usual size."""
    rng, kind = np.random.default_rng(seed), np.dtype(dtype)
    if kind.kind == "f":
        return rng.normal(3, 10, shape).astype(kind)
    info = np.iinfo(kind)
    return rng.integers(info.min, info.max, shape, kind, endpoint=True)


# --- Numbers as they are stored -------------------------------------------------------------------


def png(x: Array, filters: list[int]) -> bytes:
    """An image as PNG: 8 or 16 bits, 1 to 4 channels, any filters of rows but Paeth's."""
    height, width, channels = x.shape
    back = channels * x.dtype.itemsize
    rows = np.ascontiguousarray(x.astype(x.dtype.newbyteorder(">"))).view(np.uint8)
    rows = rows.reshape(height, -1)
    data = b""
    for i, row in enumerate(rows):
        left = np.concatenate([np.zeros(back, np.uint8), row[:-back]])
        above = rows[i - 1] if i else np.zeros_like(row)
        means = ((left.astype(int) + above) // 2).astype(np.uint8)
        kind = filters[i % len(filters)]
        data += bytes([kind]) + (row - [np.zeros_like(row), left, above, means][kind]).tobytes()

    def chunk(name: bytes, inside: bytes) -> bytes:
        crc = zlib.crc32(name + inside)
        return struct.pack(">I", len(inside)) + name + inside + struct.pack(">I", crc)

    colour = (0, 4, 2, 6)[channels - 1]
    header = struct.pack(">IIBBBBB", width, height, 8 * x.dtype.itemsize, colour, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
seeds = st.integers(0, 2**32)


@settings(max_examples=60)
@given(
    shapes,
    st.integers(1, 4),
    st.sampled_from(["u1", "u2"]),
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    seeds,
)
def test_png(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int],
    channels: int,
    dtype: str,
    filters: list[int],
    seed: int,
) -> None:
    pytest.importorskip("PIL")
    x = random(dtype, (*shape, channels), seed)
    path = tmp_path_factory.getbasetemp() / "x.png"
    path.write_bytes(png(x, filters))
    assert_moments(of(path), x, (0, 1))
    if channels == 1:
        # --mode RGB of 16 bits repeats the numbers, and cuts none off at 255
        assert_moments(of(path, mode="RGB"), np.repeat(x, 3, 2), (0, 1))


TIFF = {
    "plain": {},
    "strips": {"rowsperstrip": 3},
    "deflate": {"compression": "zlib", "rowsperstrip": 7},
    "predicted": {"compression": "zlib", "predictor": 2},
    "tiles": {"tile": (16, 32)},
    "deflated tiles": {"tile": (32, 16), "compression": "zlib"},
}


@settings(max_examples=120)
@given(
    shapes,
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from(["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]),
    st.sampled_from(sorted(TIFF)),
    st.booleans(),
    st.sampled_from("<>"),
    st.booleans(),
    seeds,
)
def test_tiff(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int],
    channels: int,
    pages: int,
    dtype: str,
    layout: str,
    planes: bool,
    order: str,
    big: bool,
    seed: int,
) -> None:
    tifffile = pytest.importorskip("tifffile")
    options = dict(TIFF[layout])
    if dtype[0] == "f":
        options.pop("predictor", None)  # tifffile writes it for integers only
    x = random(dtype, (pages, *shape, channels), seed)
    path = tmp_path_factory.getbasetemp() / "x.tif"
    colours = {1: "minisblack", 3: "rgb", 4: "rgb"}.get(channels, "minisblack")
    if channels > 1:
        options["planarconfig"] = "separate" if planes else "contig"
    with tifffile.TiffWriter(path, bigtiff=big, byteorder=order) as file:
        for page in x:
            stored = np.moveaxis(page, -1, 0) if planes else page
            stored = page[..., 0] if channels == 1 else stored
            file.write(stored, photometric=colours, metadata=None, **options)
    assert_moments(of(path), x, (0, 1, 2))
    # rows that have statistics of their own: pages, which are all the same size, merge
    assert_moments(of(path, axis=(-1, 1)), x, (0, 2, 3))


@pytest.mark.parametrize("packing", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "tiff_lzma"])
@pytest.mark.parametrize("mode", ["L", "I;16", "I", "F", "RGB", "RGBA", "CMYK"])
def test_tiff_as_libtiff_writes_it(tmp_path: Path, mode: str, packing: str) -> None:
    pytest.importorskip("tifffile")
    Image = pytest.importorskip("PIL.Image")
    dtype = {"I;16": "u2", "I": "i4", "F": "f4"}.get(mode, "u1")
    x = random(dtype, (50, 43, {"RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode, 1)), 0)
    image = Image.fromarray(x[..., 0] if x.shape[2] == 1 else x)
    if mode == "CMYK":
        image = Image.frombytes("CMYK", (43, 50), x.tobytes())
    for predictor in (1, 2, 3):
        if predictor > 1 and (
            packing in ("packbits", "tiff_lzma") or (predictor == 3) != (mode == "F")
        ):
            continue
        path = tmp_path / f"{predictor}.tif"
        image.save(path, compression=packing, tiffinfo={317: predictor})
        assert_moments(of(path), x, (0, 1))


def test_what_tiff_hides(tmp_path: Path) -> None:
    """Overviews and masks do not count, nor one image for all that ImageJ stacked behind it."""
    tifffile = pytest.importorskip("tifffile")
    x = random("u2", (4, 30, 20), 0)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(x[0], metadata=None)
        file.write(x[1, ::2, ::2], subfiletype=1, metadata=None)
        file.write(x[2] > 9, subfiletype=4, metadata=None, photometric="minisblack")
        file.write(x[3], metadata=None)
    assert_moments(of(tmp_path / "a.tif"), x[[0, 3], ..., None], (0, 1, 2))
    for name, imagej in (("b.tif", True), ("c.tif", False)):
        with tifffile.TiffWriter(tmp_path / name, imagej=imagej) as file:
            file.write(x, photometric="minisblack", **({} if imagej else {"truncate": True}))
        assert_moments(of(tmp_path / name), x[..., None], (0, 1, 2))


def test_depths_that_pillow_would_change(tmp_path: Path) -> None:
    """A PGM of 10 bits is stretched to 16, and colours of 16 bits are cut to 8: refused."""
    Image = pytest.importorskip("PIL.Image")
    ramp = np.arange(1000, dtype=">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 100 10 999\n" + ramp.tobytes())
    (tmp_path / "b.ppm").write_bytes(b"P6 10 10 65535\n" + bytes(600))
    (tmp_path / "c.pgm").write_bytes(b"P5 100 10 65535\n" + ramp.tobytes())
    (tmp_path / "d.pgm").write_bytes(b"P2 3 1 255\n0 7 255\n")
    for name in ("a.pgm", "b.ppm"):
        with pytest.raises(CannotRead, match="cannot be read as it is stored"):
            of(tmp_path / name)
    assert_moments(of(tmp_path / "c.pgm"), ramp.reshape(10, 100, 1), (0, 1))
    assert of(tmp_path / "d.pgm").total.mean == pytest.approx(262 / 3)
    deep = Image.fromarray(random("u2", (16, 16), 0) >> 4)
    deep.save(tmp_path / "e.jp2", irreversible=False)
    assert_moments(of(tmp_path / "e.jp2"), np.asarray(deep)[..., None], (0, 1))
    data = bytearray((tmp_path / "e.jp2").read_bytes())
    data[data.index(b"\xff\x4f\xff\x51") + 42] = 11  # 12 bits
    (tmp_path / "f.jp2").write_bytes(data)
    with pytest.raises(CannotRead, match="JPEG 2000 of another depth"):
        of(tmp_path / "f.jp2")


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.sampled_from(["u1", "u2", "i4", "i8", "f2", "f4", "f8", "?"]),
    st.sampled_from("<>"),
    st.sampled_from(["npy", "npz", "zarr", "h5"]),
    st.sampled_from("CF"),
    st.data(),
)
def test_arrays(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, ...],
    dtype: str,
    byteorder: str,
    kind: str,
    order: Any,
    data: st.DataObject,
) -> None:
    rng = np.random.default_rng(0)
    x = np.asarray(rng.normal(0, 99, shape)).astype(dtype).copy(order)
    x = x.astype(x.dtype.newbyteorder(byteorder))
    path = tmp_path_factory.mktemp("arrays") / f"x.{kind}"
    if kind == "npy":
        np.save(path, x)
    elif kind == "npz":
        np.savez_compressed(path, x=x)
    elif kind == "zarr":
        version = data.draw(st.sampled_from([2, 3]))
        zarr = pytest.importorskip("zarr")
        if shape and min(shape):
            zarr.create_array(path, data=x, chunks=(2,) * x.ndim, zarr_format=version)
        else:
            return
    else:
        with pytest.importorskip("h5py").File(path, "w") as file:
            file["x"] = x
    axes = data.draw(st.none() | st.sets(st.integers(0, x.ndim - 1)).map(tuple)) if x.ndim else None
    before = parts.BLOCK
    parts.BLOCK = arrays.BLOCK = 64
    try:
        found = of(path, "hdf5" if kind == "h5" else kind, axis=axes or None)
    finally:
        parts.BLOCK = arrays.BLOCK = before
    if x.size:
        assert_moments(found, x, axes or None)
    else:
        assert np.sum(found.total.count) == 0


# --- Numbers that stand for none, and what they stand for -----------------------------------------


def in_json(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, Any, str]:
    """What is printed as JSON, by a parser that takes nothing else."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    status, out, err = run(capsys, *arguments, "--json")
    return status, json.loads(out, parse_constant=refuse), err


def test_nodata(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    x = random("f4", (30, 20, 2), 0)
    x[3:9, :, 0] = x[20, 5, 1] = -9999
    x[4, 4, 1] = np.nan
    exact = np.where(x == -9999, np.nan, x.astype(float))
    path = tmp_path / "own.tif"
    tag = (42113, "s", 0, "-9999", True)
    tifffile.imwrite(path, x, photometric="minisblack", planarconfig="contig", extratags=[tag])
    status, found, err = in_json(capsys, path)
    assert (status, found["mean"][1], found["normalize"], found["moments"]) == (1, None, None, None)
    assert "channel 1: the mean is nan" in err
    assert "own.tif has NaN or an infinity; --ignore-nan leaves out NaN" in err
    status, found, _ = in_json(capsys, path, "--ignore-nan")
    assert status == 0
    np.testing.assert_allclose(found["mean"], np.nanmean(exact, (0, 1)), rtol=1e-13)
    np.testing.assert_allclose(found["std"], np.nanstd(exact, (0, 1)), rtol=1e-13)
    assert found["count"] == np.isfinite(exact).sum((0, 1)).tolist()
    np.save(tmp_path / "x.npy", x)
    _, found, _ = in_json(capsys, tmp_path / "x.npy", "--ignore-nan", "--nodata=-9999")
    np.testing.assert_allclose(found["mean"], np.nanmean(exact), rtol=1e-13)


@pytest.mark.parametrize("dtype", ["?", "u1", "i2", "i8", "f2", "f4", "f8"])
@pytest.mark.parametrize("value", [0.0, 1.0, 2.5, -1.0, 300.0, 1e300, float("inf"), float("nan")])
def test_nodata_is_compared_as_the_dtype_has_it(dtype: str, value: float) -> None:
    x = np.array([0, 1, 1, 0]).astype(dtype)
    if x.dtype.kind == "f":
        with np.errstate(all="ignore"):
            x = np.array([0, 1, value, np.nan]).astype(dtype)
    left_out = parts.Block(x, "").left_out(Options(nodata=value))
    with np.errstate(all="ignore"):
        same = np.isnan(x) if np.isnan(value) else x == np.float64(value).astype(dtype)
    if x.dtype.kind in "iub":
        same = np.array([int(n) == value for n in x])
    np.testing.assert_array_equal(False if left_out is None else left_out, same)


@pytest.mark.parametrize("kind", ["h5", "zarr"])
def test_attributes_of_netcdf(tmp_path: Path, kind: str) -> None:
    x = random("i2", (50, 4), 0)
    x[::7] = -32768
    said = {"_FillValue": -32768, "scale_factor": 0.01, "add_offset": 273.15}
    path = tmp_path / f"x.{kind}"
    if kind == "h5":
        with pytest.importorskip("h5py").File(path, "w") as file:
            file["t"] = x
            file["t"].attrs.update({"_FillValue": np.int16(-32768), **dict(list(said.items())[1:])})
    else:
        pytest.importorskip("zarr").create_array(path, data=x, attributes=said)
    exact = (x * 0.01 + 273.15)[x != -32768]
    total = of(path, "hdf5" if kind == "h5" else kind).total
    assert total.count == exact.size
    assert total.mean == pytest.approx(exact.mean(), rel=1e-13)
    assert total.std() == pytest.approx(exact.std(), rel=1e-12)


def test_fill_value_as_xarray_writes_it(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    said = {"_FillValue": base64.b64encode(struct.pack("<d", -1e30)).decode()}
    zarr.create_array(tmp_path / "3", data=np.array([1.0, -1e30, 3.0]), attributes=said)
    zarr.create_array(
        tmp_path / "2",
        data=np.array([1.0, -1e30, 3.0]),
        zarr_format=2,
        fill_value=-1e30,
        attributes={"_ARRAY_DIMENSIONS": ["x"]},
    )
    for name in "23":
        assert of(tmp_path / name, "zarr").total.mean == 2.0


def test_nothing_but_nodata(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(5))
    status, found, err = in_json(capsys, tmp_path / "x.npy", "--nodata", 0)
    assert (status, found["count"], found["mean"]) == (1, 0, None)
    assert "there are no numbers" in err
    np.save(tmp_path / "x.npy", np.array([1.7e308, -1.7e308]))
    status, found, err = in_json(capsys, tmp_path / "x.npy")
    assert (status, found["var"]) == (1, None)
    assert "the variance is beyond the range" in err


# --- What does not belong together ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("u1 1", "u2 1"),
        ("u1 3", "u2 3"),
        ("u1 1", "u1 3"),
        ("u2 1", "u2 3"),
        ("u1 3", "u1 4"),
        ("f4 1", "u1 1"),
        ("i2 1", "u2 1"),
        ("u1 RGBA", "u1 CMYK"),
    ],
)
def test_modes_that_do_not_belong_together(tmp_path: Path, first: str, second: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    for name, what in (("a.tif", first), ("b.tif", second)):
        dtype, channels = what.split()
        n = {"RGBA": 4, "CMYK": 4}.get(channels) or int(channels)
        x = random(dtype, (20, 20, n), 0)[..., : n if n > 1 else None].squeeze()
        colours = {"CMYK": "separated"}.get(channels, "rgb" if n > 2 else "minisblack")
        tifffile.imwrite(tmp_path / name, x, photometric=colours)
    files, _ = stats.files_of([tmp_path])
    with pytest.raises(CannotRead) as refused:
        stats.collect(files.found, Options())
    message = str(refused.value)
    assert "b.tif: it " in message
    assert "a.tif" in message
    # what cannot be converted is not said to be
    eight = first[:2] == second[:2] == "u1"
    assert ("--mode RGB" in message) == eight
    for mode in ("RGB", "L"):
        if eight:
            assert len(np.atleast_1d(stats.collect(files.found, Options(mode=mode))[0].total.mean))
        elif mode == "L" and "3" in first + second:
            with pytest.raises(CannotRead, match="--mode L converts images of 8 bits"):
                stats.collect(files.found, Options(mode=mode))


def test_pages_and_arrays_that_do_not_belong_together(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(random("u1", (9, 9), 0), metadata=None)
        file.write(random("u2", (9, 9), 0), metadata=None)
    with pytest.raises(CannotRead, match="another page of it"):
        of(tmp_path / "a.tif")
    np.save(tmp_path / "a.npy", np.zeros(3, np.uint8))
    np.save(tmp_path / "b.npy", np.zeros(3, np.float32))
    np.save(tmp_path / "c.npy", np.zeros(3, np.float64))
    with pytest.raises(CannotRead, match=r"b\.npy: it is floats, and .*a\.npy is uint8"):
        stats.collect([(tmp_path / "a.npy", "npy"), (tmp_path / "b.npy", "npy")], Options())
    found, _ = stats.collect([(tmp_path / "b.npy", "npy"), (tmp_path / "c.npy", "npy")], Options())
    assert found.total.count == 6


# --- Which files there are ------------------------------------------------------------------------


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """Folders with four arrays."""
    for name in ("a/x.npy", "a/y.npy", "b/c/x.npy", "z.npy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / name, np.arange(3.0))
    return tmp_path


def names(root: Path, *paths: Path) -> list[str]:
    files, _ = stats.files_of(paths or [root])
    return [path.relative_to(root).as_posix() for path, _ in files.found]


ALL = ["a/x.npy", "a/y.npy", "b/c/x.npy", "z.npy"]


@posix
def test_each_real_file_once(numbers: Path) -> None:
    (numbers / "self").symlink_to(".")
    (numbers / "a" / "up").symlink_to("..")
    (numbers / "a" / "0").symlink_to("../b")  # before what it is a link to
    (numbers / "0.npy").symlink_to("a/x.npy")
    (numbers / "b" / "loop").symlink_to("loop")
    assert names(numbers) == ALL
    assert names(numbers, numbers, numbers, numbers / "z.npy", numbers / "b" / ".." / "a") == ALL
    through_links = ["0.npy", "a/0/c/x.npy", "a/up/z.npy", "a/y.npy"]
    assert names(numbers, numbers / "0.npy", numbers / "a") == through_links
    # links to what is elsewhere count
    other = numbers.parent / f"{numbers.name}-other"
    other.mkdir()
    np.save(other / "o.npy", np.arange(3.0))
    (numbers / "m").symlink_to(other)
    assert names(numbers) == ALL[:3] + ["m/o.npy", "z.npy"]


def test_hidden_files_are_none(numbers: Path) -> None:
    for name in ("._x.npy", "a/.hidden.npy", ".git/x.npy"):
        (numbers / name).parent.mkdir(exist_ok=True)
        np.save(numbers / name, np.arange(99.0))
    assert names(numbers) == ALL
    assert names(numbers, numbers / "._x.npy") == ["._x.npy"], "unless they are named"


def test_an_empty_name_is_none() -> None:
    with pytest.raises(CannotUse, match="a path is empty"):
        stats.files_of([""])


def test_what_is_passed_over_is_said(capsys: pytest.CaptureFixture[str], numbers: Path) -> None:
    for name in ("a.eps", "b.psd", "c.EPS", "notes.txt"):
        (numbers / name).touch()
    status, _, err = run(capsys, numbers)
    assert (status, err) == (
        0,
        "fastnorm: passed over 3 files of kinds that are not read: .eps, .psd\n",
    )


@posix
def test_pipes_sockets_and_devices(
    capsys: pytest.CaptureFixture[str], numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(numbers)
    os.mkfifo("p.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s.tif")
    (numbers / "d.npy").symlink_to("/dev/zero")
    (numbers / "n.npy").symlink_to("nowhere")
    for name, said in (
        ("p.png", "a pipe"),
        ("s.tif", "a socket"),
        ("d.npy", "a device"),
        ("/dev/zero", "a device"),
    ):
        status, out, err = run(capsys, name)
        assert (status, out) == (2, "")
        assert f"{name!r} is {said}, expected a file or a folder" in err
    assert run(capsys, ".")[0] == 1
    status, out, err = run(capsys, ".", "--skip-bad", "--json")
    assert (status, json.loads(out)["count"]) == (0, 12)
    for name in ("d.npy", "n.npy", "p.png", "s.tif"):
        assert f"left out {name}: it is a" in err
    (numbers / "x.zarr").mkdir()
    (numbers / "x.zarr" / ".zarray").write_text(json.dumps(ZARR), encoding="utf-8")
    os.mkfifo(numbers / "x.zarr" / "0")
    status, _, err = run(capsys, "x.zarr")
    assert status == 1
    assert "x.zarr: '0' in it is no file" in err


def test_a_folder_that_cannot_be_listed(
    capsys: pytest.CaptureFixture[str], numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    status, out, err = run(capsys, numbers)
    assert (status, out) == (1, "")
    assert f"cannot read {numbers / 'b'}: this folder cannot be listed: Permission denied" in err
    status, out, err = run(capsys, numbers, "--skip-bad", "--json")
    assert (status, json.loads(out)["count"]) == (0, 9)
    assert f"left out {numbers / 'b'}: " in err


def test_deep_folders(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way to each is not looked up anew: of a thousand that took half a minute."""
    asked: list[Any] = []
    real = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: (asked.append(path), real(path))[1])
    last = tmp_path / "/".join("d" * 200)
    last.mkdir(parents=True)
    np.save(last / "x.npy", np.arange(3.0))
    (last / "again").symlink_to(tmp_path)
    status, out, _ = run(capsys, tmp_path, tmp_path / ".", "--json")
    assert (status, json.loads(out)["count"]) == (0, 3)
    assert len(asked) < 10


# --- Hostile files --------------------------------------------------------------------------------

ZARR: dict[str, Any] = {
    "zarr_format": 2,
    "shape": [3],
    "chunks": [3],
    "dtype": "<f8",
    "compressor": None,
    "filters": None,
    "fill_value": 0,
    "order": "C",
}


def test_ghostscript_is_not_asked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("PIL")
    flag, tools = tmp_path / "flag", tmp_path / "tools"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {flag}\n", encoding="utf-8")
    (tools / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    for name in ("x.eps", "x.png", "x.tif", "x.ppm"):
        (tmp_path / name).write_bytes(page)
        assert run(capsys, tmp_path / name)[0] == (2 if name == "x.eps" else 1)
    assert not flag.exists()


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return Path.touch, (self.flag,)


@pytest.mark.parametrize(
    "said",
    [
        {"dtype": "|O", "filters": [{"id": "vlen-bytes"}], "compressor": {"id": "pickle"}},
        {"dtype": "|O", "filters": [{"id": "pickle", "protocol": 5}]},
        {"dtype": "<f8", "filters": [{"id": "pickle", "protocol": 5}]},
        {"dtype": "<f8", "compressor": {"id": "json2"}},
        {"dtype": [["a", "<f8"], ["b", "|O"]]},
        {"dtype": "<U3"},
        {"dtype": "<f8", "chunks": [1 << 40]},
        {"dtype": "<f8", "shape": [-1]},
        {"dtype": "<f8", "shape": [2**62], "chunks": [1000]},
        {"dtype": "<f8", "shape": "3"},
        {"dtype": "<f8", "chunks": [3, 3]},
    ],
    ids=str,
)
def test_zarr_is_opened_for_numbers_alone(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: dict[str, Any],
) -> None:
    zarr = pytest.importorskip("zarr")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("what is no array of numbers has been opened")

    for name in ("open", "open_array", "open_group"):
        monkeypatch.setattr(zarr, name, refuse)
    root, flag = tmp_path / "x.zarr", tmp_path / "flag"
    root.mkdir()
    (root / ".zarray").write_text(json.dumps(ZARR | said), encoding="utf-8")
    (root / "0").write_bytes(pickle.dumps(Bomb(flag)))
    status, out, err = run(capsys, root)
    assert (status, out) == (1, "")
    assert f"cannot read {root}: " in err
    assert "has been opened" not in err
    assert not flag.exists()


NUMCODECS: list[list[dict[str, Any]]] = [
    [{"id": "zlib"}],
    [{"id": "gzip"}],
    [{"id": "bz2"}],
    [{"id": "lzma"}],
    [{"id": "lz4"}],
    [{"id": "zstd"}],
    *([{"id": "blosc", "cname": name}] for name in ("lz4", "zstd", "zlib", "blosclz")),
    [{"id": "shuffle"}, {"id": "zlib"}],
    [{"id": "crc32"}, {"id": "zlib"}],
    [{"id": "delta", "dtype": "<i4"}, {"id": "bz2"}],
    [{"id": "astype", "encode_dtype": "<i8", "decode_dtype": "<i4"}, {"id": "zstd"}],
    [{"id": "fixedscaleoffset", "offset": 0, "scale": 1, "dtype": "<i4", "astype": "<i2"}],
    [{"id": "zlib"}, {"id": "fletcher32"}],
]


@pytest.mark.parametrize("codecs", NUMCODECS, ids=lambda c: " ".join(x["id"] for x in c))
@pytest.mark.parametrize("random", [False, True], ids=["alike", "random"])
def test_codecs_of_zarr(tmp_path: Path, codecs: list[dict[str, Any]], random: bool) -> None:
    """What can be packed, or not at all, by every codec that is read."""
    numcodecs = pytest.importorskip("numcodecs")
    pytest.importorskip("zarr")
    rng = np.random.default_rng(0)
    x = rng.integers(-9999, 9999 if random else -9998, (100, 300), "i4")
    chunk = x
    for codec in codecs:
        chunk = numcodecs.get_codec(codec).encode(chunk)
    said: dict[str, Any] = {"shape": [100, 300], "chunks": [100, 300], "dtype": "<i4"}
    last = codecs[-1] if codecs[-1]["id"] not in ("fletcher32", "fixedscaleoffset") else None
    filters = codecs[:-1] if last else codecs
    zarr_2(tmp_path / "x.zarr", b"", filters=filters or None, compressor=last, **said)
    (tmp_path / "x.zarr" / "a" / "0.0").write_bytes(bytes(chunk))
    assert_moments(of(tmp_path / "x.zarr", "zarr"), x, None)


@pytest.mark.parametrize("location", ["start", "end"])
@pytest.mark.parametrize("block", [64, parts.BLOCK])
def test_shards_of_zarr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, block: int
) -> None:
    """By single chunks and by whole shards."""
    zarr = pytest.importorskip("zarr")
    codec = zarr.codecs.ShardingCodec(chunk_shape=(5, 5), index_location=location)
    x = random("f4", (20, 20), 0)
    path = tmp_path / "x.zarr"
    zarr.create_array(
        path, shape=x.shape, chunks=(10, 20), dtype="f4", serializer=codec, compressors=None
    )[...] = x
    monkeypatch.setattr(arrays, "BLOCK", block)
    assert_moments(of(path, "zarr"), x, None)


def test_zarr_of_version_3_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    x = random("f4", (20, 20), 0)
    path = tmp_path / "x.zarr"
    zarr.create_array(path, data=x, chunks=(5, 5), shards=(10, 20))
    assert_moments(of(path, "zarr"), x, None)
    said = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    for change in (
        {"data_type": "string"},
        {"data_type": {"name": "numpy.void"}},
        {"codecs": [{"name": "vlen-utf8"}]},
        {"codecs": [{"name": "numcodecs.pickle"}]},
        {"chunk_grid": {"name": "other"}},
        {"codecs": None},
    ):
        (path / "zarr.json").write_text(json.dumps(said | change), encoding="utf-8")
        status, out, err = run(capsys, path)
        assert (status, out) == (1, "")
        assert f"cannot read {path}: " in err


def test_hdf5_stays_in_its_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(range(64)))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.arange(4.0)

    def written(name: str, write: Any) -> Path:
        with h5py.File(tmp_path / name, "w") as file:
            write(file)
        return tmp_path / name

    def virtual(file: Any) -> None:
        layout = h5py.VirtualLayout((4,), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (4,))
        file.create_virtual_dataset("x", layout)

    def link(file: Any) -> None:
        file["x"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "x")

    def link_beside(file: Any) -> None:
        link(file)
        file["y"] = np.arange(3.0)

    outside = [(str(secret), 0, 64)]
    for name, write, said in (
        ("a.h5", lambda f: f.create_dataset("x", (64,), "u1", external=outside), "not followed"),
        ("b.h5", virtual, "not followed"),
        ("c.h5", link, "links to other files are not followed: 'x'"),
        ("d.h5", link_beside, "links to other files are not followed: 'x'"),
        ("e.h5", lambda f: f.create_dataset("x", data=h5py.Empty("f4")), "it has no shape"),
        ("f.h5", lambda f: f.create_dataset("x", data=["a"]), "dtype object"),
        ("g.h5", lambda f: f.create_dataset("x", (2,), h5py.vlen_dtype("f4")), "dtype object"),
        ("h.h5", lambda f: f.create_dataset("x", (2**58,), "f8", chunks=(1000,)), "are stored"),
        ("i.h5", lambda f: f.create_dataset("x", (2**28,), "f8", chunks=(2**28,)), "its chunks"),
    ):
        status, out, err = run(capsys, written(name, write))
        assert (status > 0, out) == (True, ""), name
        assert said in err
    assert run(capsys, tmp_path / "d.h5", "--key", "y")[0] == 0


def virtual(file: Any, name: str, source: str, shape: tuple[int, ...] = (4,)) -> None:
    """Write a virtual HDF5 dataset, whose first four numbers are those of another in the file."""
    import h5py

    layout = h5py.VirtualLayout(shape, "f4")
    layout[:4] = h5py.VirtualSource(".", source, (4,))
    file.create_virtual_dataset(name, layout)


def virtual_of_itself(file: Any) -> None:
    virtual(file, "a", "a")


def virtual_in_a_circle(file: Any) -> None:
    virtual(file, "a", "b")
    virtual(file, "b", "a")


def virtual_giant(file: Any) -> None:
    file["b"] = np.arange(4, dtype="f4")
    virtual(file, "a", "b", (1 << 43,))


def groups_in_groups(file: Any) -> None:
    import h5py

    group = file.id
    for _ in range(20_000):
        group = h5py.h5g.create(group, b"g")
    h5py.Group(group)["a"] = np.arange(3.0)


def hdf5(write: Callable[[Any], None]) -> Callable[[Path], None]:
    def written(path: Path) -> None:
        with pytest.importorskip("h5py").File(path, "w", libver="latest") as file:
            write(file)

    return written


def zarr_3(path: Path, **said: Any) -> Path:
    """Write a Zarr array "a" of four floats, without a chunk; return where the chunk belongs."""
    by_default: dict[str, Any] = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [4],
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "attributes": {},
    }
    (path / "a").mkdir(parents=True)
    (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}', encoding="utf-8")
    (path / "a" / "zarr.json").write_text(json.dumps(by_default | said), encoding="utf-8")
    return path / "a" / "c" / "0"


def link_to_pipes(path: Path) -> None:
    chunk = zarr_3(path)
    pipes = path.parent / "pipes"
    pipes.mkdir()
    os.mkfifo(pipes / "0")
    chunk.parent.symlink_to(pipes)


def link_to_a_folder(path: Path) -> None:
    chunk = zarr_3(path)
    chunk.parent.symlink_to(path.parent / "elsewhere")
    (path.parent / "elsewhere").mkdir()
    (path.parent / "elsewhere" / "0").write_bytes(bytes(16))


def link_to_a_file(path: Path) -> None:
    chunk = zarr_3(path)
    (path.parent / "secret").write_bytes(bytes(16))
    chunk.parent.mkdir()
    chunk.symlink_to(path.parent / "secret")


def linked_metadata(path: Path) -> None:
    chunk = zarr_3(path / "there").parents[1]
    (path / "a").mkdir()
    (path / "a" / "zarr.json").symlink_to(chunk / "zarr.json")


def pipe_in_a_store(path: Path) -> None:
    chunk = zarr_3(path)
    chunk.parent.mkdir()
    os.mkfifo(chunk)


BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
MEGABYTES = {
    "shape": [1 << 20],
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1 << 20]}},
}


def sharded(chunk: int, *codecs: Any) -> dict[str, Any]:
    told = {"chunk_shape": [chunk], "codecs": codecs, "index_codecs": [BYTES]}
    return {"name": "sharding_indexed", "configuration": told}


def coded(*codecs: Any) -> Callable[[Path], None]:
    """Write a Zarr array that is said to be coded so."""

    def written(path: Path) -> None:
        chunk = zarr_3(path, codecs=codecs[0] if codecs[0] in (None, "bytes") else codecs)
        chunk.parent.mkdir()
        chunk.write_bytes(pickle.dumps(Bomb(path.parent / "unpickled")))

    return written


@functools.cache
def bomb(codec: str, times: int = 192) -> bytes:
    """Up to three megabytes that unpack to three gigabytes of zeros."""
    if codec == "blosc":  # as its header says
        packed = bytearray(pytest.importorskip("numcodecs").Blosc().encode(np.zeros(4, "f4")))
        packed[4:8] = struct.pack("<I", 2**31 - 64)
        return bytes(packed)
    if codec == "lz4":
        return struct.pack("<I", 2**31 - 64) + bytes(4)
    if codec == "zstd":  # of a size that it does not say: blocks of one byte, repeated 128 K times
        block = (1 << 1 | 1 << 17 << 3).to_bytes(3, "little") + b"\0"
        return b"\x28\xb5\x2f\xfd\0\x70" + block * (3 << 13) + b"\1\0\0"
    if codec == "zlib":  # only its checksum is wrong, which comes too late
        pack = zlib.compressobj()
        header = pack.compress(b"") + pack.flush(zlib.Z_FULL_FLUSH)
        return header + (pack.compress(bytes(1 << 24)) + pack.flush(zlib.Z_FULL_FLUSH)) * times
    pack_all: Any = {"bz2": bz2, "lzma": lzma, "gzip": gzip}[codec].compress
    return bytes(pack_all(bytes(1 << 24)) * 192)  # files in these formats may follow one another


def packed(codec: str) -> Callable[[Path], None]:
    def written(path: Path) -> None:
        name = f"numcodecs.{codec}" if codec in ("bz2", "lz4", "lzma", "zlib") else codec
        told = {"cname": "lz4", "clevel": 5, "shuffle": "noshuffle", "blocksize": 0, "typesize": 4}
        level = {"zstd": {"level": 0, "checksum": False}, "gzip": {"level": 5}, "blosc": told}
        codec_of = {"name": name, "configuration": level.get(codec, {})}
        chunk = zarr_3(path, codecs=[BYTES, codec_of], **MEGABYTES)
        chunk.parent.mkdir()
        chunk.write_bytes(bomb(codec))

    return written


def zarr_2(path: Path, chunk: bytes, **said: Any) -> None:
    (path / "a").mkdir(parents=True)
    (path / ".zgroup").write_text('{"zarr_format": 2}', encoding="utf-8")
    (path / "a" / ".zarray").write_text(json.dumps(ZARR | said), encoding="utf-8")
    (path / "a" / "0").write_bytes(chunk)


def packed_twice(path: Path) -> None:
    by_zlib = {"id": "zlib", "level": 1}
    zarr_2(path, zlib.compress(bomb("zlib")), compressor=by_zlib, filters=[by_zlib])


def long_texts(path: Path) -> None:
    to_text = {"id": "astype", "encode_dtype": "|u1", "decode_dtype": "<U100000000"}
    zarr_2(path, bytes(24), filters=[to_text])


def growing(path: Path) -> None:
    """Filters that make eight bytes of each, one after the other."""
    twice = {"id": "astype", "encode_dtype": "|u1", "decode_dtype": "<f8"}
    zarr_2(path, bytes(3000), filters=[twice] * 8)


def bomb_in_a_shard(path: Path) -> None:
    told = {"name": "numcodecs.zlib", "configuration": {"level": 1}}
    chunk = zarr_3(path, codecs=[sharded(1 << 19, BYTES, told)], **MEGABYTES)
    chunk.parent.mkdir()
    data = bomb("zlib", 96)
    chunk.write_bytes(data + struct.pack("<4Q", 0, len(data), 0, len(data)))


def shard_of_many(path: Path) -> None:
    grid = {"name": "regular", "configuration": {"chunk_shape": [1 << 30]}}
    zarr_3(path, codecs=[sharded(1, BYTES)], chunk_grid=grid, shape=[1 << 30])


def sparse_chunk(path: Path) -> None:
    chunk = zarr_3(path)
    chunk.parent.mkdir()
    with chunk.open("wb") as file:
        file.truncate(1 << 33)


def bomb_in_hdf5(file: Any) -> None:
    told: dict[str, Any] = {"chunks": (1 << 19,), "compression": "gzip"}
    dataset = file.create_dataset("a", (1 << 19,), "f4", **told)
    dataset.id.write_direct_chunk((0,), bomb("zlib", 96))


def same_bytes_often(file: Any) -> None:
    """Small chunks that are packed to more than they can be."""
    dataset = file.create_dataset("a", (64,), "f4", chunks=(64,), compression="gzip")
    dataset.id.write_direct_chunk((0,), bomb("zlib", 96))


def packed_by_another(file: Any) -> None:
    file.create_dataset("a", (64,), "i4", chunks=(64,), scaleoffset=3)


def small_chunks(file: Any) -> None:
    file.create_dataset("a", (1 << 33,), "u1", chunks=(1,))


def without_number(file: Any) -> None:
    file["a"] = np.zeros(1 << 21, "f4")
    file["a"].attrs["missing_value"] = np.arange(1, 4001).astype("f4")


def sparse_tiff(width: int, bands: int, bits: int, pages: int, tile: int = 0, sort: int = 0) -> Any:
    """Write pages without what is in their strip or tile."""

    def written(path: Path) -> None:
        data = bytearray(b"II*\0" + struct.pack("<I", 8))
        for i in range(pages):
            form = 3 if bits > 8 else 1
            tags = {256: width, 257: width, 258: bits, 259: 1, 262: 1, 277: bands, 284: 1}
            tags |= {273: 0, 278: width, 279: 0} if not tile else {}
            tags |= {322: tile, 323: tile, 324: 0, 325: 0} if tile else {}
            tags |= {254: sort, 339: form}
            after = len(data) + 2 + 12 * len(tags) + 4
            data += struct.pack("<H", len(tags))
            for tag, value in sorted(tags.items()):
                data += struct.pack("<HHII", tag, 4, 1, value)
            data += struct.pack("<I", after if i < pages - 1 else 0)
        path.write_bytes(data)

    return written


def long_header(path: Path) -> None:
    """Of three gigabytes, it says; packed."""
    start = b"\x93NUMPY\2\0" + struct.pack("<I", 3 << 30)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w", force_zip64=True) as file,
    ):
        file.write(start)
        for _ in range(16):
            file.write(bytes(1 << 24))


# Files of some kilobytes that would end the process, or take hours, or gigabytes: how they are
# written, and the reason why they are not read.
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "itself.h5": (hdf5(virtual_of_itself), "'a' is virtual"),
    "circle.h5": (hdf5(virtual_in_a_circle), "'a' is virtual"),
    "virtual.h5": (hdf5(virtual_giant), "'a' is virtual"),
    "groups.h5": (hdf5(groups_in_groups), "more than 100 groups one inside the other"),
    "bomb.h5": (hdf5(bomb_in_hdf5), "by zlib, and unpacks to more than 1,073,741,824 bytes"),
    "often.h5": (hdf5(same_bytes_often), "a chunk of it is packed to 1,566,247 bytes"),
    "other.h5": (hdf5(packed_by_another), "it is packed by filter 6 of HDF5"),
    "chunks.h5": (hdf5(small_chunks), "the rest is empty"),
    "none.h5": (hdf5(without_number), "4,000 numbers are none, more than 64"),
    "header.npz": (long_header, "EOF: reading array header, expected 3221225472 bytes got 65524"),
    "pages.tif": (sparse_tiff(13_000, 1, 64, 400), "the rest is empty"),
    "tiles.tif": (sparse_tiff(13_000, 1, 8, 1, 1 << 26), "the rest is empty"),
    "overviews.tif": (sparse_tiff(13_000, 1, 64, 400, sort=1), "the rest is empty"),
    "bands.tif": (sparse_tiff(13_000, 5000, 8, 1), "the rest is empty"),
    "pipes.zarr": (link_to_pipes, "'c' in it is a link, which is not followed"),
    "folder.zarr": (link_to_a_folder, "'c' in it is a link, which is not followed"),
    "file.zarr": (link_to_a_file, "'0' in it is a link, which is not followed"),
    "metadata.zarr": (linked_metadata, "'zarr.json' in it is a link, which is not followed"),
    "pipe.zarr": (pipe_in_a_store, "'0' in it is no file"),
    "nested.zarr": (
        coded(sharded(2, sharded(1, {"name": "numcodecs.pickle"}))),
        "shards in shards",
    ),
    "pickle.zarr": (
        coded(sharded(2, {"name": "numcodecs.pickle"})),
        "'pickle', which is not known",
    ),
    "index.zarr": (
        coded(sharded(2) | {"configuration": {"chunk_shape": [2]}}),
        "not that of an array",
    ),
    "word.zarr": (coded("bytes"), "'bytes' where codecs are expected"),
    "none.zarr": (coded(None), "None where codecs are expected"),
    "number.zarr": (coded(5), "5 where a codec is expected"),
    **{
        f"{codec}.zarr": (packed(codec), f"by {codec}, and unpacks to more than 4,259,840 bytes")
        for codec in ("blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd")
    },
    "twice.zarr": (packed_twice, "it is packed by zlib, and by 'zlib' after that"),
    "texts.zarr": (long_texts, "what 'astype' gives has dtype <U100000000"),
    "growing.zarr": (growing, "its filters make 1 bytes of 24"),
    "shard.zarr": (bomb_in_a_shard, "by zlib, and unpacks to more than 2,162,688 bytes"),
    "shards.zarr": (shard_of_many, "its shards have 1,073,741,824 chunks"),
    "sparse.zarr": (sparse_chunk, "'c/0' in it has 8,589,934,592 bytes"),
}
# The command, in a process that may have so many bytes more.
LIMITED = """
import resource, sys
from fastnorm.cli import main
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2)
sys.exit(main(["stats", *sys.argv[2:]]))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a process of little memory says of each of `HOSTILE`, and of a good file among them."""
    root = tmp_path_factory.mktemp("hostile")
    np.savez(root / "good.npz", a=np.arange(4.0))
    for name, (write, _) in HOSTILE.items():
        write(root / name)
    arguments = ["4_000_000_000", str(root), "--skip-bad", "--json", "--key", "a", "--workers", "1"]
    command = [sys.executable, "-c", LIMITED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["count"] == 4, done.stderr
    said = (line.partition(f"left out {root}{os.sep}")[2] for line in done.stderr.splitlines())
    return {name: reason for name, _, reason in (line.partition(": ") for line in said)}


@posix
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(refusals: dict[str, str], name: str) -> None:
    assert HOSTILE[name][1] in refusals[name]


def test_more_means_than_fit(tmp_path: Path) -> None:
    """A hundred million, of files of a kilobyte."""
    with pytest.importorskip("h5py").File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", (1, 10**8), "u1", chunks=(1, 1 << 20))
    with (tmp_path / "x.npy").open("wb") as file:
        said = {"descr": "<f4", "fortran_order": False, "shape": (0, 10**8)}
        np.lib.format.write_array_header_1_0(file, said)
    for name, kind in (("x.h5", "hdf5"), ("x.npy", "npy")):
        with pytest.raises(CannotRead, match="it has 100,000,000 means, more than 4,194,304"):
            of(tmp_path / name, kind, axis=(0,))


def test_a_column_of_large_chunks(tmp_path: Path) -> None:
    """To have the means of all columns, all chunks that are side by side are held."""
    with pytest.importorskip("h5py").File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", (1 << 20, 1 << 12), "u1", chunks=(1 << 20, 1))
    with pytest.raises(CannotRead, match="4,294,967,296 bytes of it are held at once"):
        of(tmp_path / "x.h5", "hdf5", axis=(0,))


def test_one_large_chunk_with_a_scale(tmp_path: Path) -> None:
    """Its numbers become doubles some megabytes at a time."""
    with pytest.importorskip("h5py").File(tmp_path / "x.h5", "w") as file:
        x = file.create_dataset("x", (1 << 26,), "u1", chunks=(1 << 26,), fillvalue=3)
        x.attrs.update({"scale_factor": 2.0, "_FillValue": np.uint8(7)})
    tracemalloc.start()
    total = of(tmp_path / "x.h5", "hdf5").total
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (total.count, total.mean) == (1 << 26, 6.0)
    assert peak < (1 << 26) + 24 * parts.BLOCK


@pytest.mark.parametrize("how", ["gzip", "shuffled gzip", "checked gzip", "lzf", "szip", "none"])
@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_packings_of_hdf5(tmp_path: Path, how: str, size: int) -> None:
    """Small chunks and large ones, of which one has not been written."""
    h5py = pytest.importorskip("h5py")
    name = how.split()[-1]
    packing = {"compression": None if name == "none" else name}
    packing |= {"shuffle": how == "shuffled gzip", "fletcher32": how == "checked gzip"}
    x = random("u2", (size * 2 + size // 2,), 0)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", x.shape, "u2", chunks=(size,), **packing)
        dataset[:size] = x[:size]
        dataset[2 * size :] = x[2 * size :]
    x[size : 2 * size] = 0
    total = of(tmp_path / "x.h5", "hdf5").total
    assert (total.count, total.mean) == (x.size, pytest.approx(x.mean(), rel=1e-12))


def test_archives_are_streamed(tmp_path: Path) -> None:
    """Forty megabytes in a file of forty thousand, in either order, take what blocks take."""
    x = np.zeros((20, 1000, 250))
    x[7, 8, 9] = 1.0
    np.savez_compressed(tmp_path / "c.npz", x)
    np.savez_compressed(tmp_path / "f.npz", np.asfortranarray(x))
    mean = x.mean((0, 1))
    del x
    for name, axis in (("c.npz", None), ("c.npz", (0, 1)), ("f.npz", None), ("f.npz", (0, 2))):
        tracemalloc.start()
        found = of(tmp_path / name, "npz", axis=axis)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3.5 * parts.BLOCK
        assert np.mean(found.total.mean) == pytest.approx(mean.mean(), rel=1e-13)


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of what is allocated, not of maps")
def test_a_small_archive_of_a_large_array(tmp_path: Path) -> None:
    """Of 400 megabytes, in a process that may have 300."""
    piece = np.zeros(1_000_000)
    header = io.BytesIO()
    said = {"descr": piece.dtype.str, "fortran_order": False, "shape": (50, piece.size)}
    np.lib.format.write_array_header_1_0(header, said)
    with (
        zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("x.npy", "w") as file,
    ):
        file.write(header.getvalue())
        for _ in range(50):
            file.write(piece.tobytes())
    assert (tmp_path / "x.npz").stat().st_size < 2_000_000
    run = run_python("-c", LIMITED, "300_000_000", str(tmp_path / "x.npz"), OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("said", [(1, 5), (3, 5), (10**12, 10**9), (0, -1)])
def test_headers_that_lie(tmp_path: Path, said: tuple[int, ...]) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 5)))
    data = (tmp_path / "x.npy").read_bytes()
    start, end = data.index(b"{"), data.index(b"\n")
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {said}, }}".encode()
    data = data[:start] + header.ljust(end - start) + data[end:]
    (tmp_path / "x.npy").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", data)
    for kind in ("npy", "npz"):
        if kind == "npy" and said == (1, 5):
            continue  # as NumPy, which takes what it needs
        with pytest.raises(CannotRead):
            of(tmp_path / f"x.{kind}", kind)


@posix
def test_sparse_giants(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((0, 5)))
    data = (tmp_path / "x.npy").read_bytes().replace(b"(0, 5), } ", b"(%d,),}" % 10**12)
    (tmp_path / "x.npy").write_bytes(data)
    for name, size in (("x.npy", 8 * 10**12 + 128), ("x.jpg", 1 << 42), ("x.tif", 1 << 42)):
        with (tmp_path / name).open("ab") as file:
            if not file.tell():
                file.write(b"\xff\xd8" if name == "x.jpg" else b"II*\0")
            try:
                file.truncate(size)
            except OSError:
                pytest.skip("this file system has no such files")
        with pytest.raises(CannotRead, match="are stored"):
            of(tmp_path / name, "npy" if name == "x.npy" else "image")


@pytest.mark.parametrize("where", ["end", "middle", "bomb", "sizes", "loop", "nodata"])
def test_broken_tiff(tmp_path: Path, where: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    x = random("u2", (64, 64), 0)
    path = tmp_path / "x.tif"
    tag = (42113, "s", 0, "many", True)
    how: dict[str, Any] = {"compression": "zlib"} if where in ("middle", "bomb") else {}
    extra = [tag] if where == "nodata" else []
    with tifffile.TiffWriter(path) as file:
        for _ in range(2):
            file.write(x, metadata=None, extratags=extra, **how)
    with tifffile.TiffFile(path) as file:
        page = file.pages[1]
        (start,), (count,) = page.dataoffsets, page.databytecounts
        tags = {name: page.tags[name].valueoffset for name in ("ImageLength", "StripByteCounts")}
    data = bytearray(path.read_bytes())
    if where == "end":
        data = data[:-100]
    elif where == "middle":
        data[start + count // 2 :] = bytes(len(data) - start - count // 2)
    elif where == "bomb":  # it unpacks to a hundred megabytes, of which 8 KB are looked at
        packed = zlib.compress(bytes(10**8), 9)
        data[start : start + len(packed)] = packed
        data[tags["StripByteCounts"] :][:4] = struct.pack("<I", len(packed))
        offset = tags["StripByteCounts"]
        data[offset : offset + 4] = struct.pack("<I", len(packed))
    elif where == "sizes":
        offset = tags["ImageLength"]
        data[offset : offset + 2] = struct.pack("<H", 60000)
    elif where == "loop":
        data[4:8], first = data[4:8], struct.unpack("<I", data[4:8])[0]
        entries = struct.unpack("<H", data[first : first + 2])[0]
        behind = first + 2 + 12 * entries
        data[behind : behind + 4] = struct.pack("<I", first)
    path.write_bytes(data)
    tracemalloc.start()
    if where == "bomb":
        assert of(path).total.count == 2 * 64 * 64
    else:
        with pytest.raises(CannotRead):
            of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * parts.BLOCK


def test_large_images(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to --max-pixels, piece by piece, and without a warning of Pillow's."""
    Image = pytest.importorskip("PIL.Image")
    tifffile = pytest.importorskip("tifffile")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    x = random("u1", (40, 60, 3), 0)
    Image.fromarray(x).save(tmp_path / "x.png")
    tifffile.imwrite(tmp_path / "x.tif", x, tile=(16, 16))
    for name in ("x.png", "x.tif"):
        status, out, err = run(capsys, tmp_path / name, "--max-pixels", 2399)
        assert (status, out) == (1, "")
        assert "60 x 40 = 2,400 pixels, more than 2,399; write --max-pixels 2400" in err
        assert_moments(of(tmp_path / name), x, (0, 1))
    assert Image.MAX_IMAGE_PIXELS == 1000
    assert parts.MAX_PIXELS == 178_956_970
    large = np.broadcast_to(np.arange(256, dtype=np.uint8), (4000, 40, 256)).reshape(4000, -1)
    tifffile.imwrite(tmp_path / "l.tif", large, tile=(512, 512), compression="zlib")
    expected = large.mean(), large.var()
    del large
    tracemalloc.start()
    total = of(tmp_path / "l.tif").total
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3.5 * parts.BLOCK, "41 MB are not held at once"
    assert (total.mean[0], total.var()[0]) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=150)
@given(st.data())
def test_files_with_any_bytes_changed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever stands in a file: an answer or a refusal, soon."""
    root = tmp_path_factory.getbasetemp() / "fuzzed"
    if not root.exists():
        root.mkdir()
        x = random("u1", (40, 30, 3), 0)
        Image = pytest.importorskip("PIL.Image")
        tifffile = pytest.importorskip("tifffile")
        for suffix in ("png", "jpg", "gif", "webp", "bmp", "ppm", "jp2"):
            Image.fromarray(x).save(root / f"0.{suffix}")
        tifffile.imwrite(root / "0.tif", x, tile=(16, 16), compression="zlib")
        np.save(root / "0.npy", x)
        np.savez_compressed(root / "0.npz", x)
    source = data.draw(st.sampled_from(sorted(root.glob("0.*"))))
    content = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content), 600) - 1))
        content[at] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.none() | st.integers(0, len(content)))]
    path = root / f"1{source.suffix}"
    path.write_bytes(content)
    kind = source.suffix[1:] if source.suffix in (".npy", ".npz") else "image"
    found, complete = stats.collect([(path, kind)], Options(max_pixels=10**6), skip_bad=True)
    assert complete
    assert bool(found.moments) != bool(found.bad)
