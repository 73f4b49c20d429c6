import pathlib

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_jax.data.tokenizer import SYMBOLS, BuiltinTokenizer, Spelling, Tokenizer, load_tokenizer
from apr_jax.tasks.countdown.task import COUNTDOWN
from apr_jax.tasks.countdown.vocabulary import LATER_PHRASES, PHRASES
from apr_jax.tasks.dialect import CALL_END, JOIN_BEGIN
from tests.data.made_tokenizers import byte_level_json, llama_like_json

BUILTIN = BuiltinTokenizer()
# Lines that no solver writes (deeper levels, budgets, numbers of any spelling), but that models and readers may meet.
ODD_LINES = [
    "Sub Call Budget: 12 Moving to Node #0\n",
    "Token Budget: 4096 Current State: 27:[1], Operations: []\n",
    "<Start Sub Search 300 at level 2> Moving to Node #0,1\n",
    "<Goal Reached in Sub Search 0 at level 12 at Node #0>\n",
    "Start Sub Search at level 2: Moving to Node #0,3\n",
    "007,00 unequal: No Solution\n",
    "No solution found.\nNo solution found in sub search\n",
]
LONG_NUMBERS = ["0", "00", "05", "255", "256", "0255", "025", "1000", "2550", "12371", *map(str, range(250, 310))]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory, reference_texts: list[str]) -> Tokenizer:
    path = byte_level_json(tmp_path_factory.mktemp("bpe"), reference_texts[:50], ["<s>", "</s>"])
    return load_tokenizer(str(path), Spelling(markers=COUNTDOWN.marks))


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory, reference_texts: list[str]) -> Tokenizer:
    path = llama_like_json(tmp_path_factory.mktemp("llama"), reference_texts[:50])
    return load_tokenizer(str(path), Spelling(markers=COUNTDOWN.marks))


