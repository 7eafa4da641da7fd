"""A tokenizer for tests, in a file of its own: loader workers import it, and should be quick."""


class OneTokenAByte:
    """The simplest tokenizer: text that is its own oracle. 256 begins, 257 ends."""

    bos_id, eos_id, pad_id, vocab_size = 256, 257, 258, 259

    def identity(self):
        return {"tokenizer entries": 259, "tokenizer hash": "bytes"}

    def encode(self, text, add_bos=False, add_eos=False):
        return [256] * add_bos + list(text.encode()) + [257] * add_eos
