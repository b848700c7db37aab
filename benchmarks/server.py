"""The protocol's overhead: forward_backward by the tinker SDK over loopback, beside the same call in this process.

The server is a process of its own. Both sides take turns and have the same small model, so that little else than the
protocol is measured. The overhead of a call does not depend on the model.

    python benchmarks/server.py [--calls 200]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

from lossfns.backend import LocalServiceClient
from lossfns.backend.model.decoder import Decoder
from lossfns.backend.model.tokenizer import ByteTokenizer

MODELS = {"Tiny": lambda: (Decoder(vocab_size=257, dim=16, layers=1, heads=2, kv_heads=1, hidden=32), ByteTokenizer())}
SIZES = {(8, 256): 2.5, (256, 1024): 25.0}
"""(datums, tokens of each) of a call, and the most milliseconds of overhead."""


def serve_models() -> None:
    from lossfns.server import Service, create_app, serve

    serve(create_app(Service(MODELS, device="cpu")), port=0)


def datums(count: int, length: int) -> list[Any]:
    import tinker

    tokens = [i % 256 for i in range(length + 1)]
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * length}
    return [tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)] * count


def seconds(client: Any, data: list[Any]) -> float:
    start = time.perf_counter()
    client.forward_backward(data, "cross_entropy").result()
    return time.perf_counter() - start


def compare(calls: int, url: str) -> bool:
    import tinker

    warnings.simplefilter("ignore")
    local = LocalServiceClient(MODELS, device="cpu").create_lora_training_client("Tiny", 4, 0)
    within = True
    with tinker.ServiceClient(base_url=url, api_key="tml-local") as service:
        remote = service.create_lora_training_client("Tiny", 4, 0).result()
        for (count, length), most in SIZES.items():
            data = datums(count, length)
            rounds = calls if count * length < 10_000 else max(1, calls // 10)
            times = [[seconds(client, data) for client in (local, remote)] for _ in range(rounds + 3)][3:]
            in_process, over_loopback = (statistics.median(column) for column in zip(*times, strict=True))
            overhead = 1e3 * statistics.median(b - a for a, b in times)
            within &= overhead <= most
            print(
                f"{count:4} x {length:4} tokens: in process {1e3 * in_process:7.2f} ms, "
                f"over loopback {1e3 * over_loopback:7.2f} ms, overhead {overhead:6.2f} ms of {most} "
                f"(median of {rounds} pairs)",
                flush=True,
            )
    return within


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=200, help="pairs of calls of the smaller size")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_models()
        return 0
    child = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        return 0 if compare(args.calls, child.stdout.readline().split()[-1]) else 1
    finally:
        child.terminate()
        child.wait()


if __name__ == "__main__":
    raise SystemExit(main())
