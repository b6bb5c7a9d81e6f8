"""The sentences of the small training set: questions, answers and captions, with places for measured facts.

A closed question has one list of phrasings for all its answers, and every phrasing is used as often with one
answer as with the other (`records.py` sees to it), so that the words of a question never give it away.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClosedQuestion:
    """One kind of closed question.

    Attributes:
        options: The two answers.
        phrasings: Sentences with `{a}` and `{b}` where the options stand, in either order.
        names: How an option reads inside a question, where that differs from the answer.
    """

    options: tuple[str, str]
    phrasings: tuple[str, ...]
    names: dict[str, str] | None = None

    def ask(self, number: int) -> str:
        """Returns the `number`-th question: the phrasings in turn, then the same with the order swapped."""
        a, b = self.options if (number // len(self.phrasings)) % 2 == 0 else self.options[::-1]
        names = self.names or {}
        return self.phrasings[number % len(self.phrasings)].format(a=names.get(a, a), b=names.get(b, b))


CLOSED = {
    "tissue": ClosedQuestion(
        ("tissue", "background"),
        (
            "Is this tile mostly {a} or mostly {b}?",
            "What fills the larger part of the picture, {a} or {b}? One word, please.",
            "Looking at the area covered: more {a}, or more {b}?",
        ),
    ),
    "stain": ClosedQuestion(
        ("H&E", "IHC"),
        (
            "Which stain was used here, {a} or {b}?",
            "Was this section prepared with {a} or with {b}?",
            "Name the kind of staining: {a} or {b}.",
        ),
    ),
    "field": ClosedQuestion(
        ("nest", "stroma"),
        (
            "This tile comes from one of two fields, {a} or {b}. Which one?",
            "Which field was it cut from: {a}, or {b}?",
        ),
        {"nest": "the tumour nest field", "stroma": "the stroma field"},
    ),
    "tone": ClosedQuestion(
        ("dark", "pale"),
        (
            "Is the picture {a} or {b} as a whole?",
            "How bright is this tile overall, {a} or {b}?",
            "Taken together, are its colours {a} or {b}?",
        ),
    ),
    "channel": ClosedQuestion(
        ("red", "blue"),
        (
            "Averaged over the tissue, which colour channel is stronger, {a} or {b}?",
            "Does {a} or {b} dominate in the stained area?",
        ),
    ),
    "nuclei_class": ClosedQuestion(
        ("inflammatory", "connective"),
        (
            "By the package's annotations, which nuclei are more numerous here, {a} or {b}?",
            "Are there more {a} or more {b} nuclei annotated in this picture?",
        ),
    ),
}

# Two pictures: the order of the pictures decides the answer, so the wording needs no swapping.
PAIR_OPTIONS = ("first", "second")
PAIRS = {
    "pair_tissue": (
        "<image>\n<image>\nWhich of the two pictures shows more tissue, the first or the second?",
        "Here are two tiles.\n<image>\n<image>\nWhich has more tissue, the first or the second?",
        "First: <image>\nSecond: <image>\nWhich one has the larger share of tissue?",
    ),
    "pair_nuclei": (
        "<image>\n<image>\nBy the package's annotations, which has more nuclei, the first or the second?",
        "First: <image>\nSecond: <image>\nIn which one were more nuclei annotated?",
    ),
}

LETTERS = ("A", "B")
MULTIPLE_CHOICE = {
    "tissue": ("What covers most of the tile?", {"tissue": "tissue", "background": "empty background"}),
    "stain": (
        "How was this section stained?",
        {"H&E": "haematoxylin and eosin", "IHC": "immunohistochemistry with DAB"},
    ),
    "field": ("Which field is shown?", {"nest": "tumour nest field", "stroma": "stroma field"}),
}

TAG_FIRST, TAG_LAST = "<image>\n{}", "{}\n<image>"

STAIN_NAME = {
    "H&E": "haematoxylin and eosin",
    "IHC (DAB)": "immunohistochemistry with DAB and a haematoxylin counterstain",
}
SHORT_STAIN = {"H&E": "H&E", "IHC (DAB)": "IHC"}

# (share of tissue up to, words)
AMOUNTS = (
    (0.02, "almost nothing but background"),
    (0.20, "mostly background with a little tissue"),
    (0.40, "more background than tissue"),
    (0.60, "about as much tissue as background"),
    (0.90, "mostly tissue with some background"),
    (1.01, "almost only tissue"),
)

CAPTIONS = (
    "{stain} tile: {amount}, {tone} overall.",
    "{amount}; the stain is {stain_name}.",
    "A {tone} picture, {amount}. Stain: {stain}.",
    "Histology prepared with {stain_name}. It shows {amount}.",
    "{stain}, {amount}, {percent} of the area is tissue.",
)
EMPTY_CAPTIONS = (
    "An empty tile: background only.",
    "Nothing but pale background, no tissue to speak of.",
    "Background of the slide, without tissue.",
)
# What is known of a whole picture, said after the caption of some of its tiles.
CAPTION_TAILS = {
    "cmu": "Scanned at 0.499 micrometres per pixel.",
    "hgsc_nest": "Cut from the tumour nest field of a high-grade serous carcinoma of the ovary.",
    "hgsc_stroma": "Cut from the stroma field of a high-grade serous carcinoma of the ovary.",
    "ihc": "Colonic glands, FHL2 shown in brown.",
}
NUCLEI_CAPTION = (
    "{stain}. The package's annotations count {neoplastic} neoplastic, {inflammatory} inflammatory and "
    "{connective} connective nuclei here."
)

DESCRIBE = (
    "Describe what you see.",
    "What does this picture show?",
    "Give a short caption for the tile.",
    "Please summarise the picture in one or two sentences.",
)
HOW_MUCH = (
    "Roughly how much of the area is tissue?",
    "Give the share of tissue in per cent.",
    "And how large is the tissue part, about?",
)
ORGAN_QUESTION = (
    "Which organ is it?",
    "Is anything known about the organ?",
    "Where in the body does it come from?",
)
ORGAN_ANSWER = {
    "cmu": "The source does not name the organ.",
    "hgsc_nest": "Ovary: the source states high-grade serous carcinoma, tumour nest.",
    "hgsc_stroma": "Ovary: the source states high-grade serous carcinoma, stroma.",
    "ihc": "Colon: the source states colonic glands.",
}
SCALE_QUESTION = "What is the size of one pixel?"
SCALE_ANSWER = "0.499 micrometres."
DIAGNOSIS_QUESTION = ("What is the diagnosis?", "Can you tell me which disease this is?")
DIAGNOSIS_ANSWER = "The source of this picture states no diagnosis, so I give none."
MARKER_QUESTION = "What does the brown colour mean?"
MARKER_ANSWER = "Brown is DAB, which marks FHL2 in this section."

NO_IMAGE_ANSWER = "No picture has come with this question, so there is nothing I can look at."
# (system message or None, question, answer): what is commonly known of stains, and questions without picture.
TEXT_ONLY = (
    (None, "What does haematoxylin colour?", "Haematoxylin colours cell nuclei blue to purple."),
    (None, "And what is eosin for?", "Eosin colours cytoplasm and connective tissue fibres pink."),
    (None, "What does H&E stand for?", "Haematoxylin and eosin."),
    (None, "What does IHC stand for?", "Immunohistochemistry."),
    (None, "Which colour does DAB leave behind?", "Brown."),
    (
        None,
        "Why is a counterstain used in immunohistochemistry?",
        "To show nuclei beside the marked protein.",
    ),
    (
        None,
        "How does the empty part of a bright-field slide look?",
        "White or nearly so: the light passes freely.",
    ),
    ("Answer in one word.", "Which colour do nuclei take in H&E?", "Blue."),
    ("Answer in one word.", "Which colour does eosin give?", "Pink."),
    (None, "Is this tile mostly tissue or mostly background?", NO_IMAGE_ANSWER),
    (None, "Which stain was used here, H&E or IHC?", NO_IMAGE_ANSWER),
    (None, "Please describe the picture.", NO_IMAGE_ANSWER),
    (None, "Which of the two pictures shows more tissue, the first or the second?", NO_IMAGE_ANSWER),
    (None, "How many nuclei can you see?", NO_IMAGE_ANSWER),
)
