"""Writers that are handed views: what is written is what the view shows, not the memory under it.

safetensors' own ``numpy.save`` (0.8.0) writes the memory: a transposed or sliced array comes back with other values.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load as load_safetensors
from safetensors.torch import load_file
from torch import Tensor

from megatron_slim.checkpoint.convert import open_checkpoint, same_bytes
from megatron_slim.checkpoint.huggingface_writer import specs_of, write_hf_checkpoint
from megatron_slim.checkpoint.torch_dist_files import PieceWriter
from megatron_slim.pruning.statistics import FORMAT, Statistics
from megatron_slim.testing import random_tensors, tiny_hf_config, tiny_shape

CONTENT = np.arange(48, dtype=np.float32).reshape(6, 8)
ARRAYS = {
    "transposed": CONTENT.T,
    "columns": CONTENT[:, 2:5],
    "every other row": CONTENT[::2],
    "backwards": CONTENT[::-1, ::-1],
    "repeated": np.broadcast_to(CONTENT[1], (6, 8)),
    "column order": np.asfortranarray(CONTENT),
    "other byte order": CONTENT.astype(">f4"),
    "read-only": np.frombuffer(CONTENT.tobytes(), np.float32).reshape(6, 8),
    "a number": CONTENT[2, 3],
    "nothing": CONTENT[:0],
    "further on": CONTENT.reshape(-1)[5:9],
}
TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda tensor: tensor.t().contiguous().t(),
    "a slice of something larger": lambda tensor: torch.nn.functional.pad(tensor, (3, 2, 1, 0))[1:, 3:-2],
    "every other row": lambda tensor: tensor.repeat_interleave(2, 0)[::2],
    "of numpy's, in column order": lambda tensor: torch.from_numpy(np.asfortranarray(tensor.numpy())),
}


def test_statistics() -> None:
    names = {f"{number} {name}": array for number, (name, array) in enumerate(ARRAYS.items())}
    written = load_safetensors(Statistics(names, {"format": FORMAT})._serialized)
    assert written.keys() == names.keys()
    for name, array in names.items():
        assert written[name].shape == array.shape, name
        np.testing.assert_array_equal(written[name], array, err_msg=name)


@pytest.mark.parametrize("view", TENSORS)
def test_checkpoints(view: str, tmp_path: Path) -> None:
    """Of Hugging Face's format as safetensors itself reads it, of torch_dist as torch does."""
    shape = tiny_shape(num_layers=4)
    tensors = random_tensors(shape, dtype=torch.float32)
    views = {name: TENSORS[view](tensor) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    assert sum(not tensor.is_contiguous() for tensor in views.values()) > 20
    write_hf_checkpoint(tmp_path, tiny_hf_config(shape), specs_of(shape, torch.float32), views.items())
    written, ours = load_file(tmp_path / "model.safetensors"), open_checkpoint(tmp_path)
    assert written.keys() == tensors.keys()
    assert all(same_bytes(written[name], tensor) for name, tensor in tensors.items())
    assert all(same_bytes(ours.read(name), tensor) for name, tensor in tensors.items())
    writer, name = PieceWriter(tmp_path), "model.embed_tokens.weight"
    piece = writer.add("key", tuple(tensors[name].shape), (0, 0), views[name])
    writer.close()
    (tmp_path / "piece").write_bytes(piece.file.read_bytes()[piece.position : piece.position + piece.length])
    assert same_bytes(torch.load(tmp_path / "piece", weights_only=True), tensors[name])
