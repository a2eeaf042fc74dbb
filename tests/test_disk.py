"""Files of tensors: what comes back, how little is read, and what bad files and full disks get."""

import errno
import os
from pathlib import Path

import pytest
import torch
from files import failing_write, flip, resident
from safetensors.torch import load_file

from fisedit import errors
from fisedit.runtime.cache import disk

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool, torch.float64, torch.uint8]


def random(shape, dtype):
    return torch.randint(0, 2, shape).bool() if dtype == torch.bool else torch.randn(shape).mul(50).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_come_back_bit_for_bit(tmp_path, dtype):
    tensors = {"map": random((2, 3, 5), dtype), "scalar": random((), dtype), "empty": random((0, 4), dtype)}
    path = tmp_path / "x.safetensors"
    checksum = disk.write_tensors(path, tensors)
    for back in (disk.open_tensors(path, checksum), load_file(path)):  # the second: safetensors' own reader
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert back[name].dtype == dtype and back[name].shape == tensor.shape
            assert torch.equal(back[name], tensor)
    assert checksum == disk.checksum_of(path) and len(checksum) == 8


def test_views_of_one_storage_and_of_odd_layouts(tmp_path):
    storage = torch.arange(4000.0)
    maps = storage[:960].view(2, 3, 160).unflatten(2, (10, 16)).to(memory_format=torch.channels_last)
    tensors = {
        "first": storage[:100].view(10, 10), "second": storage[100:200], "every other": storage[200:400:2],
        "transposed": storage[400:460].view(6, 10).t(), "channels last": maps, "sample": maps[1:],
        "expanded": storage[7:8].expand(3, 4), "needs grad": torch.ones(3, requires_grad=True),
    }  # fmt: skip
    path = tmp_path / "x.safetensors"
    back = disk.open_tensors(path, disk.write_tensors(path, tensors, {"made by": "a test"}))
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert back["channels last"].is_contiguous(memory_format=torch.channels_last)
    assert back["transposed"].stride() == (1, 10) and not back["needs grad"].requires_grad
    assert path.stat().st_size < 3 * storage.nbytes  # views, not the storage for each


def test_tensors_are_aligned_as_pytorch_aligns_them(tmp_path):
    tensors = {f"odd {n}": torch.ones(n, dtype=torch.int8) for n in (1, 3, 7)}
    tensors |= {"even": torch.ones(64), "long": torch.ones(5, dtype=torch.int64), "large": torch.ones(16, 1024)}
    path = tmp_path / "x.safetensors"
    disk.write_tensors(path, tensors)
    back = disk.open_tensors(path)
    assert all(back[name].data_ptr() % disk.ALIGNMENT == 0 for name in ("even", "large"))
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says what of a mapping is resident")
def test_reading_some_rows_does_not_read_all(tmp_path):
    path = tmp_path / "x.safetensors"
    value = torch.randn(64, 2**18)  # 64 MiB
    disk.write_tensors(path, {"rows": value})
    back = disk.open_tensors(path)["rows"]
    assert resident(path) == 0
    assert torch.equal(back[40, :100].clone(), value[40, :100])
    assert resident(path) < 2**23
    assert torch.equal(back, value) and resident(path) >= value.nbytes


def test_writes_to_a_mapped_tensor_stay_in_memory(tmp_path):
    path = tmp_path / "x.safetensors"
    checksum = disk.write_tensors(path, {"a": torch.zeros(9)})
    disk.open_tensors(path)["a"].add_(1)
    assert disk.checksum_of(path) == checksum


def test_a_file_that_is_replaced_or_removed_stays_readable_where_it_is_mapped(tmp_path):
    path = tmp_path / "x.safetensors"
    disk.write_tensors(path, {"a": torch.zeros(5000)})
    old = disk.open_tensors(path)["a"]
    disk.write_tensors(path, {"a": torch.ones(3000)})
    assert torch.equal(disk.open_tensors(path)["a"], torch.ones(3000))
    path.unlink()
    assert torch.equal(old, torch.zeros(5000))


@pytest.mark.parametrize("place", [0, 20, -1, 500], ids=["length", "header", "last", "middle"])
def test_a_flipped_byte_is_told(tmp_path, place):
    path = tmp_path / "x.safetensors"
    checksum = disk.write_tensors(path, {"a": torch.randn(400)})
    flip(path, place)
    with pytest.raises(errors.CacheReadError, match=r"x\.safetensors.*its checksum is [0-9a-f]{8}, not " + checksum):
        disk.open_tensors(path, checksum)


@pytest.mark.parametrize("size", [0, 5, 60, 500], ids=lambda size: f"{size} bytes")
def test_a_file_cut_short_is_told_without_a_checksum(tmp_path, size):
    path = tmp_path / "x.safetensors"
    disk.write_tensors(path, {"a": torch.randn(400)})
    os.truncate(path, size)
    with pytest.raises(errors.CacheReadError, match=r"x\.safetensors.*cut short, or no safetensors file"):
        disk.open_tensors(path)


def test_what_is_no_safetensors_file_is_told(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(errors.CacheReadError, match="it is missing"):
        disk.open_tensors(path)
    with pytest.raises(errors.CacheReadError, match="it is missing"):
        disk.open_tensors(path, "00000000")
    with pytest.raises(errors.CacheReadError, match=str(tmp_path)):
        disk.open_tensors(tmp_path, "00000000")
    with pytest.raises(errors.CacheReadError, match=str(tmp_path)):
        disk.open_tensors(tmp_path)
    path.write_text("no tensors, but some words")
    with pytest.raises(errors.CacheReadError, match="no safetensors file"):
        disk.open_tensors(path)
    disk.write_tensors(path, {"a": torch.ones(3, 4)}, {disk.ORDERS: '{"a": [0, 0]}'})
    with pytest.raises(errors.CacheReadError, match="no safetensors file"):
        disk.open_tensors(path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
def test_a_disk_that_fails_leaves_what_was_there(tmp_path, monkeypatch, number):
    path = tmp_path / "x.safetensors"
    checksum = disk.write_tensors(path, {"a": torch.zeros(10)})
    failing_write(monkeypatch, 2000, number)
    with pytest.raises(errors.CacheWriteError, match=rf"x\.safetensors' cannot be written: {os.strerror(number)}"):
        disk.write_tensors(path, {"a": torch.ones(10_000)})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert torch.equal(disk.open_tensors(path, checksum)["a"], torch.zeros(10))


def test_a_system_that_writes_piece_by_piece(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    path = tmp_path / "x.safetensors"
    checksum = disk.write_tensors(path, {"a": torch.arange(50)})
    assert torch.equal(disk.open_tensors(path, checksum)["a"], torch.arange(50))


@pytest.mark.parametrize("where", ["missing/x.safetensors", "file/x.safetensors"])
def test_a_folder_that_is_none_is_told(tmp_path, where):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(errors.CacheWriteError, match=where):
        disk.write_tensors(tmp_path / where, {"a": torch.ones(3)})
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_of_another_kind_leaves_no_file_either(tmp_path):
    with pytest.raises(TypeError, match="a is torch.complex64"):
        disk.write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3, dtype=torch.complex64)})

    def pieces():
        yield b"some"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disk.write_file(tmp_path / "x", pieces())
    assert os.listdir(tmp_path) == []
