"""TenSEAL's `CKKSVector.mm` on a net, as its users run it: in this process, beside ours."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import numpy as np

from bench.interleave import Run, clocked
from bench.net_rows import System
from bench.tails import Conv, Net
from blindtail.he.layers import Affine, FloatArray

#: TenSEAL's parameters for them, as its users run it.
PARAMETERS = {
    "A": (8192, [31, 26, 26, 26, 26, 26, 26, 31]),
    "B": (8192, [40, 30, 30, 30, 40]),
    "C": (8192, [31, 26, 26, 26, 26, 26, 26, 31]),
}


def tenseal(net: Net, want: FloatArray) -> tuple[Run, System]:
    import tenseal as ts

    degree, bits = PARAMETERS[net.name]
    context = ts.context(ts.SCHEME_TYPE.CKKS, degree, coeff_mod_bit_sizes=bits, n_threads=1)
    context.global_scale = 2 ** bits[1]
    context.generate_galois_keys()
    first = net.parts[0]
    windows = 0
    if isinstance(first, Conv):
        size = first.weight.shape[2]
        images = net.inputs.reshape(-1, first.side, first.side)
        packed = [ts.im2col_encoding(context, m.tolist(), size, size, first.stride) for m in images]
        vectors, windows = [vector for vector, _ in packed], packed[0][1]
    else:
        vectors = [ts.ckks_vector(context, values.tolist()) for values in net.inputs]

    def convolved(given: Any, part: Conv) -> Any:
        channels = [
            given.conv2d_im2col(kernel[0].tolist(), windows) + float(bias)
            for kernel, bias in zip(part.weight, part.bias, strict=True)
        ]
        return ts.CKKSVector.pack_vectors(channels)

    dense = {
        i: (np.asarray(p.weight).T.tolist(), p.bias.tolist())
        for i, p in enumerate(net.parts)
        if isinstance(p, Affine)
    }

    def evaluate(i: int) -> Any:
        out = vectors[i % len(vectors)]
        for index, part in enumerate(net.parts):
            if isinstance(part, Conv):
                out = convolved(out, part)
            else:
                matrix, bias = dense[index]
                out = out.mm(matrix) + bias
            if index < len(net.parts) - 1:
                out = out.square()
        return out

    keys = context.serialize(
        save_public_key=False, save_secret_key=False, save_galois_keys=True, save_relin_keys=True
    )
    reply = evaluate(0)
    sizes = len(vectors[0].serialize()), len(keys), len(reply.serialize())
    system = System(
        f"TenSEAL {metadata.version('tenseal')} mm", "tenseal", 1, sizes, "ciphertexts already parsed"
    )
    system.saw(np.asarray(reply.decrypt()), want[0])
    return clocked(evaluate), system
