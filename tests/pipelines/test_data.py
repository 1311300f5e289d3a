"""Calibration data: every kind of dataset, every refusal, and no token lost on the way."""

import json
import logging
import subprocess
import sys
from itertools import count, repeat

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from bitpress.errors import BitpressError
from bitpress.pipelines.data import Batch, CalibrationData, prepare

WORDS = [f"w{index}" for index in range(90)]
PAD, EOS, BOS, UNKNOWN = 0, 1, 2, 3
FIRST = 6  # the id of WORDS[0]
TEMPLATE = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_tokenizer(**options):
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<user>", "\n"]
    vocabulary = {word: index for index, word in enumerate(special + WORDS)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token=special[UNKNOWN]))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if options.pop("bos", False):
        plain.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        **{"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "chat_template": TEMPLATE, **options},
    )


class Causal(nn.Module):
    """Looks like a transformers model."""

    def __init__(self, vocabulary=100):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 4)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return self.embedding(input_ids)


class OnlyIds(nn.Module):
    def forward(self, input_ids):
        return input_ids


class Rows(nn.Module):
    def forward(self, x):
        return x


def ids_of(data):
    """The sequences without their padding, in order."""
    sequences = []
    for batch in data.batches:
        mask = batch.kwargs["attention_mask"].bool()
        sequences += [ids[real].tolist() for ids, real in zip(batch.kwargs["input_ids"], mask, strict=True)]
    return sequences


def words(*indices):
    return " ".join(WORDS[index] for index in indices)


def tokens(*indices):
    return [FIRST + index for index in indices]


TEXTS = [words(0), words(1, 2), words(3, 4, 5)]
IDS = [tokens(0), tokens(1, 2), tokens(3, 4, 5)]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]


def in_order(dataset, **options):
    return prepare(dataset, shuffle_calibration_samples=False, **options)


# --- kinds of datasets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dataset",
    [
        TEXTS,
        tuple(TEXTS),
        IDS,
        [torch.tensor(ids) for ids in IDS],
        [torch.tensor(ids, dtype=torch.int32) for ids in IDS],
        [{"text": text} for text in TEXTS],
        [{"input_ids": ids} for ids in IDS],
        [{"input_ids": torch.tensor(ids)} for ids in IDS],
        datasets.Dataset.from_dict({"text": TEXTS, "n": [1, 2, 3]}),
        datasets.Dataset.from_dict({"text": TEXTS})["text"],
        datasets.Dataset.from_dict({"input_ids": IDS}),
        datasets.Dataset.from_dict({"input_ids": IDS}).with_format("torch"),
        datasets.Dataset.from_dict({"input_ids": [[ids] for ids in IDS]}),
        datasets.Dataset.from_dict({"input_ids": IDS, "text": ["w9"] * 3}),
        datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}),
        datasets.IterableDatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()}),
        datasets.IterableDataset.from_generator(lambda: ({"text": text, "n": 1} for text in TEXTS)),
    ],
    ids=lambda dataset: type(dataset).__name__,
)
def test_texts_and_token_ids(dataset, tokenizer):
    data = in_order(dataset, tokenizer=tokenizer, model=Causal())
    assert ids_of(data) == IDS
    assert (data.samples, data.tokens, data.sliceable) == (3, 6, True)
    for batch in data.batches:
        assert set(batch.kwargs) == {"input_ids", "attention_mask"}
        assert all(value.dtype == torch.int64 and value.ndim == 2 for value in batch.kwargs.values())
        assert batch.args == ()
        assert batch.mask() is None


def test_a_generator_of_texts_is_read_once_and_no_further_than_needed(tokenizer):
    data = prepare((words(index % 90) for index in count()), tokenizer=tokenizer, num_calibration_samples=3)
    assert ids_of(data) == [tokens(0), tokens(1), tokens(2)]


def test_conversations_are_rendered_by_the_chat_template_without_a_second_bos():
    tokenizer = make_tokenizer(bos=True)
    assert ids_of(in_order(TEXTS[:1], tokenizer=tokenizer)) == [[BOS, *IDS[0]]]
    for dataset in ([{"messages": chat} for chat in CHATS], datasets.Dataset.from_dict({"messages": CHATS})):
        assert ids_of(in_order(dataset, tokenizer=tokenizer)) == [[4, *ids] for ids in IDS]


