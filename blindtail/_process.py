"""What must be set for the whole process before other libraries are loaded."""

from __future__ import annotations

import os
import sys

# ONNX Runtime reports its use to its maker unless told otherwise before it is loaded. A device
# that sees private data talks to its own cloud and to nobody else.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# gRPC has no setting for the least version of TLS. What it lets one set are the cipher suites of
# TLS 1.2: of this one alone, which wants a key shared beforehand, no peer can make use, and so
# every handshake is TLS 1.3. gRPC reads it once, when it is imported.
_NAME, _SUITES = "GRPC_SSL_CIPHER_SUITES", "ECDHE-PSK-CHACHA20-POLY1305"
#: False in a process that had imported gRPC before: servers then refuse TLS 1.2 call by call.
TLS_13_ONLY = "grpc" not in sys.modules or os.environ.get(_NAME) == _SUITES
os.environ[_NAME] = _SUITES
