"""``fastnorm stats``: what it reads, what it prints, and what becomes of files that are broken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import cli, stats
from fastnorm._files import arrays, report
from fastnorm._files.histogram import Histogram
from fastnorm._files.parts import Options, Part

from .helpers import PATIENCE, Array
from .test_cli import Terminal, png_size

SIDE = 48


@pytest.fixture(scope="module")
def photographs() -> list[Array]:
    """Thirty cuts of the photographs that come with scikit-learn."""
    pytest.importorskip("PIL")
    load_sample_image = pytest.importorskip("sklearn.datasets").load_sample_image
    rng = np.random.default_rng(0)
    cuts = []
    for i in range(30):
        photograph = load_sample_image(("china.jpg", "flower.jpg")[i % 2])
        top, left = (int(rng.integers(0, n - SIDE)) for n in photograph.shape[:2])
        cuts.append(photograph[top : top + SIDE, left : left + SIDE + i])  # of different widths
    return cuts


@pytest.fixture(scope="module")
def folder(photographs: list[Array], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of JPEG and PNG files, and a text that is none."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    for i, cut in enumerate(photographs):
        path = root / ("cats" if i < 12 else "dogs/young") / f"{i:02}.{('jpg', 'png')[i % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(cut).save(path)
    (root / "cats" / "notes.txt").write_text("no image", encoding="utf-8")
    return root


def pixels(path: Path) -> Array:
    """All pixels of a folder, in float64: a plain loop."""
    from PIL import Image

    files = sorted(p for p in path.rglob("*") if p.suffix in (".jpg", ".png"))
    return np.concatenate([np.asarray(Image.open(p)).reshape(-1, 3) for p in files]).astype(float)


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = cli.main(["stats", *map(str, arguments)])
    return status, *capsys.readouterr()


def in_json(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    status, out, _ = run(capsys, *arguments, "--json")
    assert status == 0
    found: dict[str, Any] = json.loads(out)
    return found


# --- Images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_images(capsys: pytest.CaptureFixture[str], folder: Path, workers: int) -> None:
    exact = pixels(folder)
    found = in_json(capsys, folder, "--scale", 255, "--workers", workers, "--by", "folder")
    np.testing.assert_allclose(found["mean"], exact.mean(0) / 255, rtol=1e-9)
    np.testing.assert_allclose(found["std"], exact.std(0) / 255, rtol=1e-9)
    assert found["count"] == [len(exact)] * 3
    assert (found["images"], found["complete"], found["left out"]) == (30, True, [])
    cats, young = found["folders"].values()
    assert list(found["folders"]) == [str(folder / "cats"), str(folder / "dogs" / "young")]
    np.testing.assert_allclose(cats["mean"], pixels(folder / "cats").mean(0) / 255, rtol=1e-12)
    np.testing.assert_allclose(young["std"], pixels(folder / "dogs").std(0) / 255, rtol=1e-12)
    # as it came, to the last bit, whatever the number of workers
    moments = fn.Moments.from_dict(found["moments"])
    tasks = stats.tasks_of([Part(str(p), k) for p, k in stats.files_of([folder])[0].found])
    alone = sum((stats.work(t, Options()).total for t in tasks), fn.Moments())
    if workers == 1:
        np.testing.assert_equal(report.summary(moments, 1), report.summary(alone, 1))
    np.testing.assert_allclose(moments.var(), alone.var(), rtol=1e-14)


def test_the_table(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    status, out, err = run(capsys, folder / "cats")
    assert (status, err) == (0, "")
    exact = pixels(folder / "cats")
    lines = out.splitlines()
    assert lines[0].split() == ["channel", "count", "mean", "std"]
    for channel, line in enumerate(lines[1:4]):
        number, count, mean, std = line.split()
        assert (number, count) == (str(channel), f"{len(exact):,}")
        assert float(mean) == pytest.approx(exact[:, channel].mean(), rel=1e-8)
        assert float(std) == pytest.approx(exact[:, channel].std(), rel=1e-8)
    assert lines[4] == ""
    normalize: dict[str, Any] = {}
    eval(lines[5], {"Normalize": lambda **given: normalize.update(given)})
    np.testing.assert_allclose(normalize["mean"], exact.mean(0), rtol=1e-5)
    np.testing.assert_allclose(normalize["std"], exact.std(0), rtol=1e-5)
    status, out, _ = run(capsys, folder, "--by", "folder")
    names = [line.split()[0] for line in out.splitlines()[:-2]]
    assert names == [
        "folder",
        *[str(folder / "cats")] * 3,
        *[str(folder / "dogs/young")] * 3,
        *["all"] * 3,
    ]


def test_modes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
    colours.save(tmp_path / "a.png")
    assert len(in_json(capsys, tmp_path)["mean"]) == 3
    colours.convert("L").save(tmp_path / "b.png")
    status, out, err = run(capsys, tmp_path)
    assert (status, out) == (1, "")
    assert "b.png: it has 1 channels, and " in err
    assert "--mode RGB" in err
    assert in_json(capsys, tmp_path, "--mode", "RGB")["count"] == [1200] * 3
    for mode, channels in (("P", 3), ("1", 1), ("RGBA", 4), ("I;16", 1)):
        path = tmp_path / mode.replace(";", "") / "c.png"
        path.parent.mkdir()
        image = colours.convert("I;16" if mode == "I;16" else mode)
        image.save(path)
        right = image.convert({"P": "RGB", "1": "L"}.get(mode, mode))
        exact = np.asarray(right).reshape(600, -1).astype(float)
        found = in_json(capsys, path)
        assert len(found["mean"]) == channels
        np.testing.assert_allclose(found["mean"], exact.mean(0), rtol=1e-12)


# --- Files that cannot be read --------------------------------------------------------------------


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A folder of which one file is cut off, and one is nothing at all."""
    for path in sorted((folder / "cats").glob("*.jpg")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    cut = tmp_path / "04.jpg"
    cut.write_bytes(cut.read_bytes()[:700])
    (tmp_path / "00.jpg").write_bytes(b"nothing")
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_files(capsys: pytest.CaptureFixture[str], broken: Path, workers: int) -> None:
    status, out, err = run(capsys, broken, "--workers", workers)
    assert (status, out) == (1, "")
    assert f"cannot read {broken / '00.jpg'}: " in err
    assert "--skip-bad" in err
    status, out, err = run(capsys, broken, "--skip-bad", "--json", "--workers", workers)
    assert status == 0
    found = json.loads(out)
    assert [Path(bad["path"]).name for bad in found["left out"]] == ["00.jpg", "04.jpg"]
    assert err.count("left out") == 2
    (broken / "00.jpg").unlink()
    (broken / "04.jpg").unlink()
    np.testing.assert_allclose(found["mean"], pixels(broken).mean(0), rtol=1e-12)


def test_nothing_but_bad_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    (tmp_path / "a.png").write_bytes(b"")
    status, out, err = run(capsys, tmp_path, "--skip-bad")
    assert (status, out) == (1, "")
    assert "nothing could be read" in err


# --- Arrays ---------------------------------------------------------------------------------------


def array(dtype: str = "f4") -> Array:
    return np.random.default_rng(0).normal(100, 20, (50, 4, 6, 6)).astype(dtype)


def saved(x: Array, kind: str, folder: Path) -> Path:
    path = folder / f"data.{kind}"
    if kind == "npy":
        np.save(path, x)
    elif kind == "npz":
        np.savez_compressed(path, x)
    elif kind == "zarr":
        pytest.importorskip("zarr").create_array(path, data=x, chunks=(7, 4, 6, 6))
    else:
        with pytest.importorskip("h5py").File(path, "w") as file:
            file.create_dataset("group/numbers", data=x, chunks=(9, 2, 6, 6))
    return path


@pytest.mark.parametrize("kind", ["npy", "npz", "zarr", "h5"])
@pytest.mark.parametrize("dtype", ["f4", "u1", "f8"])
def test_arrays(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    dtype: str,
) -> None:
    x = array(dtype)
    path = saved(x, kind, tmp_path)
    monkeypatch.setattr(arrays, "BLOCK", x.nbytes // 6)  # several blocks
    for axis in (None, (0, 2, 3), (1,), (-1, 0)):
        given = [] if axis is None else [f"--axis={','.join(map(str, axis))}"]
        found = in_json(capsys, path, *given)
        exact = x.astype(float)
        np.testing.assert_allclose(found["mean"], exact.mean(axis), rtol=1e-12)
        np.testing.assert_allclose(found["var"], exact.var(axis), rtol=1e-12)
        # a member of an .npz is read whole, and so is a chunk
        whole = kind == "npz" or (kind == "zarr" and axis == (1,))
        assert (found["blocks"] == 1) == whole


def test_blocks_are_whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    chunked = arrays.Stored((800, 3, 100), np.dtype("f4"), (64, 3, 50))
    assert arrays._cuts(chunked, (0, 1, 2)) == ((800, 800), (3, 3), (100, 100))
    monkeypatch.setattr(arrays, "BLOCK", 160 * 3 * 100 * 4)
    cuts = arrays._cuts(chunked, (0, 2))
    blocks = [part.index for part in arrays.Source("x", "zarr", cuts=cuts).parts()]
    assert [b[0].start for b in blocks] == list(range(0, 800, 128))
    assert all(b[1:] == (slice(0, 3), slice(0, 100)) for b in blocks)


def test_several_arrays_in_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "two.npz"
    np.savez(path, a=np.arange(5.0), b=np.arange(6.0))
    status, _, err = run(capsys, path)
    assert status == 2
    assert "--key with one of 'a', 'b'" in err
    status, _, err = run(capsys, path, "--key", "c")
    assert status == 2
    assert "no array 'c', but 'a', 'b'" in err
    assert in_json(capsys, path, "--key", "b")["mean"] == 2.5


def test_pickled_objects_are_not_loaded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flag = tmp_path / "flag"

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (flag,)

    x = np.array([Bomb(), None], object)
    np.save(tmp_path / "a.npy", x, allow_pickle=True)
    np.savez(tmp_path / "b.npz", x)
    for name in ("a.npy", "b.npz"):
        status, out, err = run(capsys, tmp_path / name)
        assert (status, out) == (1, "")
        assert f"cannot read {tmp_path / name}: " in err
    assert not flag.exists()


def test_other_numbers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(3, complex))
    status, _, err = run(capsys, tmp_path / "x.npy")
    assert status == 1
    assert "complex128" in err


# --- What cannot be used --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere"], "there is no file or folder 'nowhere'"),
        (["empty"], "there are no images or arrays in 'empty'"),
        (["text.txt"], "'text.txt' is of no known kind"),
        (["x.npy", "--axis", "0,4"], "axis=(0, 4)"),
        (["x.png", "--axis", "0,4"], "axis=(0, 4)"),
        (["x.npy", "--scheduler", "tcp://127.0.0.1:1"], "no Dask scheduler answers"),
    ],
)
def test_unusable_paths(
    arguments: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "--scheduler" in arguments:
        pytest.importorskip("distributed")
        monkeypatch.setattr(stats, "PATIENCE", "1s")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").touch()
    np.save("x.npy", np.zeros((2, 3)))
    (tmp_path / "x.png").touch()
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert complaint in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["x", "--scale", "0"],
        ["x", "--axis", "a"],
        ["x", "--axis", "1,1"],
        ["x", "--workers", "0"],
        ["x", "--workers", "99999999999999999999"],
        ["x", "--plot", "p.txt"],
        ["x", "--plot", "p"],
        ["x", "--mode", "BGR"],
        ["x", "--nodata", "none"],
        ["x", "--max-pixels", "0"],
        ["x", "--by", "year"],
    ],
    ids=str,
)
def test_unusable_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["stats", *arguments])
    assert stopped.value.code == 2