def test_texts_go_before_conversations(tokenizer):
    dataset = datasets.Dataset.from_dict({"messages": CHATS, "text": ["w9"] * 3})
    assert ids_of(in_order(dataset, tokenizer=tokenizer)) == [tokens(9)] * 3


def test_a_named_text_column_goes_before_all(tokenizer):
    dataset = datasets.Dataset.from_dict({"body": TEXTS, "text": ["w9"] * 3, "input_ids": [[9]] * 3})
    assert ids_of(in_order(dataset, tokenizer=tokenizer, text_column="body")) == IDS


def test_the_columns_of_masks_and_types_are_kept():
    row = {"input_ids": [7, 8, 9], "attention_mask": [0, 1, 1], "token_type_ids": [0, 0, 1], "labels": [7, 8, 9]}
    [batch] = prepare(datasets.Dataset.from_list([row])).batches
    assert set(batch.kwargs) == {"input_ids", "attention_mask", "token_type_ids"}
    assert batch.mask().tolist() == [[False, True, True]]
    data = prepare([row], model=Causal())
    assert set(data.batches[0].kwargs) == {"input_ids", "attention_mask"}
    assert data.tokens == 2


def test_truncation_keeps_tokens_behind_padding_on_the_left():
    row = {"input_ids": [0, 0, 0, 7, 8, 9], "attention_mask": [0, 0, 0, 1, 1, 1]}
    assert ids_of(prepare([row], max_seq_length=2)) == [[7, 8]]


def test_a_tensor_is_token_ids_only_for_a_language_model(tokenizer):
    tensor = torch.arange(12).view(3, 4)
    for options in ({"tokenizer": tokenizer}, {"model": Causal()}):
        assert ids_of(in_order(tensor, **options)) == tensor.tolist()
        assert ids_of(in_order(tensor[0], **options)) == tensor[:1].tolist()
    data = in_order(tensor, model=Rows())
    assert [batch.args[0].tolist() for batch in data.batches] == [[row] for row in tensor.tolist()]
    assert not data.sliceable


def test_sample_rows_are_drawn_and_grouped():
    tensor = torch.randn(10, 5)
    data = prepare(tensor, model=Rows(), batch_size=4, num_calibration_samples=6)
    assert [len(batch.args[0]) for batch in data.batches] == [4, 2]
    assert (data.samples, data.tokens) == (6, 6)
    assert data.batches[0].mask() is None
    rows = torch.cat([batch.args[0] for batch in data.batches])
    assert not torch.equal(rows, tensor[:6])
    assert all(any(torch.equal(row, other) for other in tensor) for row in rows)
    assert torch.equal(data.probe().args[0], data.batches[0].args[0])


def test_text_files(tmp_path, tokenizer):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(TEXTS) + "\n")
    assert ids_of(in_order(path, tokenizer=tokenizer)) == IDS
    joined = in_order(str(path), tokenizer=tokenizer, concatenate_data=True, max_seq_length=3)
    assert ids_of(joined) == [tokens(0, 1, 2), tokens(3, 4, 5)]


def test_files_of_rows(tmp_path, tokenizer):
    rows = [{"text": text} for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (tmp_path / "lines.json").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    (tmp_path / "ids.jsonl").write_text("\n".join(json.dumps(ids) for ids in IDS))
    (tmp_path / "rows.csv").write_text("n,text\n" + "".join(f"1,{text}\n" for text in TEXTS))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for path in tmp_path.iterdir():
        assert ids_of(in_order(path, tokenizer=tokenizer)) == IDS, path.name


def test_a_json_file_of_one_object_is_one_sample(tmp_path, tokenizer):
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"text": TEXTS[2]}, indent=1))
    assert ids_of(prepare(path, tokenizer=tokenizer)) == IDS[2:]


def test_a_long_cell_of_a_csv_file(tmp_path, tokenizer):
    path = tmp_path / "long.csv"
    path.write_text("text\n" + "w1 " * 60_000 + "\n")
    assert prepare(path, tokenizer=tokenizer).tokens == 2048


def test_saved_folders(tmp_path, tokenizer):
    table = datasets.Dataset.from_dict({"text": TEXTS})
    table.save_to_disk(tmp_path / "table")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "parts")
    assert ids_of(in_order(tmp_path / "table", tokenizer=tokenizer)) == IDS
    assert ids_of(in_order(tmp_path / "parts", tokenizer=tokenizer)) == IDS
    assert ids_of(in_order(tmp_path / "parts", tokenizer=tokenizer, splits="test")) == IDS[:1]
    assert ids_of(in_order(tmp_path / "parts", tokenizer=tokenizer, splits="train[1:]")) == IDS[1:]


