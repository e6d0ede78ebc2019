"""A sample in pieces: nothing is lost or said twice, and a megabyte is shown in part."""

from hypothesis import given
from hypothesis import strategies as st

from service.web.conversation import Piece, Turn, pieces, turns

MESSAGES = [
    {"role": "user", "content": "Name a prime."},
    {"role": "assistant", "content": "Seven.", "reasoning_content": "Small."},
    {"role": "assistant", "content": "Eight.", "counts": False},
]


def test_messages_with_their_roles_and_what_counts() -> None:
    sample = {"messages": MESSAGES, "tools": [{"name": "add"}], "text": None}
    assert turns(sample, 1_000) == [
        Turn("tools", False, ['[{"name": "add"}]'], 0),
        Turn("user", False, ["Name a prime."], 0),
        Turn("assistant", True, ["Small.", "Seven."], 0),
        Turn("assistant", False, ["Eight."], 0),
    ]


def test_plain_text_counts() -> None:
    assert turns({"messages": None, "tools": None, "text": "abc"}, 2) == [Turn("text", True, ["ab"], 1)]


def test_of_long_messages_what_is_hidden_is_counted_and_every_role_stays() -> None:
    found = turns({"messages": MESSAGES, "tools": None, "text": None}, 15)
    assert [turn.parts for turn in found] == [["Name a prime."], ["Sm"], []]
    assert [turn.hidden for turn in found] == [0, 10, 6]


def test_pieces_of_what_a_model_reads() -> None:
    found, hidden = pieces("system user answer more", [(12, 18)], (7, 18), 100)
    assert found == [
        Piece("cut", "system "),
        Piece("plain", "user "),
        Piece("counted", "answer"),
        Piece("cut", " more"),
    ]
    assert hidden == 0


def test_of_an_unusable_row_everything_is_cut() -> None:
    assert pieces("abc", [], None, 2) == ([Piece("cut", "ab")], 1)


@given(st.text(min_size=1, max_size=60), st.lists(st.integers(0, 60), max_size=8), st.integers(0, 70))
def test_pieces_are_the_text(text: str, cuts: list[int], most: int) -> None:
    ends = sorted({min(cut, len(text)) for cut in cuts})
    kept = (ends[0], ends[-1]) if ends else None
    spans = list(zip(ends[::2], ends[1::2], strict=False))
    found, hidden = pieces(text, spans, kept, most)
    assert "".join(piece.text for piece in found) == text[:most]
    assert hidden == max(len(text) - most, 0)
    counted = "".join(piece.text for piece in found if piece.kind == "counted")
    assert counted == "".join(text[:most][start:end] for start, end in spans)
