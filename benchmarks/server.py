"""The protocol's overhead: forward_backward by the tinker SDK over loopback, beside the same call in this process.

The server is a process of its own. Both sides take turns and have the same small model, so that little else than the
protocol is measured. The overhead of a call does not depend on the model. A third server computes nothing: it gives the
first result of a size again, and parses no later body. What a call to it takes is the SDK's own part.

    python benchmarks/server.py [--calls 200] [--json benchmarks/results/server.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
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


def serve_first_results() -> None:
    """Serve the models, but answer each pass with the result of the first one whose body had the same size."""
    from lossfns.server import Service, create_app, endpoints, serve, wire

    read_pass, forward_backward, first = wire.read_pass, endpoints.forward_backward, {}

    def read_once(body: bytes, content_type: str, **options: Any) -> Any:
        if len(body) not in first:
            first[len(body)] = read_pass(body, content_type, **options), []
        return first[len(body)][0]

    async def compute_once(service: Any, request: Any, digest: int, nbytes: int) -> Any:
        results = first[nbytes][1]
        model = service.model(request.model_id)
        if not results:
            answer = await forward_backward(service, request, digest, nbytes)
            results.append(service.futures.find(answer["request_id"]))
            return answer
        future = service.futures.begin(f"{request.model_id}:again:{time.perf_counter_ns()}", None)
        future.set_result(results[0].result)
        model.next_seq += 1
        return endpoints.promise(future)

    wire.read_pass, endpoints.forward_backward = read_once, compute_once
    serve(create_app(Service(MODELS, device="cpu")), port=0)


SERVERS = {"models": serve_models, "first results": serve_first_results}


def datums(count: int, length: int) -> list[Any]:
    import tinker

    tokens = [i % 256 for i in range(length + 1)]
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * length}
    return [tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)] * count


def seconds(client: Any, data: list[Any]) -> float:
    start = time.perf_counter()
    client.forward_backward(data, "cross_entropy").result()
    return time.perf_counter() - start


def compare(calls: int, urls: list[str]) -> list[dict[str, Any]]:
    """Return a row of medians for each size; print it as well."""
    import tinker

    warnings.simplefilter("ignore")
    local = LocalServiceClient(MODELS, device="cpu").create_lora_training_client("Tiny", 4, 0)
    rows = []
    with ExitStack() as stack:
        services = [stack.enter_context(tinker.ServiceClient(base_url=url, api_key="tml-local")) for url in urls]
        clients = [local, *(service.create_lora_training_client("Tiny", 4, 0).result() for service in services)]
        for (count, length), most in SIZES.items():
            data = datums(count, length)
            rounds = calls if count * length < 10_000 else max(1, calls // 10)
            times = [[1e3 * seconds(client, data) for client in clients] for _ in range(rounds + 3)][3:]
            in_process, over_loopback, sdk = (statistics.median(column) for column in zip(*times, strict=True))
            overhead = statistics.median(b - a for a, b, _ in times)
            print(
                f"{count:4} x {length:4} tokens: in process {in_process:7.2f} ms, over loopback {over_loopback:7.2f} "
                f"ms, overhead {overhead:6.2f} ms of {most}, of which the SDK and the transport take {sdk:6.2f} ms "
                f"(median of {rounds} rounds)",
                flush=True,
            )
            names = (
                "datums",
                "tokens",
                "in_process_ms",
                "over_loopback_ms",
                "overhead_ms",
                "most_ms",
                "sdk_ms",
                "rounds",
            )
            numbers = (count, length, in_process, over_loopback, overhead, most, sdk, rounds)
            rows.append(dict(zip(names, numbers, strict=True)))
    return rows


def machine() -> dict[str, Any]:
    import tinker
    import torch

    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tinker": tinker.__version__,
    }


def processor() -> str:
    """Return the name of the processor, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=200, help="rounds of calls of the smaller size")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        SERVERS[args.serve]()
        return 0
    children = [
        subprocess.Popen([sys.executable, __file__, "--serve", name], stdout=subprocess.PIPE, text=True)
        for name in SERVERS
    ]
    try:
        rows = compare(args.calls, [child.stdout.readline().split()[-1] for child in children])
    finally:
        for child in children:
            child.terminate()
            child.wait()
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return 0 if all(row["overhead_ms"] <= row["most_ms"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