def test_a_name_on_the_hub(monkeypatch, tokenizer):
    table = datasets.Dataset.from_dict({"text": TEXTS})
    asked = []

    def load_dataset(name, split=None):
        asked.append((name, split))
        return table if split else datasets.DatasetDict({"train": table, "test": table})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert ids_of(in_order("owner/name-v1.5", tokenizer=tokenizer)) == IDS
    assert ids_of(in_order("name", tokenizer=tokenizer, splits={"calibration": "train[:3]"})) == IDS
    assert ids_of(in_order("name", tokenizer=tokenizer, splits=["a", "b"])) == IDS + IDS
    assert asked == [("owner/name-v1.5", None), ("name", "train[:3]"), ("name", "a"), ("name", "b")]


def test_splits(tokenizer):
    table = datasets.Dataset.from_dict({"text": TEXTS})

    def parts(**names):
        return datasets.DatasetDict({name: table.select(rows) for name, rows in names.items()})

    def chosen(dataset, splits=None):
        return ids_of(in_order(dataset, tokenizer=tokenizer, splits=splits))

    assert chosen(parts(train=[0], calibration=[1], test=[2])) == [IDS[1]]
    assert chosen(parts(test=[0], train=[2])) == [IDS[2]]
    assert chosen(parts(other=[1])) == [IDS[1]]
    both = parts(a=[0, 1], b=[2])
    assert chosen(both, "b") == [IDS[2]]
    assert chosen(both, "a[1:]") == [IDS[1]]
    assert chosen(both, "a[:50%]+b") == [IDS[0], IDS[2]]
    assert chosen(both, ["b", "a"]) == [IDS[2], IDS[0], IDS[1]]
    assert chosen(both, {"calibration": "b"}) == [IDS[2]]
    assert chosen(both, {"any": "b"}) == [IDS[2]]
    assert chosen(table, "train[:1]") == [IDS[0]]
    with pytest.raises(BitpressError, match="splits a, b; choose one with splits="):
        chosen(both)
    for splits in ("c", "c[:1]", "a[:", ["a", "c"]):
        with pytest.raises(BitpressError, match="has the splits a, b"):
            chosen(both, splits)
    for splits in ([], {"x": "a", "y": "b"}):
        with pytest.raises(BitpressError, match="splits="):
            chosen(both, splits)
    streamed = datasets.IterableDatasetDict({"train": table.to_iterable_dataset()})
    with pytest.raises(BitpressError, match="streamed and has the splits train"):
        chosen(streamed, "train[:1]")
    with pytest.raises(BitpressError, match="has no splits"):
        chosen(TEXTS, "train")
    with pytest.raises(BitpressError, match="is empty: it has no splits"):
        chosen(datasets.DatasetDict())


# --- ready batches -------------------------------------------------------------------------------------------------


def test_items_are_passed_as_they_are():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    assert prepare([x]).batches[0].args[0] is x
    assert prepare(iter([(x, y)])).batches[0].args == (x, y)
    assert prepare([[x, y]]).batches[0].args == (x, y)
    item = {"x": x, "labels": y, "flag": True}
    assert prepare([item]).batches[0].kwargs == item
    assert prepare(item).batches[0].kwargs == item
    data = prepare([x, y])
    assert (data.samples, data.tokens, data.sliceable) == (4, 4, False)
    assert data.probe() is data.batches[0]


def test_a_loader_and_its_loss_of_keys_the_model_does_not_know(caplog):
    rows = [{"input_ids": torch.tensor([5, 6]), "labels": torch.tensor(1), "name": torch.tensor(0)}] * 6
    loader = torch.utils.data.DataLoader(rows, batch_size=2)
    data = prepare(loader, model=Causal(), num_calibration_samples=4)
    assert [set(batch.kwargs) for batch in data.batches] == [{"input_ids", "labels"}] * 2
    assert (data.samples, data.tokens) == (4, 8)
    assert "left out name" in caplog.text


def test_a_tokenizer_output_is_one_batch(tokenizer):
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    data = prepare(encoded, model=Causal())
    assert (data.samples, data.tokens) == (3, 6)
    assert data.batches[0].mask().sum() == 6


