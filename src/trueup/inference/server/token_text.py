"""Single tokens as text and as bytes, for log-probabilities."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode


class TokenText:
    """What each token of a tokenizer stands for."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}
        self._special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))

    def text(self, token: int) -> str:
        """Its text; `bytes:\\xe4\\xbd` for what is no whole character, so that no two tokens look alike for it."""
        return self._look(token)[0]

    def raw(self, token: int) -> list[int]:
        """Its bytes."""
        return list(self._look(token)[1])

    def _look(self, token: int) -> tuple[str, bytes]:
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def _read(self, token: int) -> tuple[str, bytes]:
        word = self.tokenizer.convert_ids_to_tokens(token)
        if word is None:  # places of the embedding that no token has
            return f"<{token}>", b""
        if token in self._special:
            return word, word.encode()
        found = self._bytes(word)
        if found is None:
            text = self.tokenizer.decode([token])
            return text, text.encode()
        try:
            return found.decode(), found
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found), found

    def _bytes(self, word: str) -> bytes | None:
        """Of byte-level tokens (GPT-2's alphabet) and byte fallbacks (`<0xE4>`); else None."""
        if len(word) == 6 and word.startswith("<0x"):
            return bytes([int(word[3:5], 16)])
        if self._by_bytes and all(letter in self._alphabet for letter in word):
            return bytes(self._alphabet[letter] for letter in word)
        return None

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        return {letter: byte for byte, letter in bytes_to_unicode().items()}

    @cached_property
    def _by_bytes(self) -> bool:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return "ByteLevel" in str(getattr(backend, "decoder", ""))
