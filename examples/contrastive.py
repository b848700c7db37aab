"""Train embeddings that find a sentence's translation: a contrastive loss through the local client.

A small byte-level model is trained from scratch on English queries and French documents, sentences with four variable
words. 128 of the 4,096 sentences are held out: all their words occur in training, but not in these combinations. Run
``python examples/contrastive.py``. It takes about 20 seconds on one CPU thread and prints recall@1 on the held-out
sentences, before and after training.
"""

from itertools import product
from random import Random

import torch
import torch.nn.functional as F

from lossfns import Datum, ModelInput
from lossfns.backend import AdamParams, ByteTokenizer, Decoder, LocalTrainingClient

WORDS = [
    "red rouge, black noir, white blanc, grey gris, green vert, yellow jaune, brown brun, blue bleu",
    "cat chat, dog chien, horse cheval, rabbit lapin, wolf loup, duck canard, sheep mouton, fox renard",
    "sleeps dort, eats mange, runs court, sings chante, waits attend, falls tombe, thinks pense, dances danse",
    "garden jardin, wood bois, field champ, sand sable, boat bateau, attic grenier, castle château, road chemin",
]


def sentences():
    """Return (query, document) for each colour, animal, verb and place. The word order of the languages differs."""
    columns = [[pair.split() for pair in words.split(", ")] for words in WORDS]
    pairs = [
        (f"the {colour} {animal} {verb} in the {place}", f"dans le {lieu} {verbe} le {bete} {couleur}")
        for (colour, couleur), (animal, bete), (verb, verbe), (place, lieu) in product(*columns)
    ]
    return Random(0).sample(pairs, len(pairs))


def datums(texts):
    """Return datums for embeddings: the whole, unshifted ids, and no fields."""
    return [Datum(ModelInput.from_ints(ByteTokenizer().encode(text))) for text in texts]


def similarity(embeddings):
    """Return S = Q·Dᵀ [B, B] for the normalized embeddings of B queries, followed by those of their B documents."""
    queries, documents = F.normalize(torch.stack(embeddings), dim=1).chunk(2)
    return queries @ documents.T


def info_nce(temperature):
    """Return the loss ½·(CE(S/τ) + CE(Sᵀ/τ)): each query classifies its document among B, each document its query."""

    def loss_fn(data, embeddings):
        logits = similarity(embeddings) / temperature
        targets = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        return loss, {"recall@1": (logits.argmax(1) == targets).float().mean().item()}

    return loss_fn


def train(client, pairs, *, steps, batch=64, learning_rate=3e-3, temperature=0.05):
    """Train with Adam and a learning rate that falls to 0; yield the loss of each step."""
    rng, loss_fn = Random(0), info_nce(temperature)
    for step in range(steps):
        queries, documents = zip(*rng.sample(pairs, batch))
        data = datums([*queries, *documents])
        gradient = client.forward_backward_custom(data, loss_fn, output="embedding", pooling="last")
        client.optim_step(AdamParams(learning_rate=learning_rate * (1 - step / steps))).result()
        yield gradient.result().metrics["loss:sum"]


def recall(client, pairs):
    """Return the share of queries whose document is the nearest, and of documents whose query is the nearest."""
    queries, documents = zip(*pairs)
    config = {"output": "embedding", "pooling": "last"}
    result = client.forward(datums([*queries, *documents]), "cross_entropy", config).result()
    scores = similarity([output["embedding"].to_torch() for output in result.loss_fn_outputs])
    targets = torch.arange(len(pairs))
    return [(s.argmax(1) == targets).float().mean().item() for s in (scores, scores.T)]


def new_client(seed=0):
    """Return a client of a model with 0.1 million parameters."""
    model = Decoder(vocab_size=257, dim=64, layers=2, heads=4, kv_heads=2, hidden=192, seed=seed)
    return LocalTrainingClient(model, tokenizer=ByteTokenizer(), device="cpu")


def main():
    held_out, known = sentences()[:128], sentences()[128:]
    client, steps = new_client(), 200
    before = recall(client, held_out)
    for step, loss in enumerate(train(client, known, steps=steps), 1):
        if step % 20 == 0:
            print(f"step {step:3} of {steps}   loss {loss:.3f}", flush=True)
    print(f"\n{'recall@1 of 128 held-out pairs':32}{'before':>8}{'after':>8}{'chance':>8}")
    for name, a, b in zip(("the document of a query", "the query of a document"), before, recall(client, held_out)):
        print(f"{name:32}{a:8.3f}{b:8.3f}{1 / 128:8.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
