"""IBM's HElayers (tile tensors) on SEAL. Free for non-commercial use alone: never a dependency.

A batch of one, its own layout search. Precision: the fastest setting that fits
N = 8192 and still gives the logits: 39 + 10 bits for two layers, 25 + 8 for three,
and for four, which want N = 16384.
It flattens channels last, so that the columns after a convolution are put in that order.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.protocol import Floats, Rival, Task, serve


class Helayers(Rival):
    def __init__(self, task: Task) -> None:
        self._hl: Any = importlib.import_module("pyhelayers")
        hl = self._hl
        fractional, integer = (39, 10) if len(task.parts) <= 2 else (25, 8)
        conv = task.parts[0].stride > 0
        self._shape = (1, 1, task.parts[0].side, task.parts[0].side) if conv else (1, task.inputs.shape[1])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.onnx"
            write_onnx(task, path, self._shape)
            plain = hl.PlainModel.create(hl.PlainModelHyperParams(), [str(path)])
        wanted = hl.HeRunRequirements()
        wanted.set_he_context_options([hl.SealCkksContext()])
        wanted.set_model_encrypted(False)
        wanted.optimize_for_batch_size(1)
        slots = 4096 if len(task.parts) <= 3 else 8192
        wanted.set_fixed_num_slots(slots)
        wanted.set_fractional_part_precision(fractional, False)
        wanted.set_integer_part_precision(integer)
        profile = hl.HeModel.compile(plain, wanted)
        if profile is None:
            raise RuntimeError("no layout meets the requirements")
        self._context = hl.HeModel.create_context(profile)
        self._model = plain.get_empty_he_model(self._context)
        self._model.encode(plain, profile)
        self._codec = self._model.create_model_io_encoder()
        self.system = f"pyhelayers {hl.VERSION}"
        self.note = f"N = {2 * slots}, {fractional} + {integer} bits; ciphertexts already parsed"
        sent = self.encrypt(task.inputs[0])
        self.uplink_bytes = len(sent.save_to_buffer())
        self.reply_bytes = len(self.evaluate(sent).save_to_buffer())
        self.key_bytes = len(self._context.save_to_buffer())

    def encrypt(self, x: Floats) -> Any:
        sent = self._hl.EncryptedData(self._context)
        self._codec.encode_encrypt(sent, [x.reshape(self._shape)])
        return sent

    def evaluate(self, encrypted: Any) -> Any:
        reply = self._hl.EncryptedData(self._context)
        self._model.predict(reply, encrypted)
        return reply

    def decrypt(self, reply: Any) -> Floats:
        return np.asarray(self._codec.decrypt_decode_output(reply), np.float64).ravel()


def write_onnx(task: Task, path: Path, shape: tuple[int, ...]) -> None:
    onnx: Any = importlib.import_module("onnx")
    nodes, weights, at = [], [], "x"
    channels = 0  # of the convolution just before
    for i, part in enumerate(task.parts):
        matrix = part.weight
        if channels:
            nodes.append(onnx.helper.make_node("Flatten", [at], [f"flat{i}"], axis=1))
            at, area = f"flat{i}", matrix.shape[1] // channels
            matrix = matrix.reshape(-1, channels, area).transpose(0, 2, 1).reshape(len(matrix), -1)
        weights.append(onnx.numpy_helper.from_array(matrix.astype(np.float32), f"w{i}"))
        weights.append(onnx.numpy_helper.from_array(part.bias.astype(np.float32), f"b{i}"))
        given = [at, f"w{i}", f"b{i}"]
        if part.stride:
            # It takes no attribute for granted.
            how = {
                "kernel_shape": list(matrix.shape[2:]),
                "strides": [part.stride, part.stride],
                "pads": [part.padding] * 4,
                "dilations": [1, 1],
                "group": 1,
            }
            nodes.append(onnx.helper.make_node("Conv", given, [f"y{i}"], **how))
        else:
            nodes.append(onnx.helper.make_node("Gemm", given, [f"y{i}"], transB=1))
        at, channels = f"y{i}", len(part.weight) if part.stride else 0
        if i < len(task.parts) - 1:
            nodes.append(onnx.helper.make_node("Mul", [at, at], [f"s{i}"]))
            at = f"s{i}"
    value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    outputs = len(task.parts[-1].bias)
    graph = onnx.helper.make_graph(
        nodes, "net", [value("x", kind, list(shape))], [value(at, kind, [1, outputs])], weights
    )
    opset = onnx.helper.make_opsetid("", 11)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=7), str(path))


if __name__ == "__main__":
    sys.exit(serve(Helayers))