def test_missing_library(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert run(capsys, folder) == (
        2,
        "",
        "fastnorm: this needs pillow: install with pip install 'fastnorm-kernels[stats]'\n",
    )


def test_a_file_that_is_cut_while_it_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of a mapped file the process would die."""
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((3, 1 << 21)))
    seen = arrays.check_numeric

    def cut(*arguments: Any) -> Any:
        os.truncate(path, 4096)
        return seen(*arguments)

    monkeypatch.setattr(arrays, "check_numeric", cut)
    status, out, err = run(capsys, path)
    assert (status, out) == (1, "")
    assert "it is cut short" in err


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_parts_of_an_npy(
    order: Any, axis: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "STRETCH", 100)  # in many pieces
    x = np.asarray(np.arange(210.0).reshape(6, 5, 7), order=order)
    np.save(tmp_path / "x.npy", x)
    file = arrays._Npy(str(tmp_path / "x.npy"))
    for index in (
        (slice(0, 6), slice(0, 5), slice(0, 7)),
        (slice(2, 4), slice(1, 5), slice(3, 4)),
        (slice(5, 6), slice(0, 5), slice(0, 1)),
    ):
        (part,) = file.read("", index, () if axis is None else (axis,))
        np.testing.assert_array_equal(part, x[index])


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    for i in range(40):
        np.save(tmp_path / f"{i}.npy", np.zeros(1 << 21))
    program = [sys.executable, "-m", "fastnorm", "stats", str(tmp_path), "--workers", "2"]
    # what a worker keeps open is at its end when it is
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        time.sleep(1.0)
        process.kill()
        process.communicate(timeout=PATIENCE)


def test_a_worker_that_dies(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "_ignore_interrupts", os.abort)  # what each worker begins with
    status, out, err = run(capsys, folder, "--workers", 2)
    assert (status, out) == (2, "")
    assert "one of the 2 processes ended" in err


# --- Progress, interrupts, pictures ---------------------------------------------------------------


def test_progress_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tqdm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run(capsys, folder)[0] == 0
    assert "image/s" in terminal.getvalue() or "?image" in terminal.getvalue()
    assert "30" in terminal.getvalue()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Processes started meanwhile take Ctrl-C, which a shell has those behind its `&` ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Ctrl-C is sent to a process group")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_prints_what_was_done(tmp_path: Path, workers: int) -> None:
    """So many files that no machine is done with them before the interrupt; some it is."""
    pytest.importorskip("PIL")
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.png")
    files = 20_000
    for i in range(1, files):
        os.link(tmp_path / "0.png", tmp_path / f"{i}.png")
    command = [sys.executable, "-m", "fastnorm", "stats", str(tmp_path), "--json"]
    environment = os.environ | {"FASTNORM_NUM_THREADS": "1"}
    for wait in (2.0, 6.0, 18.0):  # a busy machine may not have begun yet
        process = subprocess.Popen(
            [*command, "--workers", str(workers)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
        out, err = process.communicate(timeout=PATIENCE)
        if out:
            break
    assert process.returncode == 130, err
    found = json.loads(out)
    assert f"interrupted: these are the statistics of {found['images']} of {files} images" in err
    assert "Traceback" not in err
    assert not found["complete"]
    assert 0 < found["images"] < files
    np.testing.assert_allclose(found["mean"], noise.reshape(-1, 3).mean(0), rtol=1e-12)


def test_plot(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "histogram.png"
    status, _, err = run(capsys, folder, "--scale", 255, "--plot", picture, "--workers", 2)
    assert (status, err) == (0, "")
    assert png_size(picture) == (960, 540)
    assert run(capsys, folder, "--plot", tmp_path / "a.svg")[0] == 0
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "?"])
def test_histograms_merge(dtype: str) -> None:
    rng = np.random.default_rng(0)
    parts = [(rng.normal(20 * i, 1.0 + i, (40, 3)) % 120).astype(dtype) for i in range(6)]
    merged = Histogram()
    for part in parts:
        merged = merged.merge(Histogram.of(part, (0,)))
    whole = np.concatenate(parts).astype(float)
    assert merged.counts.sum() == whole.size
    assert merged.counts.shape[1] <= 2 * Histogram.MOST
    for channel in range(3):
        counts, _ = np.histogram(whole[:, channel], merged.edges)
        # NumPy's last bin holds its upper edge, too, which is in no bin here
        np.testing.assert_array_equal(merged.counts[channel], counts)
    if dtype == "u1":
        assert merged.exponent == 0


def test_histogram_of_odd_numbers() -> None:
    found = Histogram.of(np.array([[np.nan, np.inf]]), (0, 1))
    assert found.counts.sum() == 0
    same = Histogram.of(np.full(7, 3.25), (0,))
    assert found.merge(same) is same
    assert (same.counts.sum(), same.edges[0]) == (7, 3.25)


# --- A cluster ------------------------------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[str]:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
    ) as made:
        yield made.scheduler_address


def test_a_dask_cluster_does_the_work(
    capsys: pytest.CaptureFixture[str], folder: Path, cluster: str
) -> None:
    assert in_json(capsys, folder, "--scheduler", cluster) == in_json(capsys, folder)
