"""The encrypted tail: from layers to a program, and from a container to a container.

    params, spec, layers     CKKS parameters; the public half of a tail; what a tail is made of
    frontend                 a torch module -> layers (the one module here that needs torch)
    slotmaps, compiler       layers + calibration data -> program
    program, cost, noise     the program as data; what it costs; what error it makes
    packing, container       the one wire form of ciphertexts and keys
    backends                 what evaluates programs: `clear`, `seal`
    sealio, seal_backend     SEAL through TenSEAL, imported when first needed
    secret                   keys, encryption, decryption: the edge alone may import it

Importing this package loads neither torch nor TenSEAL.
"""
