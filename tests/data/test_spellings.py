"""Tokenizers that cut text awkwardly: what is read, found and added is text, and nothing of it is lost."""

import itertools
import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from apr_jax.data.tokenizer import Spelling, Tokenizer, load_tokenizer
from apr_jax.engine.stop_strings import StringWatch
from apr_jax.engine.threads import Thread
from apr_jax.reasoning.base import Transcript, stops_at
from apr_jax.tasks.countdown.task import COUNTDOWN
from tests.data.made_tokenizers import byte_level_json, llama_like_json

MARKS = ("<spawn>\n", "</spawn>", "<join>\n", "spawn e", "<End Calling Sub Searches>\n")
WORDS = [
    *MARKS,
    "<",
    ">",
    "spawn",
    "</",
    "\n",
    "\n\n",
    " ",
    "  ",
    "a",
    "1 2",
    "é",
    "日本",
    "🙂",
    "x>\n\ny",
    "<<spawn>\n>",
]
WORDS += ["<thread 1>", "No solution", "end", "▁", "\t", "<spawn", "n>\n", "</s>", "<s>x", "\u212b", "e\u0301", "<unk>"]
KINDS = ("byte_level", "llama_like", "word_piece")


def text_of(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12)))


def word_piece_json(folder, texts):
    """As BERT's: blanks between words, `##` before what goes on, and no newline: it only ever writes, never reads."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    rng = random.Random(0)
    # Merges run across the marks: what they begin and end with is often glued to other text.
    texts = [text_of(rng) + "x<spawn>\n\ny</spawn>>" for _ in range(300)]
    makers = {
        "byte_level": lambda folder: byte_level_json(folder, texts, ["<s>", "</s>"]),
        "llama_like": lambda folder: llama_like_json(folder, texts),
        "word_piece": lambda folder: word_piece_json(folder, texts),
    }
    return {kind: str(make(tmp_path_factory.mktemp(kind))) for kind, make in makers.items()}


@pytest.fixture(params=[*itertools.product(KINDS, ("lines", "whole"))], ids="-".join)
def tokenizer(request, made) -> Tokenizer:
    kind, encoding = request.param
    return load_tokenizer(made[kind], Spelling(encoding=encoding))


def drawn(tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """Tokens that a model may write: of a text as the tokenizer cuts it, cut elsewhere, or any at all."""
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(1, 8))]
    for _ in range(rng.randint(0, 4)):
        try:
            ids += tokenizer.encode_continuation(text_of(rng), [tokenizer.bos_id, *ids])
        except ValueError:  # word pieces cannot spell every text
            ids += [rng.randrange(tokenizer.vocab_size)]
        ids = ids[rng.randrange(len(ids)) // 3 :]
    return ids


def test_whole_texts_come_back_however_they_are_cut(tokenizer, request):
    rng = random.Random(1)
    for _ in range(600):
        before, text = text_of(rng), text_of(rng)
        try:
            ids = tokenizer.encode_prompt(before)
            more = tokenizer.encode_continuation(text, ids)
        except ValueError:
            assert "word_piece" in request.node.name
            continue
        assert tokenizer.decode(ids) == before
        assert tokenizer.decode([*ids, *more]) == before + text
        pieces = tokenizer.token_bytes(more, ids)
        assert b"".join(pieces) == text.encode()
        assert [*tokenizer.token_bytes(ids), *pieces] == tokenizer.token_bytes([*ids, *more])


def test_the_text_of_any_tokens_is_the_librarys(made):
    """Up to what is no UTF-8: there the library loses a whole run of byte tokens, and here only what is broken."""
    for kind in KINDS:
        ours, theirs = (
            load_tokenizer(made[kind], Spelling(encoding="whole")),
            tokenizers.Tokenizer.from_file(made[kind]),
        )
        rng = random.Random(2)
        for _ in range(400):
            ids = [index for index in drawn(ours, rng) if index not in (ours.bos_id, *ours.eos_ids)]
            expected = theirs.decode(ids, skip_special_tokens=False)
            if "\ufffd" not in expected:
                assert ours.decode(ids) == expected


def test_ten_thousand_texts_and_cuts_lose_nothing(tokenizer, request):
    """The first mark that is complete in what was drawn is found, the rest is trimmed, and text can go on there."""
    rng, seen, split = random.Random(3), 0, 0
    stops = stops_at(tokenizer, *MARKS).strings
    assert stops is not None
    before = [tokenizer.bos_id]
    for _ in range(1700):  # for each of six tokenizers
        ids = drawn(tokenizer, rng)
        watch, found, done = StringWatch(stops), None, 0
        while found is None and done < len(ids):
            steps = rng.randint(1, 5)
            found = watch.take([*before, *ids[:done]], ids[done : done + steps])
            done += found.count if found else steps
        text = b"".join(tokenizer.token_bytes(ids, before))
        ends = [text.find(mark.encode()) + len(mark.encode()) for mark in MARKS if mark.encode() in text]
        assert (found is None) == (not ends)
        if found is None:
            continue
        seen += 1
        kept = Thread((), list(before), 0, (0, 0))
        page = Transcript(tokenizer, kept, "")
        kept.tokens += ids[:done]
        shown = page.text(found.excess)
        if "\ufffd" not in shown:
            assert shown == text[: min(ends)].decode(), "what is read ends with the mark"
        assert found.excess < len(tokenizer.token_bytes(kept.tokens[-1:], kept.tokens[:-1])[0])
        offset = len(shown) - len(found.string)
        place = page.cut(offset)
        if place is None:  # broken characters in the token in which the mark begins
            assert "\ufffd" in shown
            continue
        count, between = place
        split += bool(between)
        head = b"".join(tokenizer.token_bytes(kept.tokens[:count]))
        assert head + between.encode() == text[: min(ends) - len(found.string.encode())], "nothing before it is lost"
        assert kept.tokens[:count] == [*before, *ids][:count], "what was written is never tokenised again"
        try:
            joined = tokenizer.encode_continuation(between + "<join>\n7\n", kept.tokens[:count])
        except ValueError:
            assert "word_piece" in request.node.name
            continue
        after = b"".join(tokenizer.token_bytes(joined, kept.tokens[:count]))
        assert after == (between + "<join>\n7\n").encode()
    assert seen > 40
    assert split > 5


def test_a_join_has_no_blank_before_it(made):
    """Llama's tokenizers put one before every text that begins, and their byte tokens spell what no piece does."""
    for encoding in ("lines", "whole"):
        tokenizer = load_tokenizer(made["llama_like"], Spelling(encoding=encoding))
        before = [tokenizer.bos_id, *tokenizer.encode("x\n1")]
        assert tokenizer.decode([*before, *tokenizer.encode_continuation("<join>\n☃", before)]) == "x\n1<join>\n☃"
        assert tokenizer.decode([*before, *tokenizer.encode_continuation(" y", before)]) == "x\n1 y"