def test_an_endless_generator_is_pulled_until_the_rows_are_there():
    pulled = []

    def endless():
        for index in count():
            pulled.append(index)
            yield torch.zeros(3, 2)

    data = prepare(endless(), num_calibration_samples=7)
    assert (data.samples, len(data.batches), len(pulled)) == (9, 3, 3)
    assert prepare(repeat(torch.tensor(1.0)), num_calibration_samples=2).samples == 2


def test_options_that_ready_batches_do_not_heed(caplog):
    prepare([torch.zeros(2, 2)], batch_size=4, max_seq_length=8)
    assert "batch_size is not applied" in caplog.text
    assert "max_seq_length is not applied" in caplog.text
    with pytest.raises(BitpressError, match="concatenate_data"):
        prepare([torch.zeros(2, 2)], concatenate_data=True)
    with pytest.raises(BitpressError, match="concatenate_data"):
        prepare(torch.zeros(2, 2), concatenate_data=True)


@pytest.mark.parametrize(
    ("item", "named"),
    [
        (3.5, "float"),
        (None, "NoneType"),
        ((torch.zeros(1), "x"), "tuple of Tensor, str"),
        ({"x": 1}, "dict of int"),
    ],
)
def test_an_item_that_is_no_batch_is_named(item, named):
    with pytest.raises(BitpressError, match=f"batch 1 is of type {named}"):
        prepare([torch.zeros(1, 1), item])


def test_a_batch_that_the_forward_does_not_take():
    with pytest.raises(BitpressError, match=r"batch 0 does not fit the model's forward\(x\)"):
        prepare([(torch.zeros(1), torch.zeros(1))], model=Rows())
    with pytest.raises(BitpressError, match=r"batch 0 does not fit .*missing"):
        prepare([{"y": torch.zeros(1)}], model=Rows())


def test_single_samples_of_torch_datasets_are_refused():
    with pytest.raises(BitpressError, match="DataLoader"):
        prepare(torch.utils.data.TensorDataset(torch.zeros(3, 2)))


# --- sampling ------------------------------------------------------------------------------------------------------


def test_shuffling_is_repeatable_and_draws_from_everything():
    dataset = [[index] for index in range(50)]

    def drawn(**options):
        return ids_of(prepare(dataset, num_calibration_samples=10, **options))

    assert drawn() == drawn() != drawn(seed=1)
    assert drawn(shuffle_calibration_samples=False) == dataset[:10]
    assert max(drawn()) > [10]
    assert len({ids for [ids] in drawn()}) == 10
    table = datasets.Dataset.from_dict({"input_ids": dataset})
    assert ids_of(prepare(table, num_calibration_samples=10)) == drawn()
    streamed = ids_of(prepare(table.to_iterable_dataset(), num_calibration_samples=10))
    assert streamed == ids_of(prepare(table.to_iterable_dataset(), num_calibration_samples=10)) != dataset[:10]


def test_fewer_samples_than_asked(caplog, tokenizer):
    with caplog.at_level(logging.WARNING):
        assert prepare(TEXTS, tokenizer=tokenizer, num_calibration_samples=7).samples == 3
    assert "num_calibration_samples=7" in caplog.text
    assert "gave only 3" in caplog.text
    caplog.clear()
    prepare(TEXTS, tokenizer=tokenizer, num_calibration_samples=3)
    prepare(TEXTS, tokenizer=tokenizer)  # nobody asked for a number
    assert not caplog.text


def test_truncation(tokenizer):
    text = " ".join(["w1"] * 3000)
    assert prepare([text], tokenizer=tokenizer, max_seq_length=5).tokens == 5
    assert prepare([text], tokenizer=tokenizer).tokens == 2048
    assert prepare([text], tokenizer=make_tokenizer(model_max_length=7)).tokens == 7
    assert prepare([[1] * 3000]).tokens == 3000
    assert prepare([[1] * 3000], tokenizer=make_tokenizer(model_max_length=7)).tokens == 7
    assert prepare([[1] * 30], max_seq_length=4).tokens == 4


def test_empty_texts_are_dropped_and_counted(caplog, tokenizer):
    data = in_order(["", TEXTS[0], " \n", TEXTS[1]], tokenizer=tokenizer)
    assert ids_of(data) == IDS[:2]
    assert "dropped 2 empty samples" in caplog.text
    rows = [{"text": None}, {"text": TEXTS[0]}]
    assert ids_of(in_order(datasets.Dataset.from_list(rows), tokenizer=tokenizer)) == IDS[:1]
    padding = [{"input_ids": [0, 0], "attention_mask": [0, 0]}, {"input_ids": [5, 0], "attention_mask": [1, 0]}]
    assert ids_of(in_order(padding)) == [[5]]


