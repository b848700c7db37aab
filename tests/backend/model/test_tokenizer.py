from lossfns.backend.model.tokenizer import ByteTokenizer

tokenizer = ByteTokenizer()


def test_encodes_to_utf8_bytes() -> None:
    assert tokenizer.encode("aé") == [97, 195, 169]


def test_end_of_sequence_only_when_asked_for() -> None:
    assert tokenizer.encode("a", add_special_tokens=True) == [97, tokenizer.eos_token_id]


def test_decode_inverts_encode_and_drops_the_end_of_sequence() -> None:
    text = "naïve 漢字 🙂\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=True)) == text


def test_decode_replaces_broken_utf8() -> None:
    assert tokenizer.decode([97, 195]) == "a\ufffd"


def test_sizes() -> None:
    assert len(tokenizer) == tokenizer.vocab_size == tokenizer.eos_token_id + 1 == 257
