"""Orion v2, on Lattigo: N = 8192, 29 + 26 x 5 + 29 x 2 bits, its own conjugate-invariant ring.

Its evaluator takes and gives bytes, so that its time includes (de)serialising one ciphertext each way.
"""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from typing import Any

import numpy as np

from bench.peers.protocol import Floats, Rival, Task, serve

LEVELS = 5


class Orion(Rival):
    def __init__(self, task: Task) -> None:
        if 2 * len(task.parts) - 1 > LEVELS:
            raise RuntimeError(
                f"it needs {2 * len(task.parts) - 1} levels, this setting of N = 8192 has {LEVELS}"
            )
        torch: Any = importlib.import_module("torch")
        data: Any = importlib.import_module("torch.utils.data")
        compiler: Any = importlib.import_module("orion_compiler")
        evaluator: Any = importlib.import_module("orion_evaluator")
        ckks: Any = importlib.import_module("lattigo.ckks")
        rlwe: Any = importlib.import_module("lattigo.rlwe")
        torch.set_num_threads(task.threads)
        settings = compiler.CKKSParams(
            logn=13, logq=(29, 26, 26, 26, 26, 26), logp=(29, 29), log_default_scale=26
        )
        side = task.parts[0].side
        shape = (1, side, side) if side else (1, 1, task.inputs.shape[1])
        images = torch.tensor(task.inputs.reshape(-1, *shape), dtype=torch.float32)
        loader = data.DataLoader(data.TensorDataset(images, torch.zeros(len(images))), batch_size=1)
        made = compiler.Compiler(network(task), settings)
        made.fit(loader)
        self._model = evaluator.Model.load(made.compile().to_bytes())
        told, manifest, self._level = self._model.client_params()
        parameters = ckks.Parameters.from_dict(told)
        keygen = rlwe.KeyGenerator(parameters)
        secret = keygen.gen_secret_key()
        rotations = [keygen.gen_galois_key(secret, element) for element in manifest["galois_elements"]]
        relinearisation = keygen.gen_relin_key(secret)
        keys = rlwe.MemEvaluationKeySet(relinearisation, rotations).marshal_binary()
        self._evaluator = evaluator.Evaluator(told, keys)
        self._encryptor = rlwe.Encryptor(parameters, keygen.gen_public_key(secret))
        self._decryptor = rlwe.Decryptor(parameters, secret)
        self._encoder = ckks.Encoder(parameters)
        self._ciphertext = rlwe.Ciphertext
        self._slots, self._scale = parameters.max_slots(), parameters.default_scale()
        self._outputs = len(task.parts[-1].bias)
        self.system = f"orion-v2 {metadata.version('orion-v2-evaluator')}"
        self.note = "N = 8192, 29+26x5+29x2 bits; a ciphertext's (de)serialisation included"
        self.key_bytes = len(keys)
        sent = self.encrypt(task.inputs[0])
        self.uplink_bytes, self.reply_bytes = len(sent), len(self.evaluate(sent))

    def encrypt(self, x: Floats) -> bytes:
        slots = np.zeros(self._slots)
        slots[: len(x)] = x
        plain = self._encoder.encode(slots.tolist(), self._level, self._scale)
        return bytes(self._encryptor.encrypt_new(plain).marshal_binary())

    def evaluate(self, encrypted: Any) -> bytes:
        return bytes(self._evaluator.forward(self._model, [encrypted])[0])

    def decrypt(self, reply: Any) -> Floats:
        plain = self._decryptor.decrypt_new(self._ciphertext.unmarshal_binary(reply))
        return np.asarray(self._encoder.decode(plain, self._slots)[: self._outputs])


def network(task: Task) -> Any:
    torch: Any = importlib.import_module("torch")
    on: Any = importlib.import_module("orion_compiler.nn")

    def layer(part: Any) -> Any:
        outputs, inputs = part.weight.shape[:2]
        if part.stride:
            made = on.Conv2d(inputs, outputs, part.weight.shape[2], part.stride, part.padding)
        else:
            made = on.Linear(inputs, outputs)
        with torch.no_grad():
            made.weight.copy_(torch.tensor(part.weight))
            made.bias.copy_(torch.tensor(part.bias))
        return made

    class Net(on.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.flatten = on.Flatten()
            for i, part in enumerate(task.parts):
                setattr(self, f"layer{i}", layer(part))
                setattr(self, f"square{i}", on.Quad())

        def forward(self, x: Any) -> Any:
            for i, part in enumerate(task.parts):
                if not part.stride and (i == 0 or task.parts[i - 1].stride):
                    x = self.flatten(x)
                x = getattr(self, f"layer{i}")(x)
                if i < len(task.parts) - 1:
                    x = getattr(self, f"square{i}")(x)
            return x

    return Net().eval()


if __name__ == "__main__":
    sys.exit(serve(Orion))