def test_concatenation_separates_with_eos_and_cuts_full_pieces(tokenizer):
    joined = [*IDS[0], EOS, *IDS[1], EOS, *IDS[2]]
    for dataset in (TEXTS, IDS, [*TEXTS, ""], iter(TEXTS)):
        data = in_order(dataset, tokenizer=tokenizer, concatenate_data=True, max_seq_length=3)
        assert ids_of(data) == [joined[:3], joined[3:6]]
        assert data.tokens == 6
    assert ids_of(in_order(IDS, concatenate_data=True, max_seq_length=3)) == [tokens(0, 1, 2), tokens(3, 4, 5)]
    ended = [[5, EOS], [6, EOS]]
    assert ids_of(prepare(ended, tokenizer=tokenizer, concatenate_data=True, max_seq_length=4)) == [[5, EOS, 6, EOS]]
    padded = [{"input_ids": [5, 0], "attention_mask": [1, 0]}, {"input_ids": [0, 6], "attention_mask": [0, 1]}]
    assert ids_of(prepare(padded, concatenate_data=True, max_seq_length=2)) == [[5, 6]]


def test_concatenation_draws_from_all_pieces():
    dataset = [[index, index] for index in range(100)]
    pieces = ids_of(prepare(dataset, concatenate_data=True, max_seq_length=4, num_calibration_samples=5))
    assert all(piece == [piece[0]] * 2 + [piece[0] + 1] * 2 and piece[0] % 2 == 0 for piece in pieces)
    assert max(pieces) > [20]


def test_concatenation_of_an_endless_stream(tokenizer):
    options = {"tokenizer": tokenizer, "concatenate_data": True, "max_seq_length": 8, "num_calibration_samples": 3}
    assert prepare(repeat(TEXTS[2]), **options).tokens == 24
    assert prepare(([index] for index in count()), **options).tokens == 24


def test_concatenation_without_a_length_makes_pieces_of_at_most_2048(tokenizer):
    assert prepare([[1] * 5000], concatenate_data=True).tokens == 4096
    assert prepare([[1] * 5000], concatenate_data=True, tokenizer=make_tokenizer(model_max_length=10**5)).samples == 2
    assert prepare([[1] * 50], concatenate_data=True, tokenizer=make_tokenizer(model_max_length=20)).samples == 2


# --- batching ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=12),
    st.integers(1, 5),
    st.booleans(),
)
def test_batching_loses_no_token_and_keeps_the_order(sequences, batch_size, shuffle):
    data = prepare(sequences, batch_size=batch_size, shuffle_calibration_samples=shuffle, model=Causal())
    found = ids_of(data)
    assert found == sequences if not shuffle else sorted(found) == sorted(sequences)
    assert data.samples == len(sequences)
    assert data.tokens == sum(map(len, sequences))
    assert [len(batch.kwargs["input_ids"]) for batch in data.batches[:-1]] == [batch_size] * (len(data.batches) - 1)
    for batch, start in zip(data.batches, range(0, len(found), batch_size), strict=True):
        lengths = torch.tensor([len(sequence) for sequence in found[start : start + batch_size]])
        expected = torch.arange(int(lengths.max())) < lengths[:, None]
        assert torch.equal(batch.kwargs["attention_mask"], expected.long())
        mask = batch.mask()
        assert mask is None if expected.all() else torch.equal(mask, expected)
        assert not batch.kwargs["input_ids"][~expected].any()


def test_types_go_to_models_that_take_them():
    class Typed(Causal):
        def forward(self, input_ids, token_type_ids):
            return input_ids

    class Anything(Causal):
        def forward(self, **kwargs):
            return kwargs

    row = {"input_ids": [5], "token_type_ids": [1]}
    assert set(prepare([row], model=Typed()).batches[0].kwargs) == {"input_ids", "token_type_ids"}
    assert len(prepare([row], model=Anything()).batches[0].kwargs) == 3


def test_the_padding_token():
    def padding(pad, eos="<eos>", model=None):
        tokenizer = make_tokenizer(pad_token=pad, eos_token=eos)
        data = in_order([[9], [9, 9]], batch_size=2, tokenizer=tokenizer, model=model)
        return int(data.batches[0].kwargs["input_ids"][0, 1])

    assert padding("<unk>") == UNKNOWN
    assert padding(None) == EOS
    assert padding(None, eos=None) == 0
    assert padding("w89", model=Causal(20)) == EOS
    assert padding("w89") == FIRST + 89


