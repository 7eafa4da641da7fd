"""The same documents as each kind of source, and the packing that is expected of them."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from torchtitan.data import DatasetSettings, DataSettings, TextDataset, open_source
from torchtitan.data.rank_slice import RankSlice
from torchtitan.data.sources import HubStream

TEXTS = [f"document {n} " + "word " * (n % 13) + str(n * n) for n in range(41)]
KINDS = ["plain", "gzip", "parquet", "hub"]


def named(name, path=None, text_key="text", label="", key="training"):
    """A dataset as the keys of that table of the TOML name it."""
    return DatasetSettings(key, name, path, text_key, label)


def opened(*args, **kwargs):
    """The source of a dataset; arguments as of `named`."""
    return open_source(named(*args, **kwargs))


def text_dataset(source, tokenizer, seq_len, *, rank_slice=None, **settings):
    """Examples of one source; settings as of `DataSettings`."""
    rank_slice = rank_slice or RankSlice()
    cut = DataSettings((source.settings,), False, seq_len, rank_slice.batch_size, **settings)
    return TextDataset(source, tokenizer, cut, rank_slice)


def make_source(kind, folder, texts=TEXTS):
    """Indexed files, streamed gzip files, row groups, or a hub stream."""
    if kind == "hub":
        paths = []
        for number in range(4):
            paths.append(str(folder / f"hub{number}.jsonl"))
            with open(paths[-1], "w") as file:
                file.writelines(json.dumps({"text": t}) + "\n" for t in texts[number::4])
        rows = datasets.load_dataset("json", data_files=paths, split="train", streaming=True)
        return HubStream(named("org/name"), rows)
    for number in range(3):
        if kind == "parquet":
            table = pa.table({"text": texts[number::3]})
            pq.write_table(table, folder / f"parquet{number}.parquet", row_group_size=4)
            continue
        lines = [json.dumps({"text": t}) + "\n" for t in texts[number::3]]
        path = folder / f"{kind}{number}.jsonl"
        path.write_text("".join(lines))
        if kind == "gzip":
            (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    return opened("text", str(folder / f"{kind}*"), "text")


def pack(texts, tokenizer, seq_len):
    """The reference: all tokens of all documents in one list, cut with a stride of seq_len."""
    tokens = [i for text in texts for i in tokenizer.encode(text, add_bos=True, add_eos=True)]
    examples = []
    for start in range(0, len(tokens) - 1, seq_len):
        window = tokens[start : start + seq_len + 1]
        missing = seq_len + 1 - len(window)
        inputs = window[:-1] + [tokenizer.pad_id] * missing
        examples.append((inputs, window[1:] + [-100] * missing))
    return examples


def lists(examples):
    """Convert examples or batches to pairs of lists: (input, labels)."""
    return [(example["input"].tolist(), labels.tolist()) for example, labels in examples]