@pytest.fixture(params=["builtin", "byte_level", "llama_like"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return BUILTIN if request.param == "builtin" else request.getfixturevalue(request.param)


def test_every_trace_comes_back(tokenizer: Tokenizer, reference_texts: list[str]):
    for text in [*reference_texts, *ODD_LINES]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert "".join(tokenizer.token_texts(ids)) == text
        assert len(tokenizer.token_texts(ids)) == len(ids)


def test_own_solvers_traces_come_back(tokenizer: Tokenizer, train):
    for call in (call for demonstration in train for call in demonstration.calls):
        text = call.context + call.completion
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_token_spans_a_newline(tokenizer: Tokenizer, reference_texts: list[str]):
    for text in reference_texts[:60]:
        assert not any("\n" in piece[:-1] for piece in tokenizer.token_texts(tokenizer.encode(text)))


def test_encoding_adds_up_at_newlines(tokenizer: Tokenizer, reference_texts: list[str]):
    for text in reference_texts[:20]:
        for end in range(1, len(text)):
            if text[end - 1] == "\n":
                assert tokenizer.encode(text[:end]) + tokenizer.encode(text[end:]) == tokenizer.encode(text)


def test_control_phrases_are_one_token_each(tokenizer: Tokenizer):
    ids = [tokenizer.mark_id(mark) for mark in COUNTDOWN.marks]
    assert None not in ids
    assert tokenizer.decode(ids) == "".join(COUNTDOWN.marks)
    assert tokenizer.join_ids == (tokenizer.mark_id(JOIN_BEGIN),)
    control = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(control) == ""
    assert tokenizer.token_texts(control) == [""] * 3
    assert max(*control, *ids) < tokenizer.vocab_size


def test_any_ids_decode_and_others_are_refused(tokenizer: Tokenizer):
    every = list(range(tokenizer.vocab_size))
    assert "".join(tokenizer.token_texts(every)) == tokenizer.decode(every)
    for index in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"{index} lies outside"):
            tokenizer.decode([index])


def test_builtin_is_small_and_each_token_differs():
    assert BUILTIN.vocab_size == 3 + len(PHRASES) + len(SYMBOLS) + 10 + 256 + len(LATER_PHRASES)
    assert (BUILTIN.pad_id, BUILTIN.bos_id, BUILTIN.eos_id) == (0, 1, 2)
    assert len({*PHRASES, *SYMBOLS}) == len(PHRASES) + len(SYMBOLS)
    assert not any("\n" in phrase[:-1] for phrase in PHRASES)


def test_later_phrases_change_no_id_before_them():
    assert BUILTIN.encode("255") == [329]
    assert [BUILTIN.encode(phrase) for phrase in LATER_PHRASES] == [
        [330 + index] for index in range(len(LATER_PHRASES))
    ]
    assert LATER_PHRASES[:4] == ("sure\n", "likely\n", "impossible\n", "<Waiting for Sub Searches>\n")


def test_numbers_are_one_token_up_to_255_and_digit_tokens_above():
    small = [BUILTIN.encode(str(number)) for number in range(256)]
    assert all(len(ids) == 1 for ids in small)
    digit_ids = BUILTIN.encode("9876543210")
    assert len(set(digit_ids)) == 10
    assert not {ids[0] for ids in small} & set(digit_ids)
    for text in ["256", "05", "00", "1000"]:
        assert BUILTIN.encode(text) == [digit_ids[9 - int(digit)] for digit in text]
    assert BUILTIN.token_texts(BUILTIN.encode("#0,9,3\n")) == ["#", "0", ",9", ",3", "\n"]
    assert BUILTIN.token_texts(BUILTIN.encode("10,10\n")) == ["10", ",", "10", "\n"]


def test_what_precedes_an_operation_tells_the_line_before():
    lines = [
        "Current State: 27:[22, 26], Operations: []\n",
        "Current State: 27:[22, 26], Operations: ['53-31=22']\n",
        "Generated Node #0,1: 27:[22, 26] Operation: 53-31=22\n",
    ]
    assert len({BUILTIN.encode(line)[-1] for line in lines}) == 3


@given(st.lists(st.integers(0, BUILTIN.vocab_size - 1), max_size=30))
@settings(max_examples=300, deadline=None)
def test_whatever_tokens_write_can_be_encoded(ids: list[int]):
    text = BUILTIN.decode(ids)
    assert BUILTIN.decode(BUILTIN.encode(text)) == text


def test_text_where_the_longest_phrase_leads_astray():
    text = "<Start Sub Search at level 1\n"  # "<Start Sub Search " leaves "at level", which no token writes
    assert BUILTIN.token_texts(BUILTIN.encode(text)) == ["<", "Start Sub Search at level ", "1", "\n"]


@pytest.mark.parametrize(("text", "char"), [("1+é\n", "'é'"), ("Moving to nowhere\n", "'M'"), ("0\n1x2\n", "'x'")])
def test_unknown_characters_are_named(text: str, char: str):
    with pytest.raises(ValueError, match=f"the character {char}"):
        BUILTIN.encode(text)


def test_builtin_exports_itself_to_the_same_ids(tmp_path: pathlib.Path, reference_texts: list[str]):
    BUILTIN.save(tmp_path)
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert exported.get_vocab_size() == BUILTIN.vocab_size
    for text in [*reference_texts, *ODD_LINES, *(f"{number},{number}\n" for number in LONG_NUMBERS)]:
        ids = BUILTIN.encode(text)
        assert exported.encode(text).ids == ids
        assert exported.decode(ids) == text
    assert exported.encode("<s>").ids == [BUILTIN.bos_id]
    again = load_tokenizer(str(tmp_path / "tokenizer.json"))
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "join_ids"):
        assert getattr(again, name) == getattr(BUILTIN, name)
    assert again.encode(reference_texts[0]) == BUILTIN.encode(reference_texts[0])


@pytest.mark.peers
def test_transformers_loads_the_export(tmp_path: pathlib.Path, reference_texts: list[str]):
    transformers = pytest.importorskip("transformers")
    BUILTIN.save(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = loaded(reference_texts[0], add_special_tokens=False)["input_ids"]
    assert ids == BUILTIN.encode(reference_texts[0])
    assert loaded.decode(ids) == reference_texts[0]
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 0)


def test_hugging_face_saves_and_loads_the_same(tmp_path: pathlib.Path, byte_level: Tokenizer, reference_texts):
    byte_level.save(tmp_path)
    again = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert again.vocab_size == byte_level.vocab_size
    assert again.mark_id(CALL_END) == byte_level.mark_id(CALL_END) is not None
    assert again.encode(reference_texts[0]) == byte_level.encode(reference_texts[0])


def test_hugging_face_characters_of_several_tokens_have_texts_that_add_up(byte_level: Tokenizer):
    ids = byte_level.encode("1+é=2\n")
    assert byte_level.decode(ids) == "1+é=2\n"
    assert "".join(byte_level.token_texts(ids)) == "1+é=2\n"


def test_hugging_face_refuses_what_it_would_lose(tmp_path: pathlib.Path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "1": 3}, "<unk>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="does not give back the line '2"):
        load_tokenizer(str(tmp_path / "tokenizer.json")).encode("2\n")


def test_hugging_face_needs_bos_and_eos(tmp_path: pathlib.Path):
    path = byte_level_json(tmp_path, ["1+1=2\n"], ["<s>"])
    with pytest.raises(ValueError, match="no EOS token"):
        load_tokenizer(str(path))
    with pytest.raises(FileNotFoundError, match='"builtin" or the path'):
        load_tokenizer(str(tmp_path / "missing.json"))