def test_marks_are_tokens_where_they_are_added_and_strings_elsewhere(made):
    for kind in ("byte_level", "llama_like"):
        plain = load_tokenizer(made[kind])
        grown = load_tokenizer(made[kind], Spelling(markers=COUNTDOWN.marks))
        assert grown.vocab_size == plain.vocab_size + len(COUNTDOWN.marks)
        assert [grown.mark_id(mark) for mark in COUNTDOWN.marks] == [*range(plain.vocab_size, grown.vocab_size)]
        assert stops_at(grown, *COUNTDOWN.marks).strings is None
        strings = stops_at(plain, *COUNTDOWN.marks).strings
        assert strings is not None
        assert strings.strings == COUNTDOWN.marks


def test_bos_is_put_as_the_tokenizer_says_or_as_often_as_asked(made, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(made["llama_like"])
    for name, processor, config, expected in (
        ("nothing_said", None, None, 1),
        ("says_none", None, '{"bos_token": "<s>", "eos_token": "</s>"}', 0),
        ("says_so", None, '{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}', 1),
        ("processor", ("<s> $A", [("<s>", 1)]), '{"bos_token": "<s>", "eos_token": "</s>"}', 1),
    ):
        folder = tmp_path / name
        folder.mkdir()
        if processor:
            tokenizer.post_processor = processors.TemplateProcessing(single=processor[0], special_tokens=processor[1])
        tokenizer.save(str(folder / "tokenizer.json"))
        if config:
            (folder / "tokenizer_config.json").write_text(config)
        for num_bos in (None, 0, 1, 2):
            loaded = load_tokenizer(str(folder / "tokenizer.json"), Spelling(num_bos=num_bos))
            ids = loaded.encode_prompt("a")
            assert ids == [loaded.bos_id] * (expected if num_bos is None else num_bos) + loaded.encode("a")
        loaded.save(folder / "saved")
        assert load_tokenizer(str(folder / "saved" / "tokenizer.json")).num_bos == expected
