"""Records to conversations: what is accepted, what is refused, and that errors keep secrets."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from composer_path.conversion.record_file import decode_json, read_records
from composer_path.records.conversation import (
    RULES,
    Conversation,
    RecordError,
    Turn,
    id_of,
    problems_of,
    resolve_image,
)


def question(text: str = "Which stain?") -> dict[str, str]:
    return {"from": "human", "value": text}


def answer(text: str = "Haematoxylin and eosin.") -> dict[str, str]:
    return {"from": "assistant", "value": text}


def record(*turns: dict[str, str], **keys: Any) -> dict[str, Any]:
    return {**keys, "conversations": list(turns) or [question(), answer()]}


def rules_broken(value: object) -> list[str]:
    return [problem.rule for problem in problems_of(value)]


def test_user_and_gpt_mean_human_and_assistant() -> None:
    turns = [{"from": "user", "value": "Which stain?"}, {"from": "gpt", "value": "PAS."}]
    conversation = Conversation.from_record(record(*turns))
    assert conversation.turns == (Turn("human", "Which stain?"), Turn("assistant", "PAS."))


def test_text_is_kept_as_it_is_written() -> None:
    conversation = Conversation.from_record(record(question("  a \n<image>"), answer(" b\n "), image="a.jpg"))
    assert [turn.text for turn in conversation.turns] == ["  a \n<image>", " b\n "]


def test_a_leading_assistant_turn_is_dropped_and_counted() -> None:
    conversation = Conversation.from_record(record(answer("Hello."), question(), answer()))
    assert conversation.dropped_turns == 1
    assert [turn.role for turn in conversation.turns] == ["human", "assistant"]
    assert Conversation.from_record(record()).dropped_turns == 0


def test_one_image_without_a_tag_stands_before_the_first_question() -> None:
    conversation = Conversation.from_record(record(question(), answer(), question(), answer(), image="a.jpg"))
    assert conversation.image_without_tag
    assert conversation.turns[0].text == "<image>\nWhich stain?"
    assert conversation.turns[2].text == "Which stain?"


@pytest.mark.parametrize(
    ("image", "texts", "num_images"),
    [
        (None, ["Why?"], 0),
        ([], ["Why?"], 0),
        ("a.jpg", ["<image>\nWhy?"], 1),
        (["a.jpg"], ["Why?"], 1),
        (["a.jpg", "b.jpg"], ["<image>\n<image>\nWhich?"], 2),
        (["a.jpg", "b.jpg"], ["<image>What?", "And now? <image>"], 2),
    ],
)
def test_images_and_tags_go_together(image: Any, texts: list[str], num_images: int) -> None:
    turns = [turn for text in texts for turn in (question(text), answer())]
    conversation = Conversation.from_record(record(*turns, image=image))
    assert conversation.num_images == len(conversation.images) == num_images
    assert sum(turn.text.count("<image>") for turn in conversation.turns) == num_images


@pytest.mark.parametrize(
    ("image", "text"),
    [(None, "<image>"), ("a.jpg", "<image><image>"), (["a.jpg", "b.jpg"], "Which?"), (["a", "b"], "<image>")],
)
def test_other_numbers_of_tags_are_refused_with_both_counts(image: Any, text: str) -> None:
    num_images = len(image) if isinstance(image, list) else int(image is not None)
    with pytest.raises(RecordError, match=f"tags: {text.count('<image>')}, images: {num_images}") as caught:
        Conversation.from_record(record(question(text), answer(), image=image))
    assert caught.value.rule == "tag-count"


def test_optional_keys_are_kept_and_null_counts_as_absent() -> None:
    given = {"organ": "kidney", "stain": "PAS", "mpp": 0.25, "magnification": 40, "meta": {"a": [1]}}
    conversation = Conversation.from_record(
        record(id=7, patient=12, system="Be brief.", source=None, image=None, **given)
    )
    assert conversation.metadata == {**given, "patient": "12"}
    assert (conversation.id, conversation.system, conversation.images) == ("7", "Be brief.", ())
    assert Conversation.from_record(record()).id is None


def test_keys_that_nothing_reads_are_ignored() -> None:
    turns = [{**question(), "weight": 1}, answer()]
    assert Conversation.from_record(record(*turns, model="", split="train")).metadata == {}


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ([1], "not-an-object"),
        (None, "not-an-object"),
        ({}, "missing-key"),
        (record(id=1.5), "wrong-type"),
        (record(id=True), "wrong-type"),
        (record(id=""), "wrong-type"),
        (record(image=""), "wrong-type"),
        (record(image=3), "wrong-type"),
        (record(image=["a.jpg", None]), "wrong-type"),
        (record(system=["a"]), "wrong-type"),
        (record(meta="a"), "wrong-type"),
        (record(mpp=0), "wrong-type"),
        (record(mpp=float("inf")), "wrong-type"),
        (record(mpp=float("nan")), "wrong-type"),
        (record(mpp=True), "wrong-type"),
        (record(stain=3), "wrong-type"),
        ({"conversations": ["a"]}, "wrong-type"),
        (record(question(), {"from": None, "value": "a"}), "wrong-type"),
        (record(question(), {"value": "a"}), "missing-key"),
        (record(question(), {"from": "Assistant", "value": "a"}), "unknown-role"),
        (record(answer()), "empty-conversation"),
        (record(answer(), answer(), question(), answer()), "repeated-role"),
        (record(question(), answer(), answer()), "repeated-role"),
        (record(question(), answer("\t \n")), "empty-answer"),
        (record(question(), answer("a <image> b"), image="a.jpg"), "tag-in-answer"),
        (record(answer("<image>"), question(), answer(), image="a.jpg"), "tag-in-answer"),
        (record(question("\udc80"), answer()), "not-utf8"),
        (record(meta={"a": ["\ud800"]}), "not-utf8"),
    ],
)
def test_a_record_that_breaks_one_rule_breaks_only_that_rule(value: object, rule: str) -> None:
    assert rules_broken(value) == [rule]
    with pytest.raises(RecordError) as caught:
        Conversation.from_record(value)
    assert caught.value.rule == rule
    assert isinstance(caught.value, ValueError)


def test_all_problems_of_a_record_are_listed_with_their_places() -> None:
    value = record(question("<image>"), answer(" "), question(), question(), answer("<image>"))
    places = {(problem.rule, problem.where) for problem in problems_of(value)}
    assert places == {
        ("empty-answer", "conversations[1].value"),
        ("repeated-role", "conversations[3]"),
        ("tag-in-answer", "conversations[4].value"),
        ("tag-count", "conversations"),
    }


def test_an_error_says_where_the_rule_what_was_found_and_what_to_do() -> None:
    with pytest.raises(RecordError) as caught:
        Conversation.from_record(record(question(), answer(), question()))
    assert str(caught.value.at("record 7")) == (
        "record 7: conversations[2]: the last turn must be from 'assistant', found 'human'; "
        "add the answer or leave the last question out [last-turn-not-assistant]"
    )


def test_an_error_survives_pickling() -> None:
    error = RecordError("tag-count", "tags: 2, images: 1", "give every image its tag", "conversations")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.rule) == (str(error), "tag-count")


def test_errors_never_hold_text_names_or_ids() -> None:
    secret = "Miller-4711"
    values: list[object] = [
        secret,
        [secret],
        record(question(secret), {"from": secret, "value": secret}, id=secret),
        record(question(secret), answer(secret), question(secret), id=secret, patient=secret),
        record(question(secret), answer(f"{secret} <image>"), image=secret),
        record(question(secret), question(secret), answer(" ")),
        record(question(secret), answer(secret), mpp=secret, meta=secret, patient=[secret], image={secret: 1}),
    ]
    for value in values:
        problems = problems_of(value)
        assert problems
        for problem in problems:
            assert secret not in f"{problem} {problem!r} {problem.args}"


def test_a_system_role_is_named_and_sent_to_its_key() -> None:
    turns = [{"from": "system", "value": "Be brief."}, question(), answer()]
    with pytest.raises(RecordError, match=r"found 'system'; put it under the record's key 'system'"):
        Conversation.from_record(record(*turns))


def test_a_conversation_comes_back_from_a_shard() -> None:
    conversation = Conversation.from_record(record(question("<image>\nWhy?"), answer(), image="a.jpg", system="S"))
    restored = Conversation.from_shard(conversation.to_shard(), num_images=1)
    assert (restored.turns, restored.system, restored.num_images) == (conversation.turns, "S", 1)
    with pytest.raises(ValueError, match="1 tags and 2 images"):
        Conversation.from_shard(conversation.to_shard(), num_images=2)


def test_an_id_is_read_even_from_a_record_that_is_refused() -> None:
    assert id_of({"id": 3}) == "3"
    assert id_of({"id": True}) is id_of({"id": ""}) is id_of(["id"]) is None


def test_image_names_resolve_inside_the_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "imgs"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a b.jpg").write_bytes(b"x")
    (tmp_path / "outside.jpg").write_bytes(b"x")
    (folder / "out.jpg").symlink_to("../outside.jpg")
    (folder / "in.jpg").symlink_to("sub/a b.jpg")
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "alias").symlink_to(folder)

    assert resolve_image("sub/a b.jpg", folder) == (folder / "sub" / "a b.jpg").resolve()
    assert resolve_image("in.jpg", tmp_path / "alias") == (folder / "sub" / "a b.jpg").resolve()
    outside = ["../outside.jpg", "sub/../in.jpg", "..\\outside.jpg", str(folder / "in.jpg"), "C:\\a.jpg"]
    for name in [*outside, "out.jpg", "out/outside.jpg", "out/no_such_file.jpg"]:
        with pytest.raises(RecordError) as caught:
            resolve_image(name, folder)
        assert caught.value.rule == "path-outside-folder", name
    for name in ["b.jpg", "sub", "", "loop.jpg", "a\0b", "x" * 5000]:
        with pytest.raises(RecordError) as caught:
            resolve_image(name, folder)
        assert caught.value.rule == "missing-file", name


@pytest.mark.parametrize(
    ("data", "rule", "found"),
    [
        (b'{"a":\n "\xe4"}', "not-utf8", "byte 0xe4 at line 2, byte 8 of 11"),
        (b"\xff\xfe[\x00]\x00", "not-utf8", "byte 0xff at line 1, byte 0 of 6"),
        (b'[\n{"a": 1,}]', "invalid-json", "line 2"),
        (b"[NaN]", "invalid-json", "NaN or Infinity"),
        (b"[" * 100_000, "invalid-json", "too many brackets"),
        (b"[" + b"1" * 5000 + b"]", "invalid-json", "a number"),
    ],
)
def test_bytes_that_are_no_json_are_refused_with_their_line(data: bytes, rule: str, found: str) -> None:
    with pytest.raises(RecordError) as caught:
        decode_json(data)
    assert caught.value.rule == rule
    assert found in caught.value.found


def test_a_list_and_lines_give_the_same_records(tmp_path: Path) -> None:
    as_list, as_lines = tmp_path / "a.json", tmp_path / "b.json"
    as_list.write_bytes(b'\xef\xbb\xbf [{"id": 1},\n {"id": 2}]')
    as_lines.write_bytes(b'\xef\xbb\xbf{"id": 1}\r\n\r\n{"id": 2}')
    assert [item.value for item in read_records(as_list)] == [{"id": 1}, {"id": 2}]
    assert [item.value for item in read_records(as_lines)] == [{"id": 1}, {"id": 2}]
    assert [item.where for item in read_records(as_list)] == ["record 0", "record 1"]
    assert [item.where for item in read_records(as_lines)] == ["record 0 (line 1)", "record 1 (line 3)"]


def test_a_bad_line_costs_only_its_record(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": \xff}\n{"id": \n{"id": 4}\n')
    values = [item.value for item in read_records(path)]
    assert [getattr(value, "rule", "good") for value in values] == ["good", "not-utf8", "invalid-json", "good"]


def test_an_object_over_several_lines_is_one_problem(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('{\n "data": [\n  {"id": 1}\n ]\n}\n')
    (item,) = read_records(path)
    assert item.value.rule == "invalid-json"
    assert "one object over several lines" in str(item.value)


def test_every_rule_has_a_name_of_small_letters_and_a_sentence() -> None:
    assert RULES
    for rule, sentence in RULES.items():
        assert rule == rule.lower() and " " not in rule
        assert len(sentence.split()) > 3
