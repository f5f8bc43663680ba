"""The tokens of a document are those of tiktoken's encode_ordinary, after an end-of-text token."""

import pytest
import tiktoken

from trainer.data.tokenizer import load_tokenizer


@pytest.mark.parametrize("text", ["", "I'LL  don't\r\n 123\u3000\u00e9", "no <|endoftext|>", "a \ud83c half"])
def test_a_document_has_the_tokens_of_encode_ordinary(text: str, gpt2_tokenizer: None) -> None:
    """Also a lone surrogate, which encode_to_numpy refuses."""
    tokens = load_tokenizer("gpt2").encode(text)
    assert tokens.dtype == "uint32"
    assert tokens.tolist() == [50256, *tiktoken.get_encoding("gpt2").encode_ordinary(text)]