def test_masks():
    assert Batch((), {}).mask() is None
    assert Batch((), {"attention_mask": torch.ones(2, 3)}).mask() is None
    assert Batch((), {"attention_mask": torch.zeros(1, 1, 3, 3)}).mask() is None
    mask = Batch((), {"attention_mask": torch.tensor([[1, 0]])}).mask()
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, False]]


def test_to_moves_nested_tensors():
    x = torch.zeros(2)
    moved = Batch((x, [x]), {"a": {"b": (x, 1)}, "c": "d"}).to("meta")
    assert moved.args[0].is_meta
    assert moved.args[1][0].is_meta
    assert moved.kwargs["a"]["b"][0].is_meta
    assert moved.kwargs["a"]["b"][1] == 1
    assert moved.kwargs["c"] == "d"


def test_probe():
    data = prepare([list(range(40)), list(range(50))], batch_size=2)
    assert data.probe().kwargs["input_ids"].tolist() == [data.batches[0].kwargs["input_ids"][0, :32].tolist()]
    assert data.probe(rows=2, positions=5).kwargs["attention_mask"].shape == (2, 5)
    left = prepare([{"input_ids": [0, 0, 7, 8], "attention_mask": [0, 0, 1, 1]}])
    assert left.probe(positions=2).kwargs["input_ids"].tolist() == [[7, 8]]
    assert isinstance(left, CalibrationData)


def test_a_forward_without_a_mask():
    data = prepare([[1, 2], [3, 4]], batch_size=2, model=OnlyIds())
    assert set(data.batches[0].kwargs) == {"input_ids"}
    with pytest.raises(BitpressError, match="takes no attention_mask"):
        prepare([[1, 2], [3]], batch_size=2, model=OnlyIds())
    with pytest.raises(BitpressError, match=r"forward\(x\) takes no input_ids"):
        prepare([[1, 2], [3]], model=Rows())


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dataset",
    [
        [],
        iter([]),
        [[]],
        torch.zeros(0, 4),
        torch.tensor(1.0),
        datasets.Dataset.from_dict({"text": []}),
        datasets.Dataset.from_dict({}),
        datasets.IterableDataset.from_generator(lambda: iter(())),
        [torch.zeros(0, 4)],
        torch.utils.data.DataLoader([]),
    ],
    ids=lambda dataset: type(dataset).__name__,
)
def test_empty_datasets(dataset, tokenizer):
    with pytest.raises(BitpressError, match="empty"):
        prepare(dataset, tokenizer=tokenizer)


def test_only_empty_texts(tmp_path, tokenizer):
    with pytest.raises(BitpressError, match="2 empty samples"):
        prepare(["", " "], tokenizer=tokenizer)
    with pytest.raises(BitpressError, match="2 empty samples"):
        prepare(["", " "], tokenizer=tokenizer, concatenate_data=True)
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(BitpressError, match="empty"):
        prepare(tmp_path / "blank.txt", tokenizer=tokenizer)


@pytest.mark.parametrize("dataset", [TEXTS, [{"text": "a"}], [{"messages": CHATS[0]}]])
def test_texts_need_a_tokenizer(dataset):
    with pytest.raises(BitpressError, match="tokenizer="):
        prepare(dataset)


def test_columns(tokenizer):
    table = datasets.Dataset.from_dict({"prompt": TEXTS, "answer": TEXTS})
    with pytest.raises(BitpressError, match=r"it has prompt, answer; .*text_column="):
        prepare(table, tokenizer=tokenizer)
    with pytest.raises(BitpressError, match=r"no column 'body' \(text_column=\); it has prompt, answer"):
        prepare(table, tokenizer=tokenizer, text_column="body")
    with pytest.raises(BitpressError, match="sample 1: there is no column 'text'"):
        in_order([{"text": "w1"}, {"body": "w1"}], tokenizer=tokenizer)
    with pytest.raises(BitpressError, match="sample 1: there is no column 'input_ids'"):
        in_order([{"input_ids": [1]}, {"body": "w1"}])


def test_items_that_cannot_be_read(tokenizer):
    with pytest.raises(BitpressError, match="sample 1: a text was expected, not int"):
        in_order(["w1", 5], tokenizer=tokenizer)
    with pytest.raises(BitpressError, match=r"sample 1: .*integers, not torch\.float32"):
        in_order([[1], [0.5]])
    with pytest.raises(BitpressError, match=r"sample 1: .*token ids was expected"):
        in_order([[1], "w1"])
    with pytest.raises(BitpressError, match=r"sample 0: .*shape \(2, 1\)"):
        in_order([{"input_ids": [[1], [2]]}])
    with pytest.raises(BitpressError, match="sample 0: token id -100 is negative"):
        in_order([[1, -100]])
    with pytest.raises(BitpressError, match="attention_mask has 1 positions, input_ids 2"):
        in_order([{"input_ids": [1, 2], "attention_mask": [1]}])
    for dataset in (None, 5, object()):
        with pytest.raises(BitpressError, match=type(dataset).__name__):
            prepare(dataset)


def test_chat_templates_that_fail():
    with pytest.raises(BitpressError, match="chat template"):
        prepare([{"messages": CHATS[0]}], tokenizer=make_tokenizer(chat_template=None))


@pytest.mark.parametrize("name", ["no.txt", "no/no.jsonl", "./no", "/no/where/at/all", "no/no/no", "no.xyz", "C:\\no"])
def test_files_that_do_not_exist(name, tokenizer):
    with pytest.raises(BitpressError, match="does not exist"):
        prepare(name, tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["nowhere", "no/where", "a text " * 100, "null\0"])
def test_names_that_the_hub_does_not_know(monkeypatch, name, tokenizer):
    def load_dataset(name, **options):
        raise ConnectionError("no such thing")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(BitpressError, match=r"neither a path that exists nor a dataset .*no such thing"):
        prepare(name, tokenizer=tokenizer)


def test_files_that_cannot_be_read(tmp_path, tokenizer):
    def refused(name, content, match):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(BitpressError, match=match):
            prepare(path, tokenizer=tokenizer)

    refused("a.pkl", b"", "pickle")
    refused("a.pt", b"", "pickle")
    refused("a.xyz", b"", "cannot be read as a dataset")
    refused("a.txt", b"\xff\xfe\xfa", "cannot be read as .txt")
    refused("a.parquet", b"no", "cannot be read as .parquet")
    refused("a.jsonl", b'{"text": "w1"}\n{', "line 2 is not JSON")
    refused("a.json", b"{", "line 1 is not JSON")
    refused("b.json", b"5", "batch 0 is of type int")
    with pytest.raises(BitpressError, match="not written by save_to_disk"):
        prepare(tmp_path, tokenizer=tokenizer)


def test_token_ids_outside_the_embedding(tokenizer):
    for dataset in ([[5], [100]], [{"input_ids": torch.tensor([[5, 100]])}], torch.tensor([[100]])):
        with pytest.raises(BitpressError, match="token id 100 is outside the model's embedding of 100 rows"):
            prepare(dataset, model=Causal())
    with pytest.raises(BitpressError, match="embedding of 8 rows"):
        prepare(TEXTS, tokenizer=tokenizer, model=Causal(8))


def test_a_model_without_an_embedding_of_tokens():
    class Vision(Causal):
        def get_input_embeddings(self):
            raise NotImplementedError

    assert prepare([[10**6]], model=Vision()).tokens == 1


def test_every_sample_shorter_than_asked(tokenizer):
    for dataset in (TEXTS, IDS, [{"messages": chat} for chat in CHATS]):
        with pytest.raises(BitpressError, match=r"max_seq_length=9, .*has [34] tokens; .*concatenate_data=True"):
            prepare(dataset, tokenizer=tokenizer, max_seq_length=9)
    assert ids_of(in_order(IDS, max_seq_length=3)) == IDS


def test_too_little_for_one_piece(tokenizer):
    with pytest.raises(BitpressError, match="8 tokens in all, fewer than one piece of max_seq_length=9"):
        prepare(TEXTS, tokenizer=tokenizer, concatenate_data=True, max_seq_length=9)


@pytest.mark.parametrize("name", ["num_calibration_samples", "batch_size", "max_seq_length"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_numbers_that_are_not_positive(name, value):
    with pytest.raises(BitpressError, match=f"{name}={value}"):
        prepare(IDS, **{name: value})


def test_importing_does_not_wait_for_datasets():
    code = "import sys, bitpress.pipelines.data; assert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
